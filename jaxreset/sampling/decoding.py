"""The sampler's jitted programs: prefill, fork, decode. Pure functions over pytrees.

    prefill   prompts [N, P]                      ─▶ prefix store: N times P slots
    fork      a round's stores, rows and lengths  ─▶ prefix store: N' times P' slots
    extend    a prefix store, tokens [N, Q]       ─▶ prefix store with their slots filled
    decode    lanes' prefixes and own slots       ─▶ more tokens a lane, own slots: M × K' times W

A prefix of p tokens has p - 1 slots in its store: the last token is fed again by every row, into the
row's slot 0. So a prompt and a reset state start in the same way, and prefill needs no logits.

`decode` advances some rows of a round, its *lanes*, which attend to their first W slots. Which rows,
when, and through how wide a window is decided on the host (`schedule`), and what is moved for it
(`lanes`). It changes no token, since a row's random numbers are named by the row itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxreset.models.decoder import KV, Decoder, Place, Store
from jaxreset.parallel import cache_sharding
from jaxreset.sampling.rounds import StopReason
from jaxreset.sampling.tokens import Draws, draw_token, row_keys, row_uniforms
from jaxreset.steps import Progress, StepAutomaton, advance

Array = jax.Array
Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit

DRAWN_AHEAD = 16  # steps whose random numbers are computed at once: a loop costs as much for one


class Limits(NamedTuple):
    """When a response ends; traced scalars, but for the ids `eos` [E] int32.

    `room`: a step is begun only where so many tokens are left.
    """

    max_response: Leaf
    max_steps: Leaf
    max_step_tokens: Leaf
    room: Leaf
    eos: Leaf


class Moved(NamedTuple):
    """Rows on their way between lanes and a page, `[F]`; those not `chosen` stay where they are.

    lanes: the two indices of each one's lane.  cells: those of its row on the page.
    """

    lanes: tuple[Leaf, Leaf]
    cells: tuple[Leaf, Leaf]
    chosen: Leaf


class Lanes(NamedTuple):
    """Rows of a round that decode together: M groups of K lanes that share a prefix.

    prefix_lengths: [M] tokens of the prefix.  ids: [M] the prompt's global index.
    used: [M] kept tokens of the response, at the end of the prefix.
    numbers: [M, K] the row's number among its prompt's rows of this phase.
    last: [M, K] the token to feed.  lengths: [M, K] tokens drawn so far.
    progress: [M, K] of the response.  live: [M, K] False for lanes without a row.
    """

    prefix_lengths: Leaf
    ids: Leaf
    used: Leaf
    numbers: Leaf
    last: Leaf
    lengths: Leaf
    progress: Progress
    live: Leaf


class Drawn(NamedTuple):
    """Result of `decode`.

    tokens, behavior_logps, sampling_logps: [M, K, W] at the slots that this call drew; 0 elsewhere.
    last, lengths, progress: as in `Lanes`, after this call.  reasons: [M, K] `StopReason`.
    steps: scalar, how often the lanes stepped.
    """

    tokens: Array
    behavior_logps: Array
    sampling_logps: Array
    last: Array
    lengths: Array
    progress: Progress
    reasons: Array
    steps: Array


@partial(jax.jit, static_argnames=("graph", "mesh"))
def prefill(
    params: nnx.State, tokens: Array, *, graph: nnx.GraphDef, mesh: Mesh | None = None
) -> Store:
    """The prefix store of right-padded prompts `[N, P]`."""
    return _constrain(nnx.merge(graph, params).prefill(tokens), mesh)


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
      groups: `[N']` int, the parent of each new group.
      cells: [N'] the row on the page. Slots past the snapshot's length hold the row's later tokens,
        or garbage; attention masks them.
      size: slots of the new stores.
    """
    held = prefix_lengths[groups] - 1  # slots in the parent's prefix store

    def join(prefix: Array, suffix: Array, axis: int) -> Array:
        """Each group's prefix, and its row's slots written behind what the prefix holds."""
        # Room for them all: where they don't fit, XLA would write them further ahead.
        width, room = prefix.shape[axis], max(prefix.shape[axis] + suffix.shape[axis], size)
        padding = [(0, 0)] * prefix.ndim
        padding[axis] = 0, room - width
        place = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis))
        whole = place(jnp.pad(prefix[groups], padding), suffix[cells], held)
        return jax.lax.slice_in_dim(whole, 0, size, axis=axis)

    def layer(prefix: KV, suffix: KV) -> KV:
        return KV(
            join(prefix.keys, suffix.keys, axis=-1), join(prefix.values, suffix.values, axis=-2)
        )

    # One layer at a time: to gather a whole cache at once would double its memory.
    stacks = zip(prefix, suffix, strict=True)
    forked = tuple(jax.lax.map(lambda layers: layer(*layers), stack) for stack in stacks)
    return _constrain(forked, mesh)


