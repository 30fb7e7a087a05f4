"""Where the groups of a round stand on a mesh: those that share keys and values share a data shard.

A round's stores have room for N groups, in equal runs, a run for each shard. Groups from prompts are
dealt evenly; a group that goes on from a held round stands where its parent does.

    parents of 2 shards   [ a b . . | c d . . ]
    their resets          [ a b . . | d . . . ]

Where there are more shards than groups, a group is cut: each part has some of its rows and a copy of its
prefix. Such a round isn't held, since its resets would need prefixes from other shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxreset.sampling.rounds import Shape


def cut_over(shape: Shape, shards: int) -> Shape:
    """A round's sizes where every shard has equally many groups, or parts of one.

    >>> [tuple(cut_over(Shape(groups, 4, 9, 9), 8))[:2] for groups in (9, 8, 4, 3, 1)]
    [(16, 4), (8, 4), (8, 2), (16, 1), (8, 1)]
    """
    parts = next(
        (n for n in range(1, shape.rows) if shape.rows % n == 0 and shape.groups * n >= shards),
        shape.rows if shape.groups < shards else 1,
    )
    groups = -(-shape.groups * parts // shards) * shards
    return shape._replace(groups=groups, rows=shape.rows // parts)


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
