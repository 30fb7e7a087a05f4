"""Rewards of a group made into advantages."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxreset.losses._arrays import Array, wide

Scale = Literal["std", "sample_std", "mean", "loo", "none"]


def group_advantages(rewards: Array, *, where: Array | None = None, scale: Scale = "std") -> Array:
    """Normalises rewards inside each group (the last axis).

    Rewards that are all the same, whatever they are, have no advantage: exactly 0. They are compared before
    anything is rounded, and what differs is computed in float32 at least.

    Args:
      rewards: `[..., K]`, the rewards of the K rollouts of each group; integers and booleans count as
        float32.
      where: `[..., K]` bool, False for entries that are padding: they neither count nor get an
        advantage, and may hold anything. A group may be empty.
      scale: what the centred rewards are divided by. `"std"`: the population standard deviation,
        0 where it is below 1e-8 (RRPO and SRPO, arXiv 2605.25507 appendix C). `"sample_std"`: the
        sample deviation (K - 1) plus 1e-6, the published GRPO baseline. `"mean"`: the group's mean
        reward, 0 where it isn't above 0 by more than rounding (MaxRL, arXiv 2602.02710). `"loo"`:
        (K - 1) / K, so that each reward is compared with the mean of the others, 0 in a group of one
        (leave-one-out, RLOO, arXiv 2402.14740). `"none"`: nothing. All but `"mean"` give the same
        for rewards that are all larger by the same.

    Returns:
      `[..., K]` advantages in the dtype of `rewards`; all NaN in a group where a reward, or the largest
      difference of two, isn't finite.

    Raises:
      ValueError: `scale` is none of these, or shapes that don't go together.

    >>> group_advantages(jnp.array([1.0, 0.0, 0.0, 1.0]))
    Array([ 1., -1., -1.,  1.], dtype=float32)
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}")
    given = jnp.asarray(rewards)
    if given.ndim == 0:
        raise ValueError("rewards has shape (), expected (..., K): the last axis is a group")
    rewards, valid = wide(given), jnp.ones(given.shape, bool)
    if where is not None:
        where = jnp.asarray(where, bool)
        if jnp.broadcast_shapes(where.shape, given.shape) != given.shape:
            raise ValueError(
                f"where has shape {where.shape}, expected {given.shape}, that of rewards"
            )
        valid = jnp.broadcast_to(where, given.shape)
    count = valid.sum(-1, keepdims=True)
    fixed = jax.lax.stop_gradient(rewards)
    axis: dict[str, Any] = {"axis": -1, "keepdims": True, "where": valid}
    low = jnp.where(count > 0, jnp.min(fixed, initial=jnp.inf, **axis), 0)
    high = jnp.where(count > 0, jnp.max(fixed, initial=-jnp.inf, **axis), 0)
    spread = high - low
    differ = spread > 0
    # From the lowest on, equal rewards are 0 and near ones keep their digits; squares can't overflow.
    unit = 1 if scale in ("loo", "none") else jnp.where(differ, spread, 1)
    placed = (jnp.where(valid, rewards, low) - low) / unit
    mean = placed.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    advantages = jnp.where(valid, placed - mean, 0)
    if scale == "loo":
        advantages *= count / jnp.maximum(count - 1, 1)
    elif scale == "mean":
        level = low + unit * mean
        # Of rewards below 0 and above it that cancel, rounding leaves a mean that says nothing.
        differ &= level > 32 * jnp.finfo(level.dtype).eps * jnp.maximum(-low, 0)
        advantages = jnp.where(differ, advantages * (unit / jnp.where(differ, level, 1)), 0)
    elif scale != "none":
        freedom = count if scale == "std" else count - 1
        variance = jnp.square(advantages).sum(-1, keepdims=True) / jnp.maximum(freedom, 1)
        std = jnp.sqrt(jnp.where(differ, variance, 1))  # a root has no slope at 0
        if scale == "std":
            differ &= unit * std >= 1e-8
        else:
            std += 1e-6 / unit
        advantages = jnp.where(differ, advantages / std, 0)
    spoilt = valid & ~jnp.isfinite(spread)
    dtype = given.dtype if jnp.issubdtype(given.dtype, jnp.floating) else rewards.dtype
    return jnp.where(spoilt, jnp.nan, advantages).astype(dtype)