@partial(jax.jit, static_argnames=("graph", "mesh"))
def extend(
    params: nnx.State,
    prefix: Store,
    prefix_lengths: Array,
    tokens: Array,
    *,
    graph: nnx.GraphDef,
    mesh: Mesh | None = None,
) -> Store:
    """The prefix store with more tokens behind each prefix; only those run through the network.

    Args:
      params: the decoder's.
      prefix: N × P slots, with room for the tokens.
      prefix_lengths: `[N]` int, tokens of the prefixes.
      tokens: `[N, Q]` the prefix's last token and those behind it, but for the last; right-padded.
    """
    model: Decoder = nnx.merge(graph, params)
    added = model.extend(tokens, prefix, prefix_lengths - 1)
    groups, size = jnp.arange(len(tokens)), prefix[0].keys.shape[-1]
    cells = groups, jnp.zeros_like(groups)
    return fork(prefix, added, prefix_lengths, groups, cells, size=size, mesh=mesh)


# Moves of keys and values between lanes and pages; see `lanes`.


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

    return _constrain(tuple(zeros(stack) for stack in prefix), mesh)


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

    return _constrain(tuple(pad(stack) for stack in store), mesh)


# An argument of which only the memory is used: new memory costs more than what is written to it.
@partial(jax.jit, static_argnames=("size", "mesh"), donate_argnames="into", keep_unused=True)
def take(
    prefix: Store, groups: Array, into: Store | None, *, size: int, mesh: Mesh | None = None
) -> Store:
    """The first `size` slots of the prefixes of `groups` [M], in place of `into` (donated)."""
    return _constrain(
        tuple(
            KV(stack.keys[:, groups, :, :, :size], stack.values[:, groups, :, :size])
            for stack in prefix
        ),
        mesh,
    )


@partial(jax.jit, static_argnames="mesh", donate_argnames="own")
def load(page: Store, own: Store, moved: Moved, *, mesh: Mesh | None = None) -> Store:
    """The lanes' M × K × W slots, the first of some lanes read from their rows of a page."""
    nowhere = own[0].keys.shape[1]  # out of range: not written
    lane = jnp.where(moved.chosen, moved.lanes[0], nowhere), moved.lanes[1]
    window = page[0].keys.shape[-1]

    def read(stack: KV, own: KV) -> KV:
        keys, values = (rows.at[:, *moved.cells].get(mode="promise_in_bounds") for rows in stack)
        return KV(
            own.keys.at[:, *lane, :, :, :window].set(keys, mode="drop"),
            own.values.at[:, *lane, :, :window].set(values, mode="drop"),
        )

    return _constrain(tuple(read(*stacks) for stacks in zip(page, own, strict=True)), mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="page")
def save(page: Store, own: Store, moved: Moved, *, mesh: Mesh | None = None) -> Store:
    """The page, some lanes' slots written to their rows; it is as wide as they are."""
    nowhere = page[0].keys.shape[1]  # out of range: not written
    cell = jnp.where(moved.chosen, moved.cells[0], nowhere), moved.cells[1]

    def write(rows: Array, own: Array) -> Array:
        left = own.at[:, *moved.lanes].get(mode="promise_in_bounds")
        return rows.at[:, *cell].set(left, mode="drop")

    return _constrain(jax.tree.map(write, page, own), mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="store")
def overwrite(store: Store, some: Store, groups: Array, *, mesh: Mesh | None = None) -> Store:
    """The store with the groups of another written over `groups`; those out of range are dropped."""
    written = jax.tree.map(lambda all, some: all.at[:, groups].set(some, mode="drop"), store, some)
    return _constrain(written, mesh)


