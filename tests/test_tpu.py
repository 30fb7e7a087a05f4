"""Programs compiled ahead of time for a TPU slice that isn't attached, read for what they hold."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreset.learning.form import LossForm
from jaxreset.learning.microbatches import PackShape, empty_batch
from jaxreset.learning.update import accumulate, layout_of
from jaxreset.models.adapters import trained
from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import Decoder
from jaxreset.models.lora import LoRA
from jaxreset.models.placement import param_shardings
from jaxreset.parallel import AXES, data_shards, rows_sharding

pytestmark = pytest.mark.slow

pytest.importorskip("libtpu", reason="the compiler of TPU programs, part of jax[tpu]")

GIB = 2**30
V5E_MEMORY = 16 * GIB
QWEN_14B = DecoderConfig(
    vocab=152_064,
    layers=48,
    width=5120,
    heads=40,
    kv_heads=8,
    head_dim=128,
    mlp=13_824,
    rope_theta=1e6,
    qkv_bias=True,
    tie_embeddings=False,
    dtype="bfloat16",
    lora=LoRA(rank=64, alpha=64.0),
)


def slice_mesh(monkeypatch, topology, sizes):
    """A mesh of the devices of a slice, for programs to be compiled for."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server what this machine is
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def placed(tree, shardings):
    """Shapes and dtypes of a tree's arrays, and where they would lie."""

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def shapes_in(program, *, size):
    """Shapes of the arrays in a compiled program that have an axis of that size."""
    found = re.findall(r"\b(?:f32|bf16|[su]32|pred)\[([\d,]+)\]", program.as_text())
    shapes = {tuple(map(int, dims.split(","))) for dims in found}
    return {shape for shape in shapes if size in shape}


def test_the_update_of_14b_parameters_holds_no_logits_of_all_tokens(monkeypatch):
    mesh = slice_mesh(monkeypatch, "v5e:4x4", (2, 2, 4))
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(QWEN_14B, rngs=nnx.Rngs(0))))
    learnt, frozen = trained(placed(params, param_shardings(mesh, params)))
    shape = PackShape(bins=data_shards(mesh), lanes=8, prefix=127, slots=128)
    batch = empty_batch(shape)
    rows = jax.tree.map(lambda _: rows_sharding(mesh), batch)
    temperature = jax.ShapeDtypeStruct(
        (), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    program = accumulate.lower(
        *(learnt, learnt, frozen, placed(batch, rows), temperature),
        graph=graph,
        form=LossForm(),
        remat=True,
        mesh=mesh,
        layout=layout_of(learnt),
    ).compile()

    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < V5E_MEMORY
    # What a device holds: the tokens of its bins, and its part of the vocabulary, or all of it.
    tokens = shape.bins * shape.lanes * shape.slots // data_shards(mesh)
    vocab = QWEN_14B.vocab // mesh.shape["tensor"]
    shapes = shapes_in(program, size=vocab) | shapes_in(program, size=QWEN_14B.vocab)
    weights = {s for s in shapes if QWEN_14B.width in s or QWEN_14B.width // 2 in s}
    assert weights  # of the embedding, so the axis was looked for in the right way
    logits = [math.prod(s) for s in shapes - weights]
    assert logits
    assert max(logits) <= tokens * vocab / 4
