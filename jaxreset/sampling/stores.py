"""Moving keys and values between stores: jitted programs, of which none crosses data shards.

    empty   sizes                               ─▶ a store of zeros, of prefixes or of rows
    fork    a round's stores, rows and lengths  ─▶ prefix store: N' times P' slots
    lift    rows of lanes or of a page          ─▶ rows by themselves
    lay     rows by themselves                  ─▶ rows of lanes or of a page

A row is moved by `lift` and `lay`: so every size of store takes two programs, not one for each other size.

Over a mesh the groups of every store are split into equal runs, a run for each data shard, and a group's
rows, lanes, pages and resets stay on its shard (`places` and `lanes` see to it). So each shard gathers
from what it holds. Index arrays hold numbers that count over all shards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import KV, Store
from jaxreset.parallel import cache_sharding, rows_sharding

Array = jax.Array
Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit

HEAD_AXIS = -3  # of keys and values


class Layout(NamedTuple):
    """Of a policy's stores: layers of each stack, key-value heads, their width, and the dtype's name."""

    stacks: tuple[int, ...]
    heads: int
    width: int
    dtype: str


def layout_of(store: Store) -> Layout:
    """Of stores beside this one, of prefixes."""
    _, _, heads, width, _ = store[0].keys.shape
    stacks = tuple(len(stack.keys) for stack in store)
    return Layout(stacks, heads, width, str(store[0].keys.dtype))


def layout_for(config: DecoderConfig, *, stacked: bool) -> Layout:
    """Of stores for a decoder of these sizes, whose layers are in one stack or each in its own."""
    stacks = (config.layers,) if stacked else (1,) * config.layers
    return Layout(stacks, config.kv_heads, config.head_dim, config.dtype)


class Moved(NamedTuple):
    """Rows on their way from one store to another, `[F]`; those not `chosen` stay where they are.

    Over a mesh the first `F / shards` are of the first shard, and so on.

    source, target: the two indices of each row.
    """

    source: tuple[Leaf, Leaf]
    target: tuple[Leaf, Leaf]
    chosen: Leaf


@partial(jax.jit, static_argnames=("size", "mesh"))
def fork(
    prefix: Store,
    suffix: Store,
    prefix_lengths: Array,
    groups: Array,
    cells: tuple[Array, Array],
    *,
    size: int,
    mesh: Mesh | None = None,
) -> Store:
    """Prefix stores of `size` slots for reset groups, gathered once per group from a round's stores.

    Args:
      prefix: the parent round's, N × P slots.
      suffix: a page with the rows gone back to, A × B × W slots.
      prefix_lengths: `[N]` int, tokens of the parent's prefixes.
      groups: `[N']` int, the parent of each new group, on the same shard.
      cells: [N'] the row on the page, on the same shard. Slots past the snapshot's length hold the row's
        later tokens, or garbage; attention masks them.
      size: slots of the new stores.
    """

    def join(prefix: Array, suffix: Array, held: Array, axis: int) -> Array:
        """Each group's prefix, and its row's slots written behind what the prefix holds."""
        # Room for them all: where they don't fit, XLA would write them further ahead.
        width, room = prefix.shape[axis], max(prefix.shape[axis] + suffix.shape[axis], size)
        padding = [(0, 0)] * prefix.ndim
        padding[axis] = 0, room - width
        place = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis))
        whole = place(jnp.pad(prefix, padding), suffix, held)
        return jax.lax.slice_in_dim(whole, 0, size, axis=axis)

    def on_shard(
        prefix: Store, suffix: Store, lengths: Array, groups: Array, cells: tuple[Array, Array]
    ) -> Store:
        groups = groups % len(lengths)
        cells = cells[0] % suffix[0].keys.shape[1], cells[1]
        held = lengths[groups] - 1  # slots in the parent's prefix store

        @jax.jit  # so that stacks of one layer each are traced once
        def layer(stacks: tuple[KV, KV]) -> KV:
            prefix, suffix = stacks
            return KV(
                join(prefix.keys[groups], suffix.keys[cells], held, axis=-1),
                join(prefix.values[groups], suffix.values[cells], held, axis=-2),
            )

        # One layer at a time: to gather a whole cache at once would double its memory.
        return tuple(jax.lax.map(layer, stack) for stack in zip(prefix, suffix, strict=True))

    return _by_shard(on_shard, mesh, prefix, suffix, prefix_lengths, groups, cells, like=prefix)


# An argument of which only the place is used: the result is committed to its device, as other stores are. A
# program is compiled anew for the other kind.
@partial(jax.jit, static_argnames=("like", "groups", "rows", "size", "mesh"), keep_unused=True)
def empty(
    anchor: Array,
    *,
    like: Layout,
    groups: int,
    rows: int | None,
    size: int,
    mesh: Mesh | None = None,
) -> Store:
    """A zeroed store of M × K × S slots, or without rows of N × P."""

    def zeros(layers: int) -> KV:
        around = layers, groups, *(() if rows is None else (rows,)), like.heads
        shapes = (*around, like.width, size), (*around, size, like.width)
        return KV(*(jnp.zeros(shape, like.dtype) for shape in shapes))

    return constrain(tuple(map(zeros, like.stacks)), mesh)


@partial(jax.jit, static_argnames=("size", "mesh"))
def lift(store: Store, rows: tuple[Array, Array], *, size: int, mesh: Mesh | None = None) -> Store:
    """Some rows of a store, F × 1 × `size` slots; where its own are fewer, zeros behind them.

    `rows`: [F] both, their indices.
    """

    def on_shard(store: Store, rows: tuple[Array, Array]) -> Store:
        rows = _on_this_shard(store, rows)
        more = size - store[0].keys.shape[-1]

        def read(of: Array, axis: int) -> Array:
            found = of.at[:, *rows].get(mode="promise_in_bounds")[:, :, None]
            padding = [(0, 0)] * found.ndim
            padding[axis] = 0, more
            return jnp.pad(found, padding)

        @jax.jit  # so that stacks of one layer each are traced once
        def of_stack(stack: KV) -> KV:
            return KV(read(stack.keys, -1), read(stack.values, -2))

        return tuple(map(of_stack, store))

    return _by_shard(on_shard, mesh, store, rows, like=store)


@partial(jax.jit, static_argnames="mesh", donate_argnames="store")
def lay(
    store: Store,
    lifted: Store,
    rows: tuple[Array, Array],
    chosen: Array,
    *,
    mesh: Mesh | None = None,
) -> Store:
    """The store with those lifted rows that are `chosen` [F] written over its own, as wide as it is."""

    def on_shard(store: Store, lifted: Store, rows: tuple[Array, Array], chosen: Array) -> Store:
        first, second = _on_this_shard(store, rows)
        rows = jnp.where(chosen, first, store[0].keys.shape[1]), second  # out of range: dropped
        width = store[0].keys.shape[-1]

        @jax.jit
        def write(own: KV, new: KV) -> KV:
            return KV(
                own.keys.at[:, *rows].set(new.keys[:, :, 0, ..., :width], mode="drop"),
                own.values.at[:, *rows].set(new.values[:, :, 0, :, :width], mode="drop"),
            )

        return tuple(map(write, store, lifted))

    return _by_shard(on_shard, mesh, store, lifted, rows, chosen, like=store)


def taken(prefix: Store, groups: Array | None) -> Store:
    """The prefixes of `groups` [M], which count over all shards, on one of them; None: all as they are."""
    if groups is None:
        return prefix
    return jax.tree.map(lambda x: x[:, groups % x.shape[1]], prefix)


def slots_of(store: Store, window: int) -> Store:
    """The first slots of every row."""
    return tuple(KV(stack.keys[..., :window], stack.values[..., :window, :]) for stack in store)


def with_slots(store: Store, first: Store) -> Store:
    """The store with its rows' first slots written."""

    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, part, [0] * whole.ndim)

    return jax.tree.map(write, store, first)


