"""Which rows of a round decode together, and when. Plain numpy: nothing here runs on a device.

Responses have long tails: in a batch that is never changed, most lanes wait for the longest row. So
a round is decoded in segments. A segment advances some rows, its lanes, until enough of them have
ended or filled the window that they attend to; then the lanes are chosen anew. Rows that wait take
the place of rows that ended, and when none wait the batch shrinks.

    rows of a round   [ a a a a | b b b b | c c c c | d d d d ]      4 groups of 4
    first segment     [ a a a a | b b b b ]                          lanes: 2 groups of 4
    a later one       [ a a | b _ | c c | c c ]                      lanes: 4 groups of 2
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Every size takes a program of its own, which for 30 layers holds 65 MB of a CPU's memory: so they are few.
MIN_WINDOW = 48  # slots; a response of fewer than two such has no tail worth another program
MIN_PREFIX = 256  # slots; attending to all of a prefix of fewer than two such costs little
MIN_LANES = 16  # fewer make a step little cheaper
NARROW_PREFIX = 5 / 8  # of the prefix slots: all that groups of short prefixes attend to
FREED = 0.25  # share of lanes that must have ended before waiting rows take their place


class Costs(NamedTuple):
    """Time of a decoding step, in times of one row's matrix products.

    Attributes:
      step: of any step, however few its lanes.
      slot: of attending to one slot, of a prefix or of a lane.
    """

    step: float
    slot: float


class LaneShape(NamedTuple):
    """Sizes of one compiled `decode`: M groups of K lanes, W slots of each lane and P' of each prefix."""

    groups: int
    rows: int
    window: int
    prefix: int

    @property
    def own(self) -> tuple[int, int, int]:
        """Sizes of what the lanes hold themselves."""
        return self.groups, self.rows, self.window


class Batch(NamedTuple):
    """Lanes of the next segment.

    Attributes:
      shape: their sizes.
      groups: [M] group of the round.  rows: [M, K] row of that group.
      live: [M, K] False for lanes that have no row.
      leave: the segment ends when at most so many lanes can go on.
      in_place: the lanes are all rows of the round, each in its own place.
    """

    shape: LaneShape
    groups: np.ndarray
    rows: np.ndarray
    live: np.ndarray
    leave: int = 0
    in_place: bool = False


