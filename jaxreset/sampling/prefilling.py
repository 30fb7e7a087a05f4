"""Prefill: running prefixes through the network, a chunk of their tokens at a time.

    prefill   a prefix store, tokens [N, P]       ─▶ the store with the slots filled that are asked for

A prefix of p tokens has p - 1 slots in its store: the last token is fed again by every row, into the
row's slot 0. So a prompt and a reset state start in the same way, and prefill needs no logits.

Only chunks that some prefix needs are computed, so short prefixes cost little in a store for long ones, and
scores are those of a chunk. It is one program for each size of store, whether its prefixes are new or are
going on behind what a fork has gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxreset.models.attention import Attend, attend_by_heads, shared_prefix_attention
from jaxreset.models.decoder import KV, Decoder, Store
from jaxreset.parallel import DATA_AXES
from jaxreset.sampling.stores import constrain

Array = jax.Array
Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit

# Tokens of a chunk, and of chunks that a data shard computes at once. Enough to read the weights for: a CPU
# needs few, and what a chunk has beyond its prefix's end is wasted.
CPU_CHUNK, CPU_TOKENS = 64, 256
CHUNK, TOKENS = 256, 2048


class Chunks(NamedTuple):
    """What is computed, in `count` turns of at most J; D data shards compute B chunks each in a turn.

    groups: [D * B, J] of the round, each on its own shard.  starts: [D * B, J] first slot of the chunk.
    count: scalar.
    """

    groups: Leaf
    starts: Leaf
    count: Leaf


class ChunkShape(NamedTuple):
    """J turns of B chunks of C tokens, on each data shard."""

    turns: int
    chunks: int
    tokens: int


def chunk_shape(groups: int, prefix: int, *, on_cpu: bool, shards: int = 1) -> ChunkShape:
    """For N groups, a multiple of the shards, with P slots.

    >>> chunk_shape(64, 1000, on_cpu=False, shards=8)
    ChunkShape(turns=4, chunks=8, tokens=256)
    >>> chunk_shape(8, 100, on_cpu=True)
    ChunkShape(turns=4, chunks=4, tokens=64)
    """
    here = groups // shards
    tokens = min(CPU_CHUNK if on_cpu else CHUNK, prefix)
    chunks = min(max((CPU_TOKENS if on_cpu else TOKENS) // tokens, 1), here)
    return ChunkShape(-(-here // chunks) * -(-prefix // tokens), chunks, tokens)


def plan_chunks(
    places: Sequence[int],
    spans: Sequence[tuple[int, int]],
    shape: ChunkShape,
    *,
    groups: int,
    prefix: int,
    shards: int = 1,
) -> Chunks:
    """The chunks that fill slots `[begin, end)` of the groups in `places`, each after those before it.

    Where a shard has nothing to do in a turn it does again what it did in its first.

    Args:
      places: of the groups in the store, which counts `groups` over all shards.
      spans: of each.
      prefix: P.
    """
    here = groups // shards
    firsts = [(place, 0) for place in range(0, groups, here)]
    todo: list[list[list[tuple[int, int]]]] = [[] for _ in range(shards)]  # by shard and number
    for place, (begin, end) in zip(places, spans, strict=True):
        levels = todo[place // here]
        for level, start in enumerate(range(begin, end, shape.tokens)):
            if len(levels) == level:
                levels.append([])
            # The last is moved back where it would not fit; what it then does again is the same.
            levels[level].append((int(place), min(start, prefix - shape.tokens)))
    turns = [
        [
            level[first : first + shape.chunks]
            for level in levels
            for first in range(0, len(level), shape.chunks)
        ]
        for levels in todo
    ]
    entries = np.zeros((2, shards, shape.chunks, shape.turns), np.int32)
    for shard, (first, of_shard) in enumerate(zip(firsts, turns, strict=True)):
        again = of_shard[0][0] if of_shard else first
        entries[:, shard] = np.array(again)[:, None, None]
        for turn, some in enumerate(of_shard):
            some = [*some, *[some[0]] * (shape.chunks - len(some))]
            entries[:, shard, :, turn] = np.array(some).T
    at_once = entries.reshape(2, -1, shape.turns)
    return Chunks(at_once[0], at_once[1], np.int32(max(map(len, turns))))


@partial(jax.jit, static_argnames=("graph", "size", "mesh"), donate_argnames="store")
def prefill(
    params: nnx.State,
    store: Store,
    tokens: Array,
    chunks: Chunks,
    *,
    graph: nnx.GraphDef,
    size: int,
    mesh: Mesh | None = None,
) -> Store:
    """The prefix store with the slots of the chunks filled.

    Args:
      params: the decoder's.
      store: N × P slots; donated.
      tokens: `[N, P]` int32, each in its slot; right-padded.
      chunks: of `plan_chunks`.
      size: C, tokens of a chunk.
      mesh: that the store lies on. Its data shards go side by side and exchange nothing.
    """
    on_shard = partial(_prefill, graph=graph, size=size, mesh=mesh)
    if mesh is None:
        return on_shard(params, store, tokens, chunks)
    whole, split, stored = PartitionSpec(), PartitionSpec(DATA_AXES), PartitionSpec(None, DATA_AXES)
    filled: Store = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(whole, stored, split, Chunks(split, split, whole)),
        out_specs=stored,
        axis_names=set(DATA_AXES),  # what is split over tensor is XLA's to see to
        check_vma=False,
    )(params, store, tokens, chunks)
    return constrain(filled, mesh)


def _prefill(
    params: nnx.State,
    store: Store,
    tokens: Array,
    chunks: Chunks,
    *,
    graph: nnx.GraphDef,
    size: int,
    mesh: Mesh | None,
) -> Store:
    """`prefill` on one data shard of the mesh, or on the only device."""
    model: Decoder = nnx.merge(graph, params)
    attend: Attend = shared_prefix_attention if mesh is None else attend_by_heads(mesh)

    def turn(number: Array, store: Store) -> Store:
        groups, starts = chunks.groups[:, number] % len(tokens), chunks.starts[:, number]
        slots = starts[:, None] + jnp.arange(size)
        made = model.extend(tokens[groups[:, None], slots], store, groups, starts, attend)
        return tuple(_placed(*stacks, groups, starts) for stacks in zip(store, made, strict=True))

    return jax.lax.fori_loop(0, chunks.count, turn, store)


@jax.jit  # of its own, so that stacks of one layer each are traced once
def _placed(whole: KV, part: KV, groups: Array, starts: Array) -> KV:
    """A stack's keys and values with those of chunks written from `starts` on."""
    for n in range(len(groups)):  # each in its place: a scatter would copy the store
        keys = _written(whole.keys, part.keys[:, n], groups[n], starts[n], axis=-1)
        values = _written(whole.values, part.values[:, n], groups[n], starts[n], axis=-2)
        whole = KV(keys, values)
    return whole


def _written(whole: Array, part: Array, group: Array, start: Array, *, axis: int) -> Array:
    """All layers' slots of one group from `start` on."""
    where = [jnp.zeros_like(start)] * whole.ndim
    where[1], where[axis] = group, start
    return jax.lax.dynamic_update_slice(whole, part[:, None], where)
