"""Moving keys and values between stores: jitted programs, of which none crosses data shards.

    fork    a round's stores, rows and lengths  ─▶ prefix store: N' times P' slots
    take    prefixes of a round                 ─▶ prefixes of lanes
    load    rows of a page                      ─▶ rows of lanes
    save    rows of lanes                       ─▶ rows of a page

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

from jaxreset.models.decoder import KV, Store
from jaxreset.parallel import cache_sharding, rows_sharding

Array = jax.Array
Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit

HEAD_AXIS = -3  # of keys and values


class Moved(NamedTuple):
    """Rows on their way between lanes and a page, `[F]`; those not `chosen` stay where they are.

    Over a mesh the first `F / shards` are of the first shard, and so on.

    lanes: the two indices of each one's lane.  cells: those of its row on the page.
    """

    lanes: tuple[Leaf, Leaf]
    cells: tuple[Leaf, Leaf]
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

        def layer(stacks: tuple[KV, KV]) -> KV:
            prefix, suffix = stacks
            return KV(
                join(prefix.keys[groups], suffix.keys[cells], held, axis=-1),
                join(prefix.values[groups], suffix.values[cells], held, axis=-2),
            )

        # One layer at a time: to gather a whole cache at once would double its memory.
        return tuple(jax.lax.map(layer, stack) for stack in zip(prefix, suffix, strict=True))

    return _by_shard(on_shard, mesh, prefix, suffix, prefix_lengths, groups, cells, like=prefix)


# The prefix is kept as an argument so that the result is committed to its device where the prefix is:
# a program is compiled anew for the other kind.
@partial(jax.jit, static_argnames=("groups", "rows", "size", "mesh"), keep_unused=True)
def empty(prefix: Store, *, groups: int, rows: int, size: int, mesh: Mesh | None = None) -> Store:
    """A zeroed store of M × K × S slots beside a prefix store."""

    def zeros(stack: KV) -> KV:
        layers, _, heads, width, _ = stack.keys.shape
        around = layers, groups, rows, heads
        shapes = (*around, width, size), (*around, size, width)
        return KV(*(jnp.zeros(shape, stack.keys.dtype) for shape in shapes))

    return constrain(tuple(zeros(stack) for stack in prefix), mesh)


@partial(jax.jit, static_argnames=("size", "mesh"))
def widen(store: Store, *, size: int, mesh: Mesh | None = None) -> Store:
    """The store with zeroed slots behind its own, `size` in all."""

    def pad(stack: KV) -> KV:
        more = size - stack.keys.shape[-1]
        around = [(0, 0)] * (stack.keys.ndim - 2)
        return KV(
            jnp.pad(stack.keys, [*around, (0, 0), (0, more)]),
            jnp.pad(stack.values, [*around, (0, more), (0, 0)]),
        )

    return constrain(tuple(pad(stack) for stack in store), mesh)


# An argument of which only the memory is used: new memory costs more than what is written to it.
@partial(jax.jit, static_argnames=("size", "mesh"), donate_argnames="into", keep_unused=True)
def take(
    prefix: Store, groups: Array, into: Store | None, *, size: int, mesh: Mesh | None = None
) -> Store:
    """The first `size` slots of the prefixes of `groups` [M], in place of `into` (donated)."""

    def on_shard(prefix: Store, groups: Array) -> Store:
        groups = groups % prefix[0].keys.shape[1]
        return tuple(
            KV(stack.keys[:, groups, :, :, :size], stack.values[:, groups, :, :size])
            for stack in prefix
        )

    return _by_shard(on_shard, mesh, prefix, groups, like=prefix)


@partial(jax.jit, static_argnames="mesh", donate_argnames="own")
def load(page: Store, own: Store, moved: Moved, *, mesh: Mesh | None = None) -> Store:
    """The lanes' M × K × W slots, the first of some lanes read from their rows of a page."""

    def on_shard(page: Store, own: Store, moved: Moved) -> Store:
        lanes, cells = _on_this_shard(own, moved.lanes), _on_this_shard(page, moved.cells)
        lanes = _if_chosen(own, lanes, moved)
        window = page[0].keys.shape[-1]

        def read(stack: KV, own: KV) -> KV:
            keys, values = (rows.at[:, *cells].get(mode="promise_in_bounds") for rows in stack)
            return KV(
                own.keys.at[:, *lanes, :, :, :window].set(keys, mode="drop"),
                own.values.at[:, *lanes, :, :window].set(values, mode="drop"),
            )

        return tuple(read(*stacks) for stacks in zip(page, own, strict=True))

    return _by_shard(on_shard, mesh, page, own, moved, like=own)


@partial(jax.jit, static_argnames="mesh", donate_argnames="page")
def save(page: Store, own: Store, moved: Moved, *, mesh: Mesh | None = None) -> Store:
    """The page, some lanes' slots written to their rows; it is as wide as they are."""

    def on_shard(page: Store, own: Store, moved: Moved) -> Store:
        lanes, cells = _on_this_shard(own, moved.lanes), _on_this_shard(page, moved.cells)
        cells = _if_chosen(page, cells, moved)

        def write(rows: Array, own: Array) -> Array:
            left = own.at[:, *lanes].get(mode="promise_in_bounds")
            return rows.at[:, *cells].set(left, mode="drop")

        return jax.tree.map(write, page, own)

    return _by_shard(on_shard, mesh, page, own, moved, like=page)


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


def _if_chosen(store: Store, indices: tuple[Array, Array], moved: Moved) -> tuple[Array, Array]:
    """Those not chosen out of range, where nothing is written."""
    return jnp.where(moved.chosen, indices[0], store[0].keys.shape[1]), indices[1]
