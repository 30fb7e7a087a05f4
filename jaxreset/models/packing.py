"""Which group and which suffix the tokens of a packed batch are of.

N bins each hold P prefix slots, and K lanes of S slots. Several short prefixes lie end to end in the
prefix slots, and several short suffixes in a lane; ids keep them apart. A suffix sees its own tokens
and the prefix of its group.

    prefix slots   [ a a a a a b b b . ]      groups a, b
    lanes          [ a1 a1 a1 a2 a2 b2 ]      suffixes a1, a2, b1, b2
                   [ b1 b1 b1 b1 b1 .  ]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit


class Packing(NamedTuple):
    """All int32; positions count from the start of a group's prefix, ids from 1, and 0 is padding.

    Attributes:
      prefix_groups, prefix_positions: [N, P] of the prefix slots.
      groups, suffixes, positions: [N, K, S] of the lanes' slots. Ids of suffixes differ inside a lane.
    """

    prefix_groups: Leaf
    prefix_positions: Leaf
    groups: Leaf
    suffixes: Leaf
    positions: Leaf


def one_group_each(prefix_lengths: jax.Array, prefix: jax.Array, rows: jax.Array) -> Packing:
    """Of N groups of K rows, each in a bin and a lane of its own.

    Args:
      prefix_lengths: `[N]` int, the tokens of `prefix` that exist.
      prefix: `[N, P]`, right-padded.
      rows: `[N, K, S]`, right-padded: padding sees the row, and is seen by nothing in it.
    """
    slots, ones = jnp.arange(prefix.shape[-1]), jnp.ones(rows.shape, jnp.int32)
    exists = slots < prefix_lengths[:, None]
    positions = prefix_lengths[:, None, None] + jnp.arange(rows.shape[-1])
    return Packing(
        prefix_groups=exists.astype(jnp.int32),
        prefix_positions=jnp.broadcast_to(slots, prefix.shape),
        groups=ones,
        suffixes=ones,
        positions=jnp.broadcast_to(positions, rows.shape),
    )
