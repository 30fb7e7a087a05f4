"""Where a round's keys and values are while it is drawn: in lanes, else on pages.

A lane has room for a whole row, and keeps what it has drawn from segment to segment. A row that gives up
its lane is written to a page, whose rows are as wide as the window that the lane attended to, and read from
it if it goes on later. So what waits takes memory for what has been drawn, not for what might have been.
Lanes whose rows have all ended become a page as they are, and while all rows stand in their own places the
lanes are the only page.

Over a mesh lanes and pages are split over its data shards as the groups are, and a row's page is on its
group's shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from jaxreset.models.decoder import Store
from jaxreset.sampling.rounds import Pages
from jaxreset.sampling.schedule import Batch
from jaxreset.sampling.stores import Moved

PAGE_SLOTS = 2048  # of a shard, in all of its rows together
MOVED_ROWS = 8  # of a shard that one program moves

Pair = tuple[np.ndarray, np.ndarray]
Lanes = tuple[int, int]  # groups, and lanes of each


class Moves(Protocol):
    """Programs on keys and values; see `stores`."""

    def empty(self, groups: int, rows: int, slots: int) -> Store: ...
    def move(self, source: Store, target: Store, moved: Moved) -> Store: ...


class LaneCache:
    """Keys and values of a part of a round.

    Args:
      moves: the programs.
      shape: (N, K).
      size: S.
      full: (M, K') of a full batch, whose lanes may become a page.
      shards: that groups, lanes and pages are split over, in equal runs.
      hold: whether rows that have ended are kept, for `finish`.
    """

    def __init__(
        self,
        moves: Moves,
        shape: tuple[int, int],
        size: int,
        *,
        full: tuple[int, int],
        shards: int = 1,
        hold: bool = True,
    ):
        self._moves = moves
        self._shape = shape
        self._size = size
        self._full = full
        self._shards = shards
        self._hold = hold
        self._pages = Pages({}, np.full(shape, -1), np.zeros(shape, int))
        self._pages_made = 0
        # By window and shard.
        self._free: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._places: int | None = None  # the page of rows in their places
        self._batch: Batch | None = None
        self._own: Store | None = None  # of the batch
        self._ended = np.zeros(0, bool)  # lanes of the batch
        self._spare: tuple[Lanes, Store] | None = None  # lanes, as many as there were before

    def enter(self, batch: Batch) -> Store:
        """Brings the batch's rows into lanes.

        Returns:
          M × K' × S slots, to be used up and given back to `leave`.
        """
        own = self._own
        if not (batch.in_place and self._pages_made == 0):
            own = self._exchange(batch)
        elif own is None:
            own = self._moves.empty(*self._shape, self._size)
        self._batch, self._own = batch, None
        return own

    def leave(self, own: Store, ended: np.ndarray) -> None:
        """What decoding made of the lanes' stores, and [M, K'] whether a lane's row has ended."""
        self._own, self._ended = own, ended

    def finish(self) -> Pages | None:
        """All rows, on pages; None: nothing was drawn."""
        if self._own is not None and self._batch is not None:
            if self._batch.in_place and self._pages_made == 0:
                self._keep_in_place(self._own)
            else:
                self._put_away(self._own, self._batch)
        return self._pages if self._pages.stores else None

    def _exchange(self, batch: Batch) -> Store:
        """The lanes' stores after rows that leave were written to pages, and others read from them."""
        before, own, lanes = self._batch, self._own, batch.shape[:2]
        stays = np.zeros_like(batch.live)
        if before is not None and own is not None:
            if before.in_place and self._pages_made == 0:
                self._keep_in_place(own)
                own = None
            elif before.shape[:2] == lanes:
                stays = batch.live & before.live & (before.rows == batch.rows)
                stays &= (before.groups == batch.groups)[:, None]
            if own is not None and stays.any():
                self._write(own, before, before.live & ~stays)
            elif own is not None:
                own = self._reused(before.shape[:2], self._put_away(own, before), lanes)
        if own is None:
            own = self._moves.empty(*lanes, self._size)
        return self._read(own, batch, batch.live & ~stays)

    def _reused(self, lanes: Lanes, own: Store | None, wanted: Lanes) -> Store | None:
        """Lanes' stores of the size that is wanted, if there are any; `own`, of the last, may be kept."""
        there = [pair for pair in (self._spare, own and (lanes, own)) if pair]
        found = next((store for lanes, store in there if lanes == wanted), None)
        others = [pair for pair in there if pair[1] is not found]
        # Where rows start in their places lanes only become fewer, and none are used again.
        self._spare = others[-1] if others and self._full != self._shape else None
        return found

    def _keep_in_place(self, own: Store) -> None:
        self._places = self._add_page(own)
        gone = self._ended & (not self._hold)
        self._pages.page[:] = np.where(gone, -1, self._places)
        self._pages.cell[:] = np.arange(self._pages.cell.size).reshape(self._shape)

    def _add_page(self, store: Store) -> int:
        number, self._pages_made = self._pages_made, self._pages_made + 1
        self._pages.stores[number] = store
        return number

    def _put_away(self, own: Store, batch: Batch) -> Store | None:
        """All lanes -> pages; the lanes' stores, where they have not become a page themselves."""
        _, page, cell = self._pages
        live, ended = batch.live, self._ended
        whole = batch.shape == (*self._full, self._size) and 2 * live.sum() >= live.size
        if not (whole and self._hold and ended[live].all()):
            self._write(own, batch, live)
            return own
        rows = np.broadcast_to(batch.groups[:, None], live.shape)[live], batch.rows[live]
        page[rows], cell[rows] = self._add_page(own), np.flatnonzero(live)
        return None

    def _write(self, own: Store, batch: Batch, leaving: np.ndarray) -> None:
        """Lanes -> pages of their width; but for what nobody needs any more."""
        if not self._hold:
            leaving = leaving & ~self._ended
        stores, page, cell = self._pages
        window, lanes = batch.shape.window, np.argwhere(leaving)
        if self._places is not None:  # back to where they came from
            for m, k in lanes:
                row = batch.groups[m], batch.rows[m, k]
                page[row], cell[row] = self._places, row[0] * self._shape[1] + row[1]
            lanes = lanes[:0]
        shards = lanes[:, 0] * self._shards // len(leaving)
        free = [self._free[window, shard] for shard in range(self._shards)]
        while any(len(free[s]) < np.sum(shards == s) for s in range(self._shards)):
            rows = page_rows(window, self._shards)
            number = self._add_page(self._moves.empty(rows, 1, window))
            for i in range(rows):
                free[i * self._shards // rows].append((number, i))
        for (m, k), shard in zip(lanes, shards, strict=True):
            row = batch.groups[m], batch.rows[m, k]
            page[row], cell[row] = free[shard].pop(0)
        for number, moved in self._moved(batch, leaving):
            stores[number] = self._moves.move(own, stores[number], moved)

    def _read(self, own: Store, batch: Batch, coming: np.ndarray) -> Store:
        """Pages -> lanes; a row's cell is free afterwards, but for those of rows in their places."""
        stores, page, _ = self._pages
        coming = coming & (page[batch.groups[:, None], batch.rows] >= 0)
        for number, moved in self._moved(batch, coming):
            back = moved._replace(source=moved.target, target=moved.source)
            own = self._moves.move(stores[number], own, back)
            if number != self._places:
                rows, window = stores[number][0].keys.shape[1], stores[number][0].keys.shape[-1]
                for cell in moved.target[0][moved.chosen].tolist():
                    self._free[window, cell * self._shards // rows].append((number, cell))
        for m, k in np.argwhere(coming):
            page[batch.groups[m], batch.rows[m, k]] = -1
        self._drop_pages(batch.shape.window)
        return own

    def _drop_pages(self, window: int) -> None:
        """Lets go of pages without a row that are too narrow for those that go on, or hold places."""
        stores, page, _ = self._pages
        for number, store in list(stores.items()):
            narrow = store[0].keys.shape[-1] < window
            if (narrow or number == self._places) and not (page == number).any():
                del stores[number]
                self._places = None if number == self._places else self._places
                for cells in self._free.values():
                    cells[:] = [cell for cell in cells if cell[0] != number]

    def _moved(self, batch: Batch, chosen: np.ndarray) -> Iterator[tuple[int, Moved]]:
        """The chosen lanes, and where on each page their rows are, a few at a time."""
        rows = batch.groups[:, None], batch.rows
        page, cell = self._pages.page[rows], self._pages.cell[rows]
        for number in np.unique(page[chosen]).tolist():
            m, k = np.nonzero(chosen & (page == number))
            across = self._pages.stores[number][0].keys.shape[2]
            cells, shards = np.divmod(cell[m, k], across), m * self._shards // len(chosen)
            for moved in moves_of((m, k), cells, shards, count=self._shards):
                yield number, moved


def page_rows(window: int, shards: int = 1) -> int:
    """A of a page; its B is 1, but where all rows are in their places."""
    return max(PAGE_SLOTS // window, MOVED_ROWS) * shards


def moves_of(source: Pair, target: Pair, shards: np.ndarray, *, count: int = 1) -> Iterator[Moved]:
    """Rows, a few of each shard at a time; where there are none, one move of none.

    `shards`: that each row is on, of `count`.
    """
    every = np.stack([*source, *target]).astype(np.int32)
    waiting = [every[:, shards == shard] for shard in range(count)]
    for first in range(0, max(max(rows.shape[1] for rows in waiting), 1), MOVED_ROWS):
        moved = np.zeros((4, count, MOVED_ROWS), np.int32)
        chosen = np.zeros((count, MOVED_ROWS), bool)
        for shard, rows in enumerate(waiting):
            few = rows[:, first : first + MOVED_ROWS]
            moved[:, shard, : few.shape[1]] = few
            chosen[shard, : few.shape[1]] = True
        flat = moved.reshape(4, -1)
        yield Moved(tuple(flat[:2]), tuple(flat[2:]), chosen.ravel())
