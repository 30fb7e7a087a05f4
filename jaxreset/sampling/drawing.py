"""Draws a round segment by segment: the host's side of `decoding.decode`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxreset.models.decoder import Store
from jaxreset.parallel import fetch
from jaxreset.sampling.decoding import Drawn, Lanes
from jaxreset.sampling.lanes import LaneCache
from jaxreset.sampling.rounds import NO_LIMIT, StopReason, StopRules
from jaxreset.sampling.schedule import Batch, Costs, LaneShape, next_batch
from jaxreset.steps import Progress, StepAutomaton, replay


class Start(NamedTuple):
    """Where each group's rows begin; all [N].

    prefix_lengths: tokens of the prefix.  last_tokens: its last one.  ids: the prompt's global index.
    first_rows: number of the group's first row among its prompt's rows of this phase.
    progress: of the response's kept tokens.  used: how many those are.
    most: tokens that a row may draw.  live: False for padding.
    """

    prefix_lengths: np.ndarray
    last_tokens: np.ndarray
    ids: np.ndarray
    first_rows: np.ndarray
    progress: Progress
    used: np.ndarray
    most: np.ndarray
    live: np.ndarray


def make_start(
    automaton: StepAutomaton,
    stop: StopRules,
    prefixes: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    ids: Sequence[int],
    first_rows: Sequence[int] | None,
) -> Start:
    """Where groups begin that go on from these prefixes, of which what is kept counts for the limits.

    `first_rows`: None: each 0.
    """
    count = len(prefixes)
    lengths = np.array([len(p) for p in prefixes], np.int32)
    used = lengths - np.asarray(prompt_lengths, np.int32)
    state, steps, step_tokens = np.zeros((3, count), np.int32)
    answered = np.zeros(count, bool)
    for n in np.flatnonzero(used).tolist():
        progress = replay(
            automaton,
            prefixes[n][prompt_lengths[n] :],
            max_step_tokens=stop.max_step_tokens or NO_LIMIT,
        )
        state[n], steps[n], step_tokens[n], answered[n] = progress
    return Start(
        prefix_lengths=lengths,
        last_tokens=np.array([p[-1] for p in prefixes], np.int32),
        ids=np.asarray(ids, np.int32),
        first_rows=np.asarray([0] * count if first_rows is None else first_rows, np.int32),
        progress=Progress(state, steps, step_tokens, answered),
        used=used,
        most=stop.max_response - used,
        live=used < stop.max_response,
    )


def pad_start(start: Start, groups: int, places: np.ndarray) -> Start:
    """The groups in their places among so many; the rows of the others have ended."""

    def pad(x: np.ndarray) -> np.ndarray:
        padded = np.zeros(groups, x.dtype)
        padded[places] = x
        return padded

    padded = jax.tree.map(pad, start)
    return padded._replace(prefix_lengths=np.maximum(padded.prefix_lengths, 1))


class Spent(NamedTuple):
    """What a round cost: decoding steps times lanes, idle ones too, and times prefixes read."""

    lane_steps: int = 0
    prefix_reads: int = 0


class Rows(NamedTuple):
    """The rows of a round as drawn so far: [N, K] and [N, K, S]; fields as in `decoding.Drawn`."""

    tokens: np.ndarray
    behavior_logps: np.ndarray
    sampling_logps: np.ndarray
    last: np.ndarray
    lengths: np.ndarray
    progress: Progress
    reasons: np.ndarray


Decode = Callable[[Store, Lanes, int, int], tuple[Drawn, Store]]  # window, leave


def draw_rows(
    decode: Decode,
    start: Start,
    cache: LaneCache,
    shapes: list[LaneShape],
    *,
    rows: int,
    size: int,
    prefix: int,
    costs: Costs,
    dtype: np.dtype,
    shards: int = 1,
) -> tuple[Rows, Spent]:
    """Decodes until every row has ended.

    Args:
      decode: `decoding.decode` with all but the lanes, their store, its window, and `leave`.
      start: of the round's groups.
      cache: of the round, empty; it holds its keys and values in the end.
      shapes, costs: see `schedule.next_batch`.
      rows, size, prefix: K, S and P.
      dtype: of log-probabilities.
      shards: that groups are split over.

    Returns:
      The rows, and what was spent.
    """
    state, spent, batch = _first(start, rows, size, dtype), Spent(), None
    while batch := next_batch(
        state.lengths,
        state.reasons == StopReason.RUNNING,
        start.most,
        shapes,
        prefix=prefix,
        costs=costs,
        before=batch,
        shards=shards,
    ):
        lanes = _lanes(start, state, batch)
        drawn, own = decode(cache.enter(batch), lanes, batch.shape.window, batch.leave)
        drawn = fetch(drawn)
        cache.leave(own, drawn.reasons != StopReason.RUNNING)
        _record(state, batch, drawn)
        steps = int(drawn.steps)
        spent = Spent(
            spent.lane_steps + steps * batch.live.size,
            spent.prefix_reads + steps * batch.shape.groups,
        )
    return state, spent


def idle_lanes(shape: LaneShape, *, in_place: bool) -> Lanes:
    """Lanes without a row: `decode` returns at once. `in_place`: of a batch of all rows."""
    m, k = shape.groups, shape.rows
    group, lane = np.zeros(m, np.int32), np.zeros((m, k), np.int32)
    none = np.zeros((m, k), bool)
    progress = Progress(lane, lane, lane, none)
    return Lanes(
        None if in_place else group, group + 1, group, group, lane, lane, lane, progress, none
    )


def _first(start: Start, rows: int, size: int, dtype: np.dtype) -> Rows:
    shape = (*start.live.shape, rows)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.repeat(x[:, None], rows, axis=1)

    return Rows(
        tokens=np.zeros((*shape, size), np.int32),
        behavior_logps=np.zeros((*shape, size), dtype),
        sampling_logps=np.zeros((*shape, size), dtype),
        last=spread(start.last_tokens),
        lengths=np.zeros(shape, np.int32),
        progress=jax.tree.map(spread, start.progress),
        reasons=spread(np.where(start.live, StopReason.RUNNING, StopReason.LENGTH)),
    )


def _lanes(start: Start, state: Rows, batch: Batch) -> Lanes:
    groups = batch.groups
    cells = groups[:, None], batch.rows
    return Lanes(
        groups=None if batch.in_place else groups,
        prefix_lengths=start.prefix_lengths[groups],
        ids=start.ids[groups],
        used=start.used[groups],
        numbers=start.first_rows[groups][:, None] + batch.rows,
        last=state.last[cells],
        lengths=state.lengths[cells],
        progress=jax.tree.map(lambda x: x[cells], state.progress),
        live=batch.live,
    )


def _record(state: Rows, batch: Batch, drawn: Drawn) -> None:
    """Writes what the lanes drew into the rows that they stood for."""
    lanes = np.nonzero(batch.live)
    cells = batch.groups[lanes[0]], batch.rows[lanes]
    slots = np.arange(batch.shape.window)
    new = (slots >= state.lengths[cells][:, None]) & (slots < drawn.lengths[lanes][:, None])
    which, slot = np.nonzero(new)
    for name in ("tokens", "behavior_logps", "sampling_logps"):
        values = getattr(drawn, name)[lanes]
        getattr(state, name)[cells[0][which], cells[1][which], slot] = values[which, slot]
    for name in ("last", "lengths", "reasons"):
        getattr(state, name)[cells] = getattr(drawn, name)[lanes]
    for old, values in zip(state.progress, drawn.progress, strict=True):
        old[cells] = values[lanes]
