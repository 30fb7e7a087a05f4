"""A run's programs, lowered from shapes alone: no weight is read and no array exists.

Every call of a program that is compiled ahead of time stands here, with the arguments that sampler and
learner give it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.stages import Lowered

from jaxreset.config import Config
from jaxreset.learning.microbatches import PackShape, empty_batch
from jaxreset.learning.optimizer import make_optimizer
from jaxreset.learning.update import (
    TrainState,
    abstract_state,
    accumulate,
    apply,
    layout_of,
)
from jaxreset.models import adapters
from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import KV, Decoder, Store
from jaxreset.models.decoding_copy import decoding_layout
from jaxreset.models.huggingface import abstract_decoder
from jaxreset.models.placement import decode_shardings, param_shardings
from jaxreset.parallel import cache_sharding, data_shards, replicated, rows_sharding
from jaxreset.sampling import decoding, prefilling, stores
from jaxreset.sampling.decoding import Limits
from jaxreset.sampling.drawing import idle_lanes
from jaxreset.sampling.prefilling import chunk_shape, plan_chunks
from jaxreset.sampling.rounds import Shape
from jaxreset.sampling.schedule import LaneShape
from jaxreset.sampling.tokens import Draws
from jaxreset.steps import StepAutomaton, build_automaton

Tree = Any  # of jax.ShapeDtypeStruct

BYTES = [bytes([value]) for value in range(256)]  # a vocabulary that spells anything


@dataclass(frozen=True)
class Subject:
    """What a config's programs are about: shapes, dtypes and places of its arrays.

    Attributes:
      config: resolved.
      model: sizes of the policy, with its adapters.
      graph: of the policy.
      state, frozen: what is trained, and the parameters that are not.
      decoding_graph, decoding: the policy as decoding wants it, in a copy or as it is (`copies`).
      automaton: the step table.
      optimizer: the config's.
      mesh: None: one device.
      rows, whole: where arrays of groups lie, and arrays that every device has.
    """

    config: Config
    model: DecoderConfig
    graph: nnx.GraphDef[Decoder]
    state: TrainState
    frozen: nnx.State
    decoding_graph: nnx.GraphDef[Decoder]
    decoding: nnx.State
    copies: bool
    automaton: StepAutomaton
    optimizer: optax.GradientTransformation
    mesh: Mesh | None
    rows: Sharding
    whole: Sharding

    @property
    def parameters(self) -> int:
        """How many numbers the policy has, adapters left out."""
        base = self.state.params if self.model.lora is None else self.frozen
        return sum(x.size for x in jax.tree.leaves(base))

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are this machine's cores."""
        device: Any = next(iter(self.whole.device_set))
        return bool(device.platform == "cpu")


def make_subject(
    config: Config, model: DecoderConfig, mesh: Mesh, *, delimiter: str, answer_marker: str
) -> Subject:
    """The arrays of a run with a policy of those sizes, on a mesh of devices that need not be there."""
    spread = mesh if mesh.size > 1 else None
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    (device,) = mesh.devices.flat if spread is None else (None,)
    alone = None if device is None else SingleDeviceSharding(device)

    def place(tree: Tree, shardings: Any) -> Tree:
        if alone is not None:
            shardings = jax.tree.map(lambda _: alone, tree)
        return jax.tree.map(_placed, tree, shardings)

    model = dataclasses.replace(model, lora=config.model.lora.make())
    graph, params = abstract_decoder(model)
    params = place(params, param_shardings(mesh, params))
    learnt, frozen = adapters.trained(params)
    optimizer = make_optimizer(config.optimizer.make(config.optimizer_steps))
    state = abstract_state(learnt, optimizer)
    whole = nnx.merge_state(state.params, frozen)
    states, size = _states(delimiter, answer_marker), model.vocab
    decoding_graph, copy = decoding_layout(
        graph, whole, model, spread, on_cpu=on_cpu, run=_in_shapes
    )
    return Subject(
        config=config,
        model=model,
        graph=graph,
        state=state,
        frozen=frozen,
        decoding_graph=decoding_graph,
        decoding=place(copy, decode_shardings(mesh, copy)),
        copies=copy is not whole,
        automaton=StepAutomaton(
            jax.ShapeDtypeStruct((states, size), np.int16),
            jax.ShapeDtypeStruct((states, size), np.uint8),
        ),
        optimizer=optimizer,
        mesh=spread,
        rows=alone or rows_sharding(mesh),
        whole=alone or replicated(mesh),
    )


class Call(NamedTuple):
    """A jitted function and what it would be called with."""

    function: Any
    args: tuple[Tree, ...]
    static: dict[str, Any]

    def lower(self) -> Lowered:
        """The program, not yet compiled."""
        lowered: Lowered = self.function.lower(*self.args, **self.static)
        return lowered


