"""An advantage: a pure function of arrays, jitted.

loss: {advantage: "ranks:ranked"}
"""

from __future__ import annotations

import jax.numpy as jnp


def ranked(rewards, *, where):
    """How many of its group a rollout beats minus how many beat it, over their number: in [-1, 1].

    Args:
      rewards: [..., K].
      where: [..., K] bool, False on padding.
    """
    beats = (rewards[..., :, None] > rewards[..., None, :]) & where[..., None, :]
    beaten = (rewards[..., :, None] < rewards[..., None, :]) & where[..., None, :]
    difference = beats.sum(-1) - beaten.sum(-1)
    return jnp.where(where, difference / jnp.maximum(where.sum(-1, keepdims=True), 1), 0.0)
