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

from typing import NamedTuple

import numpy as np

# Every size takes a program of its own, which for 30 layers takes a CPU seconds to compile and holds 65 MB
# of its memory: so they are few.
MIN_WINDOW = 48  # slots; a response of fewer than two such has no tail worth another program
MIN_LANES = 16  # fewer make a step little cheaper
MOSTLY_OWN = (
    16  # rows' own slots over their prefix's, from which most time goes into reading their own
)
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
    """Sizes of one compiled `decode`: M groups of K lanes, which attend to W of their slots."""

    groups: int
    rows: int
    window: int


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


def lane_shapes(
    groups: int,
    rows: int,
    prefix: int,
    size: int,
    *,
    slots: int | None = None,
    shards: int = 1,
) -> list[LaneShape]:
    """All sizes that decoding a round may need.

    Where rows wait for lanes, those that are left of many groups find room in half as many lanes of more
    groups. Fewer lanes still are for the last and longest rows. Which windows there are: `windows`.

    Args:
      groups, rows, prefix, size: N, K, P and S of the round.
      slots: most lanes at once, but at least a group on each shard; None: all rows.
      shards: of the group axis; each takes equally many groups.

    >>> [tuple(shape) for shape in lane_shapes(128, 8, 64, 50, slots=64)]
    [(8, 8, 50)]
    >>> [tuple(shape) for shape in lane_shapes(8, 8, 400, 256, slots=32)]
    [(4, 8, 64), (4, 8, 256), (16, 1, 64), (16, 1, 256)]
    >>> [tuple(shape) for shape in lane_shapes(32, 8, 400, 200)]
    [(32, 8, 50), (32, 8, 200), (32, 2, 200), (16, 1, 200)]
    """
    first = groups if slots is None else min(groups, slots // rows)
    first = max(first // shards, 1) * shards
    full: list[tuple[int, int]] = [(first, rows)]
    last: list[tuple[int, int]] = []
    if size >= 2 * MIN_WINDOW:
        if first < groups and rows > 2:
            few = max(first * rows // (2 * shards), 1) * shards
            full.append((few, 2 if few > MIN_LANES else 1))
        while (fewer := _fewer((last or full)[-1], shards)) is not None:
            last.append(fewer)
    wide = windows(size, read=rows * size / prefix)
    some = wide if len(wide) > 2 else wide[-1:]  # of fewer lanes
    return [
        *(LaneShape(*lanes, width) for lanes in full for width in wide),
        *(LaneShape(*lanes, width) for lanes in last for width in some),
    ]


def windows(size: int, *, read: float) -> list[int]:
    """How many of their S slots rows attend to; none but S of fewer than `MIN_WINDOW`.

    `read`: of a group's slots that a step reads, the rows' own over the prefix's. The more they are, the
    more narrow windows save, and the more of them are worth compiling.

    >>> windows(4096, read=0.5), windows(4096, read=2), windows(4096, read=64)
    ([4096], [1024, 4096], [512, 2048, 4096])
    """
    shares = [] if read < 1 else [4] if read <= MOSTLY_OWN else [8, 2]
    parts = [-(-size // share) for share in shares]
    return [*(part for part in parts if part >= MIN_WINDOW), size]


def _fewer(lanes: tuple[int, int], shards: int) -> tuple[int, int] | None:
    """A quarter of the lanes, else half, first of a group's and then of the groups; None: they are few."""
    groups, rows = lanes
    for share in (4, 2):
        k = max(rows // share, 1)
        m = groups if rows >= share else groups * rows // share
        if m * k >= MIN_LANES and m % shards == 0 and m * k < groups * rows:
            return m, k
    return None


def next_batch(
    lengths: np.ndarray,
    running: np.ndarray,
    most: np.ndarray,
    shapes: list[LaneShape],
    *,
    prefix: int,
    costs: Costs,
    before: Batch | None = None,
    shards: int = 1,
) -> Batch | None:
    """The lanes of the next segment, or None when all rows have ended.

    Of the shapes, the one is taken that costs least for each row that it advances. A narrow window takes
    rows that fit it, and leaves long ones until they are among themselves. Groups that may still become
    long go first, which late resets may not: lanes then end together.

    Args:
      lengths, running: [N, K] tokens drawn so far, and whether a row goes on.
      most: [N] tokens that a row of the group may draw.
      shapes: of `lane_shapes`.
      prefix: P, slots that a group's prefix may have.
      before: the segment before: rows that go on stay in their lanes where there are as many.
      shards: that groups and lanes are split over, in equal runs: a group's lanes are on its own shard.
    """
    if not running.any():
        return None
    order = np.argsort(-most, stable=True)
    best = None
    for shape in shapes:
        fits = running & (lengths < shape.window)
        if not fits.any():
            continue
        members = [(group, np.flatnonzero(fits[group])) for group in order[fits[order].any(1)]]
        batch = _fill(fits, members, shape, shards)
        slots = shape.groups * (prefix + shape.rows * shape.window)
        cost = costs.step + shape.groups * shape.rows + slots * costs.slot
        per_row = cost / batch.live.sum()
        if best is None or per_row < best[0]:
            best = per_row, batch, int(fits.sum())
    assert best is not None  # some window is S, which every running row fits
    _, batch, candidates = best
    taken, lanes = int(batch.live.sum()), batch.live.size
    if taken < candidates:
        leave = int(taken * (1 - FREED))
    elif any(s.groups * s.rows < lanes for s in shapes):
        leave = lanes // 2
    else:
        leave = 0
    if before is not None and before.shape[:2] == batch.shape[:2] and not batch.in_place:
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