def prefill(subject: Subject, part: Shape) -> Call:
    """Prefilling the prefixes of a part of a round."""
    shards = data_shards(subject.mesh)
    size = chunk_shape(part.groups, part.prefix, on_cpu=subject.on_cpu, shards=shards)
    tokens = np.zeros((part.groups, part.prefix), np.int32)
    chunks = plan_chunks([], [], size, groups=part.groups, prefix=part.prefix, shards=shards)
    tokens, groups, starts = _all_at((tokens, chunks.groups, chunks.starts), subject.rows)
    count = _all_at(chunks.count, subject.whole)
    args = (
        subject.decoding,
        prefix_store(subject, part.groups, part.prefix),
        tokens,
        chunks._replace(groups=groups, starts=starts, count=count),
    )
    static = {"graph": subject.decoding_graph, "size": size.tokens, "mesh": subject.mesh}
    return Call(prefilling.prefill, args, static)


def decode(subject: Subject, part: Shape, lanes: LaneShape) -> Call:
    """The decoding loop of some lanes of a part of a round."""
    one = np.int32(1)
    limits = Limits(one, one, one, one, np.zeros(1, np.int32))
    draws = Draws(np.float32(1), np.float32(1), one, one, *np.zeros(3, np.uint32))
    args = (
        subject.decoding,
        prefix_store(subject, part.groups, part.prefix),
        own_store(subject, lanes.groups, lanes.rows, part.suffix),
        _all_at(idle_lanes(lanes, in_place=lanes[:2] == part[:2]), subject.rows),
        *_all_at((subject.automaton, limits, draws, one), subject.whole),
    )
    static = {"graph": subject.decoding_graph, "window": lanes.window, "mesh": subject.mesh}
    return Call(decoding.decode, args, static)


def fork(subject: Subject, parent: Shape, child: Shape) -> Call:
    """Gathering the prefixes of a reset round from a round whose rows are all in their places."""
    lengths, groups = np.zeros(parent.groups, np.int32), np.zeros(child.groups, np.int32)
    args = (
        prefix_store(subject, parent.groups, parent.prefix),
        own_store(subject, parent.groups, parent.rows, parent.suffix),
        *_all_at((lengths, groups, (groups, groups)), subject.rows),
    )
    return Call(stores.fork, args, {"size": child.prefix, "mesh": subject.mesh})


def accumulate_microbatch(subject: Subject, shape: PackShape) -> Call:
    """The gradient of a microbatch."""
    args = (
        subject.state.gradients,
        subject.state.params,
        subject.frozen,
        microbatch(subject, shape),
        _all_at(np.float32(1), subject.whole),
    )
    static = {
        "graph": subject.graph,
        "form": subject.config.loss.make(),
        "remat": subject.config.train.remat,
        "mesh": subject.mesh,
        "layout": layout_of(subject.state.gradients),
    }
    return Call(accumulate, args, static)


def apply_gradients(subject: Subject) -> Call:
    """The optimizer's step."""
    args = subject.state, *_all_at((np.float32(1), np.int32(0)), subject.whole)
    static = {"optimizer": subject.optimizer, "layout": layout_of(subject.state)}
    return Call(apply, args, static)


def microbatch(subject: Subject, shape: PackShape) -> Tree:
    """A microbatch, with what else its loss needs."""
    form, batch = subject.config.loss.make(), empty_batch(shape)
    if form.recompute:
        batch = batch._replace(old_logps=batch.behavior_logps)
    if form.kl:
        batch = batch._replace(reference_logps=batch.behavior_logps)
    return _all_at(batch, subject.rows)


def prefix_store(subject: Subject, groups: int, size: int) -> Store:
    """Keys and values of prefixes, N × P slots."""
    return _store(subject, (groups,), size)


def own_store(subject: Subject, groups: int, rows: int, size: int) -> Store:
    """Keys and values of rows, M × K × S slots."""
    return _store(subject, (groups, rows), size)


def device_bytes_of(*trees: Tree) -> int:
    """Bytes of arrays on the device that has most of them."""
    leaves = jax.tree.leaves(trees)
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves]
    return sum(int(np.prod(shape, dtype=int)) * dtype.itemsize for shape, dtype in shards)


def _in_shapes(function: Any, *args: Tree, **static: Any) -> Tree:
    """What a function would return; not where it would lie."""
    return jax.eval_shape(partial(function, **static), *args)


def _states(delimiter: str, answer_marker: str) -> int:
    """States of the step table, which depend on what it looks for and not on the vocabulary."""
    table = build_automaton(BYTES, delimiter=delimiter, answer_marker=answer_marker)
    return len(table.next_state)


def _store(subject: Subject, around: tuple[int, ...], size: int) -> Store:
    c, mesh = subject.model, subject.mesh

    def place(*shape: int) -> Any:
        sharding = subject.whole
        if mesh is not None:
            sharding = cache_sharding(mesh, shape, head_axis=stores.HEAD_AXIS)
        return jax.ShapeDtypeStruct(shape, c.dtype, sharding=sharding)

    def stack(layers: int) -> KV:
        heads = layers, *around, c.kv_heads
        return KV(place(*heads, c.head_dim, size), place(*heads, size, c.head_dim))

    # A CPU has each layer in a stack of its own.
    return tuple(map(stack, [1] * c.layers if subject.on_cpu else [c.layers]))


def _all_at(tree: Tree, sharding: Sharding) -> Tree:
    return jax.tree.map(lambda x: _placed(x, sharding), tree)


def _placed(x: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
