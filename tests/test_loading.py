"""Parameters read straight into their sharding are those read whole, whatever the mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model_helpers import (
    as_olmo3,
    assert_same_params,
    edit_weights,
    fixture_folder,
    random_params,
    random_policy,
    word_tokenizer,
)
from safetensors.numpy import load_file

from jaxreset.models import huggingface, reading
from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import read_config
from jaxreset.models.placement import param_shardings
from jaxreset.models.policy import load_policy
from jaxreset.parallel import make_mesh
from jaxreset.run.compiles import compiles

SIZES = DecoderConfig(vocab=40, layers=3, width=24, heads=8, kv_heads=2, head_dim=4, mlp=16)
CONFIGS = {
    "tied, biases": dataclasses.replace(SIZES, qkv_bias=True),
    "untied, norms": dataclasses.replace(SIZES, qk_norm=True, tie_embeddings=False),
    "windows": as_olmo3(SIZES, window=3),
    "odd vocabulary, one key-value head": DecoderConfig(
        vocab=41, layers=2, width=24, heads=8, kv_heads=1, head_dim=6, mlp=16, qkv_bias=True
    ),
}
MESHES = [(1, 4, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)]


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    ours = random_policy(CONFIGS[request.param], word_tokenizer(40))
    folder = huggingface.export(
        tmp_path / "model", ours.config, ours.params, ours.tokenizer, shard_bytes=8_000
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_the_same_on_every_mesh_and_nothing_is_compiled(folder, dtype):
    before = compiles()
    whole = load_policy(folder, dtype=dtype)
    loaded = [load_policy(folder, dtype=dtype, mesh=make_mesh(*sizes)) for sizes in MESHES]
    assert compiles() == before
    for sizes, spread in zip(MESHES, loaded, strict=True):
        mesh = make_mesh(*sizes)
        assert_same_params(spread.params, whole.params)
        expected = jax.device_put(whole.params, param_shardings(mesh, whole.params))
        for ours, theirs in zip(*map(jax.tree.leaves, (spread.params, expected)), strict=True):
            assert ours.sharding == theirs.sharding
            for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
                assert (a.device, a.index) == (b.device, b.index)
                np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))


def test_split_layers_and_heads_are_read_from_the_right_place(folder):
    config = read_config(folder)
    whole = huggingface.load_params(folder, config)
    mesh = make_mesh(2, 2, 2)

    def split(param):
        """Every axis that can be, over another axis of the mesh."""
        names = iter(mesh.axis_names)
        axes = [next(names, None) if size % 2 == 0 else None for size in param.shape]
        return NamedSharding(mesh, PartitionSpec(*axes))

    params = huggingface.load_params(folder, config, jax.tree.map(split, whole))
    assert_same_params(params, whole)
    assert all(p.sharding == split(p) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_dtypes_are_converted(tmp_path, stored, dtype):
    folder = fixture_folder(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(folder, lambda t: t.update({k: v.astype(jnp.dtype(stored)) for k, v in t.items()}))
    tensor = load_file(folder / "model.safetensors")[name]
    assert tensor.dtype == stored
    for mesh in (None, make_mesh(1, 4, 2)):
        down = load_policy(folder, dtype=dtype, mesh=mesh).params["blocks"]["down"][...]
        assert down.dtype == dtype
        np.testing.assert_array_equal(np.asarray(down)[1], tensor.T.astype(jnp.dtype(dtype)))


def test_the_host_holds_one_part_and_one_tensor_at_a_time(tmp_path, monkeypatch):
    config = dataclasses.replace(SIZES, vocab=4096, width=64, tie_embeddings=False)
    _, params = random_params(config)
    folder = huggingface.export(tmp_path / "model", config, params, word_tokenizer(40))
    shardings = param_shardings(make_mesh(1, 4, 2), params)
    largest = {"empty": 0, "memmap": 0}

    def watched(name, function):
        def call(*args, **kwargs):
            array = function(*args, **kwargs)
            largest[name] = max(largest[name], array.nbytes)
            return array

        return call

    for name in largest:
        monkeypatch.setattr(np, name, watched(name, getattr(np, name)))
    loaded = huggingface.load_params(folder, config, shardings)
    monkeypatch.undo()
    assert_same_params(loaded, params)
    embed = 4096 * 64 * 4
    assert largest == {"empty": embed // 8, "memmap": embed}


def test_a_part_on_several_devices_is_read_once_and_others_are_not(monkeypatch):
    """As in one of two processes: it has the first half of the rows, each on two devices."""
    devices = jax.devices()
    rows = {devices[i]: (slice(i // 2, i // 2 + 1), slice(None)) for i in range(4)}
    whole, read = np.arange(24.0).reshape(4, 6), []

    class HalfSharding:
        def addressable_devices_indices_map(self, shape):
            return rows

    def part(index):
        read.append(index)
        return whole[index]

    monkeypatch.setattr(
        jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays
    )
    arrays = reading.place((4, 6), part, HalfSharding())
    assert read == [(slice(0, 1), slice(0, 6)), (slice(1, 2), slice(0, 6))]
    assert [array.device for array in arrays] == devices[:4]
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(array, whole[i // 2 : i // 2 + 1])


def test_tied_embeddings_are_compared_in_blocks(tmp_path, monkeypatch):
    folder = fixture_folder(tmp_path)
    monkeypatch.setattr(reading, "COMPARED_BYTES", 1000)  # 7 rows of 32 numbers
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for row in (0, 7, 63):
        head = embed.copy()
        edit_weights(folder, lambda t, head=head: t.update({"lm_head.weight": head}))
        load_policy(folder)
        head[row, -1] += 1
        edit_weights(folder, lambda t, head=head: t.update({"lm_head.weight": head}))
        with pytest.raises(ValueError, match=r"lm_head.weight differs"):
            load_policy(folder)
