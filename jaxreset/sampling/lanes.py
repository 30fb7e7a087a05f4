"""Where a round's keys and values are while it is drawn: in lanes, else in the suffix store.

A lane keeps what its row has drawn from segment to segment. A row that gives up its lane is written
to the store once, and read from it once if it goes on later. While all rows stand in their own places
there is no store: the lanes are the store, and only as wide as the longest row needs.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from jaxreset.models.decoder import Store
from jaxreset.sampling.decoding import Cells
from jaxreset.sampling.schedule import Batch, LaneShape


class Moves(Protocol):
    """Programs on keys and values; see `decoding`."""

    def empty(self, groups: int, rows: int, window: int) -> Store: ...
    def widen(self, store: Store, window: int) -> Store: ...
    def save(self, store: Store, own: Store, cells: Cells) -> Store: ...
    def load(self, store: Store, own: Store, cells: Cells) -> Store: ...
    def take(self, prefix: Store, groups: np.ndarray, window: int) -> Store: ...


class LaneCache:
    """Keys and values of N groups of K rows, S slots each at most.

    Args:
      moves: the programs.
      prefix: the groups' prefix store, only read.
      shape: (N, K), S.
    """

    def __init__(self, moves: Moves, prefix: Store, shape: tuple[int, int], size: int):
        self._moves = moves
        self._prefix = prefix
        self._shape = shape
        self._size = size
        self._store: Store | None = None
        self._batch: Batch | None = None
        self._own: Store | None = None
        self._shared: tuple[np.ndarray, int, Store] | None = None

    def enter(self, batch: Batch, lengths: np.ndarray) -> tuple[Store, Store]:
        """Brings the batch's rows into lanes; `lengths` [N, K] tokens that rows have drawn.

        Returns:
          The lanes' prefixes, M × P' slots, and their own, M × K' × W slots, to be used up and given
          back to `leave`.
        """
        before, own, window = self._batch, self._own, batch.shape.window
        if self._store is None and batch.in_place:
            if own is None:
                own = self._moves.empty(*self._shape, window)
            elif before is not None and before.shape.window < window:
                own = self._moves.widen(own, window)
        else:
            own = self._exchange(batch, lengths)
        self._batch, self._own = batch, None
        return self._prefixes(batch), own

    def leave(self, own: Store) -> None:
        """What decoding made of the lanes' stores."""
        self._own = own

    def finish(self) -> Store:
        """The suffix store of all rows, N × K × S slots."""
        if self._store is None:
            if self._own is None:
                return self._moves.empty(*self._shape, self._size)
            return self._moves.widen(self._own, self._size)
        if self._batch is not None and self._own is not None:
            cells = _cells(self._batch, self._batch.live)
            self._store = self._moves.save(self._store, self._own, cells)
        return self._store

    def _exchange(self, batch: Batch, lengths: np.ndarray) -> Store:
        """Rows that leave their lanes go to the store, those that come are read from it."""
        moves, before, own = self._moves, self._batch, self._own
        if self._store is None:
            if own is None:
                self._store = moves.empty(*self._shape, self._size)
            else:
                self._store = moves.widen(own, self._size)
            before = own = None
        stays = np.zeros_like(batch.live)
        if before is not None and own is not None:
            if same_lanes(before.shape, batch.shape):
                stays = batch.live & before.live & (before.rows == batch.rows)
                stays &= (before.groups == batch.groups)[:, None]
                leaving = before.live & ~stays
            else:
                leaving = before.live
            if leaving.any():
                self._store = moves.save(self._store, own, _cells(before, leaving))
            if not same_lanes(before.shape, batch.shape):
                own = None
        if own is None:
            own = moves.empty(batch.shape.groups, batch.shape.rows, batch.shape.window)
        drawn = lengths[batch.groups[:, None], batch.rows] > 0
        coming = batch.live & ~stays & drawn
        return moves.load(self._store, own, _cells(batch, coming)) if coming.any() else own

    def _prefixes(self, batch: Batch) -> Store:
        width = batch.shape.prefix
        if batch.in_place and width == self._prefix[0].keys.shape[-1]:
            return self._prefix
        if (
            self._shared is None
            or self._shared[1] != width
            or (self._shared[0].tolist() != batch.groups.tolist())
        ):
            taken = self._moves.take(self._prefix, batch.groups, width)
            self._shared = batch.groups, width, taken
        return self._shared[2]


def same_lanes(one: LaneShape, other: LaneShape) -> bool:
    """Whether lanes of one shape are lanes of the other; their prefixes may differ in width."""
    return one._replace(prefix=0) == other._replace(prefix=0)


def _cells(batch: Batch, chosen: np.ndarray) -> Cells:
    groups = np.broadcast_to(batch.groups[:, None], batch.rows.shape)
    return Cells(groups, batch.rows, chosen)
