"""Where a round's keys and values are while it is drawn: in lanes, else on pages.

A lane keeps what its row has drawn from segment to segment. A row that gives up its lane is written
to a page, whose rows are as wide as the lane's window, and read from it if it goes on later. So memory
follows what has been drawn, not what might have been. Lanes whose rows have all ended become a page as
they are, and while all rows stand in their own places the lanes are the only page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from jaxreset.models.decoder import Store
from jaxreset.sampling.decoding import Moved
from jaxreset.sampling.rounds import Pages
from jaxreset.sampling.schedule import Batch

PAGE_SLOTS = 2048  # in all of its rows together
MOVED_ROWS = 8  # that one program moves

Pair = tuple[np.ndarray, np.ndarray]


class Moves(Protocol):
    """Programs on keys and values; see `decoding`."""

    def empty(self, groups: int, rows: int, window: int) -> Store: ...
    def widen(self, store: Store, window: int) -> Store: ...
    def save(self, page: Store, own: Store, moved: Moved) -> Store: ...
    def load(self, page: Store, own: Store, moved: Moved) -> Store: ...
    def take(self, prefix: Store, groups: np.ndarray, into: Store | None, window: int) -> Store: ...


class LaneCache:
    """Keys and values of a part of a round.

    Args:
      moves: the programs.
      prefix: the groups' prefix store, only read.
      shape: (N, K).
      full: (M, K') of a full batch, whose lanes may become a page.
      shards: of the group axis.
      hold: whether rows that have ended are kept, for `finish`.
    """

    def __init__(
        self,
        moves: Moves,
        prefix: Store,
        shape: tuple[int, int],
        *,
        full: tuple[int, int],
        shards: int = 1,
        hold: bool = True,
    ):
        self._moves = moves
        self._prefix = prefix
        self._shape = shape
        self._full = full
        self._shards = shards
        self._hold = hold
        self._pages = Pages([], np.full(shape, -1), np.zeros(shape, int))
        self._free: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # by window
        self._places: int | None = None  # the page of rows in their places
        self._batch: Batch | None = None
        self._own: Store | None = None  # of the batch
        self._ended = np.zeros(0, bool)  # lanes of the batch
        self._spare: dict[tuple[int, int, int], Store] = {}  # lanes of other sizes
        self._taken: tuple[Batch, Store] | None = None

    def enter(self, batch: Batch) -> tuple[Store, Store]:
        """Brings the batch's rows into lanes.

        Returns:
          The lanes' prefixes, M × P' slots, and their own, M × K' × W slots, to be used up and given
          back to `leave`.
        """
        before, own, window = self._batch, self._own, batch.shape.window
        if not (batch.in_place and not self._pages.stores):
            own = self._exchange(batch)
        elif before is None or own is None:
            own = self._moves.empty(*self._shape, window)
        elif before.shape.window < window:
            own = self._moves.widen(own, window)
        self._batch, self._own = batch, None
        return self._prefixes(batch), own

    def leave(self, own: Store, ended: np.ndarray) -> None:
        """What decoding made of the lanes' stores, and [M, K'] whether a lane's row has ended."""
        self._own, self._ended = own, ended

    def finish(self) -> Pages | None:
        """All rows, on pages; None: nothing was drawn."""
        if self._own is not None and self._batch is not None:
            if self._batch.in_place and not self._pages.stores:
                self._keep_in_place(self._own)
            else:
                self._put_away(self._own, self._batch)
        return self._pages if self._pages.stores else None

    def _exchange(self, batch: Batch) -> Store:
        """The lanes' stores after rows that leave were written to pages, and others read from them."""
        before, own, shape = self._batch, self._own, batch.shape
        stays = np.zeros_like(batch.live)
        if before is not None and own is not None:
            if before.in_place and not self._pages.stores:
                self._keep_in_place(own)
                own = None
            elif before.shape.own == shape.own:
                stays = batch.live & before.live & (before.rows == batch.rows)
                stays &= (before.groups == batch.groups)[:, None]
            if own is not None and stays.any():
                self._write(own, before, before.live & ~stays)
            elif own is not None and (own := self._put_away(own, before)) is not None:
                self._spare[before.shape.own] = own
                own = None
        if own is None:
            own = self._spare.pop(shape.own, None) or self._moves.empty(*shape.own)
        return self._read(own, batch, batch.live & ~stays)

    def _keep_in_place(self, own: Store) -> None:
        self._places = len(self._pages.stores)
        self._pages.stores.append(own)
        self._pages.page[:] = 0
        self._pages.cell[:] = np.arange(self._pages.cell.size).reshape(self._shape)

    def _put_away(self, own: Store, batch: Batch) -> Store | None:
        """All lanes -> pages; the lanes' stores, where they have not become a page themselves."""
        stores, page, cell = self._pages
        live, ended = batch.live, self._ended
        whole = batch.shape[:2] == self._full and 2 * live.sum() >= live.size
        if not (whole and self._hold and ended[live].all()):
            self._write(own, batch, live)
            return own
        rows = np.broadcast_to(batch.groups[:, None], live.shape)[live], batch.rows[live]
        page[rows], cell[rows] = len(stores), np.flatnonzero(live)
        stores.append(own)
        return None

    def _write(self, own: Store, batch: Batch, leaving: np.ndarray) -> None:
        """Lanes -> pages of their width; but for what nobody needs any more."""
        if not self._hold:
            leaving = leaving & ~self._ended
        stores, page, cell = self._pages
        window, lanes = batch.shape.window, np.argwhere(leaving)
        free = self._free[window]
        while len(free) < len(lanes):
            rows = page_rows(window, self._shards)
            stores.append(self._moves.empty(rows, 1, window))
            free += [(len(stores) - 1, i) for i in range(rows)]
        for m, k in lanes:
            row = batch.groups[m], batch.rows[m, k]
            page[row], cell[row] = free.pop(0)
        for number, moved in self._moved(batch, leaving):
            stores[number] = self._moves.save(stores[number], own, moved)

    def _read(self, own: Store, batch: Batch, coming: np.ndarray) -> Store:
        """Pages -> lanes; a row's cell is free afterwards, but for those of rows in their places."""
        stores, page, _ = self._pages
        coming = coming & (page[batch.groups[:, None], batch.rows] >= 0)
        for number, moved in self._moved(batch, coming):
            own = self._moves.load(stores[number], own, moved)
            if number != self._places:
                window = stores[number][0].keys.shape[-1]
                cells = moved.cells[0][moved.chosen].tolist()
                self._free[window] += [(number, cell) for cell in cells]
        for m, k in np.argwhere(coming):
            page[batch.groups[m], batch.rows[m, k]] = -1
        return own

    def _moved(self, batch: Batch, chosen: np.ndarray) -> Iterator[tuple[int, Moved]]:
        """The chosen lanes and where on each page their rows are, a few at a time."""
        rows = batch.groups[:, None], batch.rows
        page, cell = self._pages.page[rows], self._pages.cell[rows]
        for number in np.unique(page[chosen]).tolist():
            m, k = np.nonzero(chosen & (page == number))
            across = self._pages.stores[number][0].keys.shape[2]
            for moved in moves_of((m, k), np.divmod(cell[m, k], across)):
                yield number, moved

    def _prefixes(self, batch: Batch) -> Store:
        width = batch.shape.prefix
        if batch.in_place and width == self._prefix[0].keys.shape[-1]:
            return self._prefix
        into = None
        if self._taken is not None:
            before, store = self._taken
            if (before.shape.groups, before.shape.prefix) == (batch.shape.groups, width):
                if before.groups.tolist() == batch.groups.tolist():
                    return store
                into = store
        store = self._moves.take(self._prefix, batch.groups, into, width)
        self._taken = batch, store
        return store


def page_rows(window: int, shards: int = 1) -> int:
    """A of a page; its B is 1, but where all rows are in their places."""
    return -(-max(PAGE_SLOTS // window, MOVED_ROWS) // shards) * shards


def moves_of(lanes: Pair, cells: Pair) -> Iterator[Moved]:
    """Rows, a few at a time; where there are none, one move of none."""
    every = np.stack([*lanes, *cells]).astype(np.int32)
    for first in range(0, max(every.shape[1], 1), MOVED_ROWS):
        few = every[:, first : first + MOVED_ROWS]
        padded = np.pad(few, ((0, 0), (0, MOVED_ROWS - few.shape[1])))
        yield Moved(tuple(padded[:2]), tuple(padded[2:]), np.arange(MOVED_ROWS) < few.shape[1])