@partial(jax.jit, static_argnames=("graph", "mesh"), donate_argnames="own")
def decode(
    params: nnx.State,
    shared: Store,
    own: Store,
    lanes: Lanes,
    automaton: StepAutomaton,
    limits: Limits,
    draws: Draws,
    leave: Leaf,
    *,
    graph: nnx.GraphDef,
    mesh: Mesh | None = None,
) -> tuple[Drawn, Store]:
    """Advances lanes until at most `leave` of them can go on; the others have ended or filled the window.

    Args:
      params: the decoder's.
      shared, own: the lanes' prefixes, M × P slots, and their own, M × K × W slots; `own` is donated.
        No live lane has more than W tokens.
      lanes: M groups of K.
      automaton, limits, draws: when rows end, and how tokens are drawn.
      leave: lanes that may be left able to go on.
      mesh: that the stores lie on.

    Returns:
      What was drawn, and `own` with the keys and values of all tokens that were fed.
    """
    model: Decoder = nnx.merge(graph, params)
    head, window = model.head, own[0].keys.shape[-1]
    shape = lanes.live.shape
    keys = row_keys(draws, lanes.ids, lanes.numbers)
    used = lanes.used[:, None]
    lane_index = jnp.indices(shape)

    def able(drawn: Drawn) -> Array:
        return (drawn.reasons == StopReason.RUNNING) & (drawn.lengths < window)

    def place(lengths: Array) -> Place:
        return model.place(lengths, lanes.prefix_lengths - 1, window)

    def numbers(drawn: Drawn) -> Array:
        """Random numbers of the next tokens, `[DRAWN_AHEAD, M, K, 2]`; a lane that can go on goes on."""
        positions = (used + drawn.lengths)[..., None] + jnp.arange(DRAWN_AHEAD)
        return jnp.moveaxis(row_uniforms(keys, positions, zeros.dtype), 2, 0)

    def going_on(state: tuple[Drawn, Store, Place, Array]) -> Array:
        return able(state[0]).sum() > leave

    def step(state: tuple[Drawn, Store, Place, Array]) -> tuple[Drawn, Store, Place, Array]:
        drawn, own, here, ahead = state
        live = able(drawn)
        ahead = jax.lax.cond(drawn.steps % DRAWN_AHEAD == 0, numbers, lambda drawn: ahead, drawn)
        # A lane that can't go on writes the slot after its last token, which nothing needs.
        hidden, own = model.decode(
            drawn.last, drawn.lengths, shared, lanes.prefix_lengths - 1, own, here
        )
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.promote_types(head, jnp.float32))
        token, behavior, sampling = draw_token(logits, ahead[drawn.steps % DRAWN_AHEAD], draws)

        progress, step_ended, stopped = advance(
            automaton, drawn.progress, token, max_step_tokens=limits.max_step_tokens
        )
        lengths = drawn.lengths + live
        total = used + lengths
        reason = jnp.select(
            [
                (token[..., None] == limits.eos).any(-1),
                stopped,
                step_ended & progress.answered,
                step_ended & (progress.steps >= limits.max_steps),
                step_ended & (limits.max_response - total < limits.room),
                (lengths >= draws.max_new) | (total >= limits.max_response),
            ],
            [
                StopReason.EOS,
                StopReason.STOP_STRING,
                StopReason.ANSWER,
                StopReason.STEPS,
                StopReason.BUDGET,
                StopReason.LENGTH,
            ],
            StopReason.RUNNING,
        )
        slot = jnp.where(live, drawn.lengths, window)  # out of range: not written

        def write(buffer: Array, value: Array) -> Array:
            value = value.astype(buffer.dtype)
            return buffer.at[*lane_index, slot].set(value, mode="drop")

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(live, new, old).astype(old.dtype)

        drawn = Drawn(
            tokens=write(drawn.tokens, token),
            behavior_logps=write(drawn.behavior_logps, behavior),
            sampling_logps=write(drawn.sampling_logps, sampling),
            last=keep(token, drawn.last),
            lengths=lengths,
            progress=jax.tree.map(keep, progress, drawn.progress),
            reasons=keep(reason, drawn.reasons),
            steps=drawn.steps + 1,
        )
        return drawn, own, place(lengths), ahead

    zeros = jnp.zeros((*shape, window), jnp.promote_types(head.dtype, jnp.float32))
    start = Drawn(
        tokens=jnp.zeros((*shape, window), jnp.int32),
        behavior_logps=zeros,
        sampling_logps=zeros,
        last=lanes.last,
        lengths=lanes.lengths,
        progress=lanes.progress,
        reasons=jnp.where(lanes.live, StopReason.RUNNING, StopReason.LENGTH),
        steps=jnp.int32(0),
    )
    state = start, own, place(lanes.lengths), jnp.zeros((DRAWN_AHEAD, *shape, 2), zeros.dtype)
    drawn, own, _, _ = jax.lax.while_loop(going_on, step, state)
    return drawn, _constrain(own, mesh)


def _constrain(cache: Store, mesh: Mesh | None) -> Store:
    if mesh is None:
        return cache
    return jax.tree.map(
        lambda store: jax.lax.with_sharding_constraint(
            store, cache_sharding(mesh, store.shape, head_axis=-3)
        ),
        cache,
    )