def windows(size: int, *, least: int) -> list[int]:
    """How many of `size` slots are attended to: ascending, each half of the next, all of them last.

    >>> windows(500, least=32)
    [63, 125, 250, 500]
    """
    widths = [size]
    while widths[-1] >= 2 * least:
        widths.append(-(-widths[-1] // 2))
    return widths[::-1]


def lane_shapes(
    groups: int, rows: int, prefix: int, size: int, *, slots: int | None = None, shards: int = 1
) -> list[LaneShape]:
    """All sizes that decoding a round may need.

    Args:
      groups, rows, prefix, size: N, K, P and S of the round.
      slots: most lanes at once, but at least a group on each shard; None: all rows.
      shards: of the group axis; each takes equally many groups.

    >>> [tuple(shape) for shape in lane_shapes(128, 8, 800, 50, slots=64)]
    [(8, 8, 50, 500), (8, 8, 50, 800)]
    >>> [tuple(shape) for shape in lane_shapes(2, 8, 100, 100)]
    [(2, 8, 50, 100), (2, 8, 100, 100)]
    """
    first = groups if slots is None else min(groups, slots // rows)
    first = max(first // shards, 1) * shards
    sizes = [(first, rows)]
    if size >= 2 * MIN_WINDOW:
        if first < groups and rows > 2:
            sizes.append((max(first * rows // (2 * shards), 1) * shards, 2))
        while True:
            m, k = sizes[-1]
            m, k = (m, k // 2) if k > 1 else (m // 2, k)
            if m * k < MIN_LANES or m < 1 or m % shards:
                break
            sizes.append((m, k))
    prefixes = [math.ceil(NARROW_PREFIX * prefix)] if prefix >= 2 * MIN_PREFIX else []
    prefixes.append(prefix)
    return [
        LaneShape(*lanes, window, width)
        for lanes in sizes
        for window in windows(size, least=MIN_WINDOW)
        # Few programs for the tail.
        for width in (prefixes if lanes == sizes[0] else prefixes[-1:])
    ]


def next_batch(
    lengths: np.ndarray,
    running: np.ndarray,
    most: np.ndarray,
    prefix_lengths: np.ndarray,
    shapes: list[LaneShape],
    *,
    costs: Costs,
    before: Batch | None = None,
    shards: int = 1,
) -> Batch | None:
    """The lanes of the next segment, or None when all rows have ended.

    Rows that still fit the narrowest window go first: long ones wait until they are among themselves.
    So do groups that may still become long, which late resets may not: lanes then end together.
    Of the shapes, the one is taken that costs least for each row that it advances.

    Args:
      lengths, running: [N, K] tokens drawn so far, and whether a row goes on.
      most: [N] tokens that a row of the group may draw.
      prefix_lengths: [N] tokens of the prefixes.
      shapes: of `lane_shapes`.
      before: the segment before: rows that go on stay in their lanes where the shape is the same.
      shards: that groups and lanes are split over, in equal runs: a group's lanes are on its own shard.
    """
    if not running.any():
        return None
    window = min(s.window for s in shapes if s.window > lengths[running].min())
    waiting = running & (lengths < window)
    order, fitting = np.argsort(-most, stable=True), {}
    best = None
    for shape in shapes:
        if shape.window != window:
            continue
        if shape.prefix not in fitting:
            fits = waiting & (prefix_lengths <= shape.prefix + 1)[:, None]
            members = [(group, np.flatnonzero(fits[group])) for group in order[fits[order].any(1)]]
            fitting[shape.prefix] = fits, members
        fits, members = fitting[shape.prefix]
        if not members:
            continue
        batch = _fill(fits, members, shape, shards)
        slots = shape.groups * (shape.prefix + shape.rows * window)
        cost = costs.step + shape.groups * shape.rows + slots * costs.slot
        per_row = cost / batch.live.sum()
        if best is None or per_row < best[0]:
            best = per_row, batch, int(fits.sum())
    assert best is not None  # some window is S and some prefix P, which every running row fits
    _, batch, candidates = best
    taken, lanes = int(batch.live.sum()), batch.live.size
    if taken < candidates:
        leave = int(taken * (1 - FREED))
    elif any(s.groups * s.rows < lanes for s in shapes):
        leave = lanes // 2
    else:
        leave = 0
    if before is not None and before.shape.own == batch.shape.own and not batch.in_place:
        batch = _stay(batch, before, len(lengths), shards)
    # At least a few rows must end before the lanes are chosen anew.
    return batch._replace(leave=max(min(leave, taken - -(-lanes // 16)), 0))


def _fill(
    waiting: np.ndarray, members: list[tuple[int, np.ndarray]], shape: LaneShape, shards: int
) -> Batch:
    """Rows of `waiting` [N, K] for the lanes of `shape`; a group may be cut in parts.

    `members`: those rows by group, in the order in which they take lanes.
    """
    m, k = shape.groups, shape.rows
    if (m, k) == waiting.shape:  # every row in its own place: nothing is moved
        rows = np.tile(np.arange(k, dtype=np.int32), (m, 1))
        return Batch(shape, np.arange(m, dtype=np.int32), rows, waiting, in_place=True)
    free = [iter(lanes) for lanes in np.split(np.arange(m), shards)]
    batch = _no_lanes(shape)
    for group, rows in members:
        lanes = free[group * shards // len(waiting)]
        for first, lane in zip(range(0, len(rows), k), lanes, strict=False):
            chosen = rows[first : first + k]
            batch.groups[lane] = group
            batch.rows[lane, : len(chosen)] = chosen
            batch.live[lane, : len(chosen)] = True
    return batch


def _no_lanes(shape: LaneShape) -> Batch:
    lanes = shape.groups, shape.rows
    return Batch(
        shape, np.zeros(lanes[0], np.int32), np.zeros(lanes, np.int32), np.zeros(lanes, bool)
    )


def _stay(batch: Batch, before: Batch, groups: int, shards: int) -> Batch:
    """The same rows, those that had a lane before in the same one where that is possible.

    `groups`: N, of the round.
    """
    home = {
        (int(before.groups[m]), int(before.rows[m, k])): (m, k)
        for m, k in np.argwhere(before.live).tolist()
    }
    kept = _no_lanes(batch.shape)
    lanes_a_shard = len(batch.groups) // shards
    free, strangers = set(range(len(batch.groups))), []

    def put(m: int, group: int, rows: list[int]) -> None:
        free.remove(m)
        kept.groups[m] = group
        at_home = {
            row: home[group, row][1] for row in rows if home.get((group, row), (-1,))[0] == m
        }
        places = iter(sorted(set(range(batch.shape.rows)) - set(at_home.values())))
        for row in rows:
            k = at_home[row] if row in at_home else next(places)
            kept.rows[m, k], kept.live[m, k] = row, True

    for m in np.flatnonzero(batch.live.any(axis=1)).tolist():
        group, rows = int(batch.groups[m]), batch.rows[m][batch.live[m]].tolist()
        lanes = {home[group, row][0] for row in rows if (group, row) in home} & free
        if lanes:
            put(min(lanes), group, rows)
        else:
            strangers.append((group, rows))
    for group, rows in strangers:
        shard = group * shards // groups
        put(min(m for m in free if m // lanes_a_shard == shard), group, rows)
    return kept._replace(leave=batch.leave)
