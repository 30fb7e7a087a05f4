"""Rotary position embeddings, with Llama 3's frequency scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling for contexts longer than the pretrained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class Rotation(NamedTuple):
    """Cosines and sines of rotary angles, `[..., T, D / 2]`, float32 at least."""

    cos: Array
    sin: Array


def rotation(
    positions: Array, *, width: int, theta: float, scaling: RopeScaling | None, dtype: str
) -> Rotation:
    """Of tokens at `positions` [..., T] for heads of `width` D; float32, or wider with `dtype`."""
    half, wide = width // 2, jnp.promote_types(dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    if scaling is not None:
        # Llama 3: long wavelengths are slowed by `factor`, short ones kept, those between blended.
        wavelengths = 2 * math.pi / frequencies
        span = scaling.high_freq_factor - scaling.low_freq_factor
        ratio = scaling.original_max_position / wavelengths
        kept = jnp.clip((ratio - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = positions[..., None].astype(wide) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Array, turn: Rotation) -> Array:
    """Rotary embedding of `x` [..., T, heads, D] (halves, not pairs)."""
    cos, sin = (part[..., None, :] for part in turn)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