@partial(jax.jit, donate_argnames="store")
def overwrite(store: Store, some: Store, groups: Array) -> Store:
    """The store with the groups of another written over `groups`; those out of range are dropped."""
    return jax.tree.map(lambda all, some: all.at[:, groups].set(some, mode="drop"), store, some)


def constrain(store: Store, mesh: Mesh | None) -> Store:
    """The store as it lies on a mesh."""
    if mesh is None:
        return store
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, cache_sharding(mesh, x.shape, HEAD_AXIS)),
        store,
    )


def _by_shard(function: Callable[..., Store], mesh: Mesh | None, *args: Any, like: Store) -> Store:
    """`function(*args)` where each shard has its part of all arrays; the result lies as `like` does."""
    if mesh is None:
        return function(*args)

    def spec(x: Array) -> PartitionSpec:
        stored = x.ndim > 1  # keys or values; the others are of groups or rows
        return (cache_sharding(mesh, x.shape, HEAD_AXIS) if stored else rows_sharding(mesh)).spec

    in_specs, out_specs = jax.tree.map(spec, args), jax.tree.map(spec, like)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(*args)


def _on_this_shard(store: Store, indices: tuple[Array, Array]) -> tuple[Array, Array]:
    """Indices that count over all shards -> those of a shard's part of the store."""
    return indices[0] % store[0].keys.shape[1], indices[1]
