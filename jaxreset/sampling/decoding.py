"""The sampler's jitted programs: prefill, fork, decode. Pure functions over pytrees.

    prefill   prompts [N, P]                      ─▶ prefix store [L, N, P, G, D]
    fork      a round's stores, rows and lengths  ─▶ prefix store [L, N', P', G, D]
    decode    prefix store, last tokens [N]       ─▶ tokens [N, K, S], suffix store [L, N, K, S, G, D]

A prefix of p tokens has p - 1 slots in its store: the last token is fed again by every row, into the
row's slot 0. So a prompt and a reset state start in the same way, and prefill needs no logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreset.models.decoder import KV, Decoder
from jaxreset.sampling.rounds import StopReason
from jaxreset.steps import Progress, StepAutomaton, advance

Array = jax.Array
Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit


class Draws(NamedTuple):
    """How tokens are drawn; scalars, traced, so that changing one compiles nothing.

    temperature: 0 takes the most likely token.
    top_p: in (0, 1]; 1 keeps all.  top_k: 0 keeps all.  max_new: tokens per row in this call.
    seed, step, phase: see `rounds.Stream`.
    """

    temperature: Leaf
    top_p: Leaf
    top_k: Leaf
    max_new: Leaf
    seed: Leaf
    step: Leaf
    phase: Leaf


class Limits(NamedTuple):
    """When a response ends; traced scalars, but for the ids `eos` [E] int32.

    `room`: a step is begun only where so many tokens are left.
    """

    max_response: Leaf
    max_steps: Leaf
    max_step_tokens: Leaf
    room: Leaf
    eos: Leaf


class Start(NamedTuple):
    """Where each group's rows begin; all [N].

    prefix_lengths: tokens of the prefix.  last_tokens: its last one.  ids: the prompt's global index.
    first_rows: number of the group's first row among its prompt's rows of this phase.
    progress: of the response's kept tokens.  used: how many those are.  live: False for padding.
    """

    prefix_lengths: Leaf
    last_tokens: Leaf
    ids: Leaf
    first_rows: Leaf
    progress: Progress
    used: Leaf
    live: Leaf


class Drawn(NamedTuple):
    """Result of `decode`: fields as in `rounds.Round`."""

    tokens: Array
    lengths: Array
    behavior_logps: Array
    sampling_logps: Array
    reasons: Array


@partial(jax.jit, static_argnames="graph")
def prefill(params: nnx.State, tokens: Array, *, graph: nnx.GraphDef) -> KV:
    """Prefix store of right-padded prompts `[N, P]`."""
    return nnx.merge(graph, params).prefill(tokens)


@partial(jax.jit, static_argnames="size")
def fork(
    prefix: KV, suffix: KV, prefix_lengths: Array, groups: Array, rows: Array, *, size: int
) -> KV:
    """Prefix stores of `size` slots for reset groups, gathered once per group from a round's stores.

    Args:
      prefix, suffix: `[L, N, P, G, D]` and `[L, N, K, S, G, D]`, the parent round's.
      prefix_lengths: `[N]` int, tokens of the parent's prefixes.
      groups, rows: `[N']` int, the row of the parent that each new group goes back to. Slots past the
        snapshot's length hold the row's later tokens, or garbage; attention masks them.
      size: slots of the new stores.
    """
    slots = jnp.arange(size)[None]  # [1, P']
    held = prefix_lengths[groups][:, None] - 1  # slots in the parent's prefix store
    from_prefix = (slots < held)[..., None, None]
    in_prefix = jnp.minimum(slots, prefix.keys.shape[2] - 1)
    in_suffix = jnp.clip(slots - held, 0, suffix.keys.shape[3] - 1)

    def layer(stores: tuple[Array, Array]) -> Array:
        shared, own = stores
        group, row = groups[:, None], rows[:, None]
        return jnp.where(from_prefix, shared[group, in_prefix], own[group, row, in_suffix])

    # One layer at a time: a gather of the whole cache at once would double its memory.
    return KV(
        jax.lax.map(layer, (prefix.keys, suffix.keys)),
        jax.lax.map(layer, (prefix.values, suffix.values)),
    )


@partial(jax.jit, static_argnames=("graph", "rows", "size"))
def decode(
    params: nnx.State,
    prefix: KV,
    start: Start,
    automaton: StepAutomaton,
    limits: Limits,
    draws: Draws,
    *,
    graph: nnx.GraphDef,
    rows: int,
    size: int,
) -> tuple[Drawn, KV]:
    """Draws `rows` suffixes of at most `size` tokens for each group; stops when all have ended."""
    model: Decoder = nnx.merge(graph, params)
    groups = start.live.shape[0]
    shape = (groups, rows)
    head = model.head
    keys = _row_keys(draws, start.ids, start.first_rows[:, None] + jnp.arange(rows))
    group_index, row_index = jnp.indices(shape)

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], shape)

    class State(NamedTuple):
        drawn: Drawn
        last: Array
        progress: Progress
        suffix: KV

    def unfinished(state: State) -> Array:
        return (state.drawn.reasons == StopReason.RUNNING).any()

    def step(state: State) -> State:
        drawn = state.drawn
        live = drawn.reasons == StopReason.RUNNING
        # Finished rows rewrite the slot after their last token, which no snapshot needs.
        hidden, suffix = model.decode(
            state.last, drawn.lengths, prefix, start.prefix_lengths - 1, state.suffix
        )
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.promote_types(head, jnp.float32))
        position = spread(start.used) + drawn.lengths
        token, behavior, sampling = draw_token(logits, keys, position, draws)

        progress, step_ended, stopped = advance(
            automaton, state.progress, token, max_step_tokens=limits.max_step_tokens
        )
        lengths = drawn.lengths + live
        total = spread(start.used) + lengths
        reason = jnp.select(
            [
                (token[..., None] == limits.eos).any(-1),
                stopped,
                step_ended & progress.answered,
                step_ended & (progress.steps >= limits.max_steps),
                step_ended & (limits.max_response - total < limits.room),
                (lengths >= jnp.minimum(draws.max_new, size)) | (total >= limits.max_response),
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
        slot = jnp.where(live, drawn.lengths, size)  # out of range: not written

        def write(buffer: Array, value: Array) -> Array:
            value = value.astype(buffer.dtype)
            return buffer.at[group_index, row_index, slot].set(value, mode="drop")

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(live, new, old).astype(old.dtype)

        return State(
            Drawn(
                tokens=write(drawn.tokens, token),
                lengths=lengths,
                behavior_logps=write(drawn.behavior_logps, behavior),
                sampling_logps=write(drawn.sampling_logps, sampling),
                reasons=keep(reason, drawn.reasons),
            ),
            last=keep(token, state.last),
            progress=jax.tree.map(keep, progress, state.progress),
            suffix=suffix,
        )

    zeros = jnp.zeros((*shape, size), jnp.promote_types(head.dtype, jnp.float32))
    initial = State(
        Drawn(
            tokens=jnp.zeros((*shape, size), jnp.int32),
            lengths=jnp.zeros(shape, jnp.int32),
            behavior_logps=zeros,
            sampling_logps=zeros,
            reasons=spread(jnp.where(start.live, StopReason.RUNNING, StopReason.LENGTH)),
        ),
        last=spread(start.last_tokens),
        progress=jax.tree.map(spread, start.progress),
        suffix=model.empty_cache(groups, rows, size),
    )
    final = jax.lax.while_loop(unfinished, step, initial)
    return final.drawn, final.suffix


def _row_keys(draws: Draws, ids: Array, rows: Array) -> Array:
    """`ids` [N], `rows` [N, K] -> `[N, K]` keys that depend on prompt and row, not on the batch."""
    key = jax.random.fold_in(jax.random.key(draws.seed), draws.step)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    phases = fold(jax.vmap(partial(jax.random.fold_in, key))(ids), draws.phase)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(phases, rows)


def draw_token(
    logits: Array, keys: Array, position: Array, draws: Draws
) -> tuple[Array, Array, Array]:
    """Draws one token a row.

    Args:
      logits: `[N, K, V]` float32.
      keys: `[N, K]` row keys.  position: `[N, K]` index in the response, folded into the key.

    Returns:
      `[N, K]` int32 tokens, their log-softmax(logits / T), and the same after top-k and top-p. For a
      temperature of 0, the most likely token, and its log-probabilities at temperature 1.
    """
    greedy = draws.temperature <= 0
    scaled = logits / jnp.where(greedy, 1, draws.temperature)
    logps = jax.nn.log_softmax(scaled, axis=-1)
    truncates = (draws.top_k > 0) | (draws.top_p < 1)
    kept = jax.lax.cond(truncates, truncate, lambda x, _: x, logps, draws)

    def noise(key: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[-1:], logits.dtype)

    def perturbed() -> Array:
        return jnp.argmax(kept + jax.vmap(jax.vmap(noise))(keys, position), axis=-1)

    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), perturbed).astype(jnp.int32)

    def at_token(values: Array) -> Array:
        return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]

    return token, at_token(logps), at_token(kept)


def truncate(logps: Array, draws: Draws) -> Array:
    """Renormalised log-probabilities after top-k, then top-p; -inf where cut. `[..., V]`.

    top-p keeps the smallest set of most likely tokens whose (top-k renormalised) probability reaches
    `top_p`. Tokens that tie with the last one kept are kept too.
    """
    ordered = -jnp.sort(-logps, axis=-1)
    rank = jnp.arange(logps.shape[-1])
    by_k = jnp.where((draws.top_k <= 0) | (rank < draws.top_k), ordered, -jnp.inf)
    probabilities = jax.nn.softmax(by_k, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the more likely ones
    # The most likely token always stays, whatever rounding does to a tiny top_p.
    kept = (((before < draws.top_p) | (draws.top_p >= 1)) & (by_k > -jnp.inf)).at[..., 0].set(True)
    last = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(logps >= last, logps, -jnp.inf), axis=-1)
