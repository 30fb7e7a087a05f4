"""Where the groups of a round stand on a mesh: those that share keys and values share a data shard.

A round's stores have room for N groups, in equal runs, a run for each shard. Groups from prompts are
dealt evenly; a group that goes on from a held round stands where its parent does.

    parents of 2 shards   [ a b . . | c d . . ]
    their resets          [ a b . . | d . . . ]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def dealt(count: int, shards: int) -> np.ndarray:
    """The shard of each of `count` groups, in runs of almost equal length."""
    return np.arange(count) * shards // max(count, 1)


def room_for(shard_of: Sequence[int] | np.ndarray, shards: int) -> int:
    """How many groups stores must have room for, so that each finds a place on its shard."""
    return int(np.bincount(shard_of, minlength=shards).max()) * shards


def places_on(shard_of: np.ndarray, size: int, shards: int) -> np.ndarray:
    """The place of each group among `size`, first come first served on its shard.

    >>> places_on(np.array([0, 1, 1, 0]), 8, 2)
    array([0, 4, 5, 1])
    """
    ranks = [int(np.sum(shard_of[:n] == shard)) for n, shard in enumerate(shard_of)]
    return shard_of * (size // shards) + np.array(ranks, int)
