"""The decoding loop: a jitted program, a pure function over pytrees.

    decode    prefixes and lanes' own slots       ─▶ more tokens a lane, own slots: M × K' times S

`decode` advances some rows of a round, its *lanes*, which attend to their first W slots. Which rows,
when, and through how wide a window is decided on the host (`schedule`), and what is moved for it
(`lanes`, `stores`). It changes no token, since a row's random numbers are named by the row itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxreset.models.attention import Attend, attend_by_heads, shared_prefix_attention
from jaxreset.models.decoder import Decoder, Standing, Store
from jaxreset.parallel import DATA_AXES, replicated
from jaxreset.sampling.rounds import StopReason
from jaxreset.sampling.stores import constrain, slots_of, taken, with_slots
from jaxreset.sampling.tokens import Draws, draw_token, draw_token_apart, row_uniforms
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


class Lanes(NamedTuple):
    """Rows of a round that decode together: M groups of K lanes that share a prefix.

    groups: [M] whose prefixes they share; None: of all groups, each in its place.
    prefix_lengths: [M] tokens of the prefix.  ids: [M] the prompt's global index.
    used: [M] kept tokens of the response, at the end of the prefix.
    numbers: [M, K] the row's number among its prompt's rows of this phase.
    last: [M, K] the token to feed.  lengths: [M, K] tokens drawn so far.
    progress: [M, K] of the response.  live: [M, K] False for lanes without a row.
    """

    groups: Leaf | None
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


@partial(jax.jit, static_argnames=("graph", "window", "mesh"), donate_argnames="own")
def decode(
    params: nnx.State,
    prefix: Store,
    own: Store,
    lanes: Lanes,
    automaton: StepAutomaton,
    limits: Limits,
    draws: Draws,
    leave: Leaf,
    *,
    graph: nnx.GraphDef,
    window: int,
    mesh: Mesh | None = None,
) -> tuple[Drawn, Store]:
    """Advances lanes until at most `leave` of them can go on; the others have ended or filled the window.

    Args:
      params: the decoder's.
      prefix: the round's, N × P slots.
      own: the lanes', M × K × S slots; donated.
      lanes: M groups of K.
      automaton, limits, draws: when rows end, and how tokens are drawn.
      leave: lanes that may be left able to go on.
      window: W, the slots of a lane that it attends to and fills. No live lane has more tokens.
      mesh: that the stores lie on. Its data shards decode side by side, and exchange nothing but how many
        lanes can go on.

    Returns:
      What was drawn, and `own` with the keys and values of all tokens that were fed.
    """
    args = params, prefix, own, lanes, automaton, limits, draws, leave
    on_shard = partial(_decode, graph=graph, window=window, mesh=mesh)
    if mesh is None:
        return on_shard(*args)
    whole, split, stored = PartitionSpec(), PartitionSpec(DATA_AXES), PartitionSpec(None, DATA_AXES)
    drawn, own = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(whole, stored, stored, split, whole, whole, whole, whole),
        out_specs=(Drawn._make([split] * 7 + [whole]), stored),
        axis_names=set(DATA_AXES),  # what is split over tensor is XLA's to see to
        check_vma=False,
    )(*args)
    # The host of every process reads all of what was drawn.
    return jax.lax.with_sharding_constraint(drawn, replicated(mesh)), constrain(own, mesh)


def _decode(
    params: nnx.State,
    prefix: Store,
    whole: Store,
    lanes: Lanes,
    automaton: StepAutomaton,
    limits: Limits,
    draws: Draws,
    leave: Leaf,
    *,
    graph: nnx.GraphDef,
    window: int,
    mesh: Mesh | None,
) -> tuple[Drawn, Store]:
    """`decode` on one data shard of the mesh, or on the only device."""
    model: Decoder = nnx.merge(graph, params)
    head, shared = model.head, taken(prefix, lanes.groups)
    narrow = window < whole[0].keys.shape[-1]
    own = slots_of(whole, window) if narrow else whole  # copied once and not at every token
    shape = lanes.live.shape
    used = lanes.used[:, None]
    lane_index = jnp.indices(shape)
    attend: Attend = shared_prefix_attention
    draw: Callable[..., tuple[Array, Array, Array]] = draw_token
    if mesh is not None:
        attend, draw = attend_by_heads(mesh), partial(draw_token_apart, mesh)

    def able(drawn: Drawn) -> Array:
        return (drawn.reasons == StopReason.RUNNING) & (drawn.lengths < window)

    def standing(lengths: Array) -> Standing:
        return model.standing(lengths, lanes.prefix_lengths - 1, window, shared[0].keys.shape[-1])

    def numbers(drawn: Drawn) -> Array:
        """Random numbers of the next tokens, `[DRAWN_AHEAD, M, K, 2]`; a lane that can go on goes on."""
        positions = (used + drawn.lengths)[..., None] + jnp.arange(DRAWN_AHEAD)
        ahead = row_uniforms(draws, lanes.ids, lanes.numbers, positions, zeros.dtype)
        return jnp.moveaxis(ahead, 2, 0)

    def going_on(state: tuple[Drawn, Store, Standing, Array]) -> Array:
        count = able(state[0]).sum()
        return (count if mesh is None else jax.lax.psum(count, DATA_AXES)) > leave

    def step(state: tuple[Drawn, Store, Standing, Array]) -> tuple[Drawn, Store, Standing, Array]:
        drawn, own, here, ahead = state
        live = able(drawn)
        ahead = jax.lax.cond(drawn.steps % DRAWN_AHEAD == 0, numbers, lambda drawn: ahead, drawn)
        # A lane that can't go on writes the slot after its last token, which nothing needs.
        hidden, own = model.decode(
            drawn.last, drawn.lengths, shared, lanes.prefix_lengths - 1, own, here, attend
        )
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.promote_types(head, jnp.float32))
        token, behavior, sampling = draw(logits, ahead[drawn.steps % DRAWN_AHEAD], draws)

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
        return drawn, own, standing(lengths), ahead

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
    state = start, own, standing(lanes.lengths), jnp.zeros((DRAWN_AHEAD, *shape, 2), zeros.dtype)
    drawn, own, _, _ = jax.lax.while_loop(going_on, step, state)
    return drawn, with_slots(whole, own) if narrow else own
