"""Rotary position embeddings, with the frequency scalings of Llama 3 and of YaRN."""

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


@dataclass(frozen=True)
class Yarn:
    """YaRN's frequency scaling (arXiv 2309.00071), as `transformers` computes it.

    Attributes:
      factor: by which the frequencies of long wavelengths are divided.
      original_max_position: tokens of the pretrained context.
      attention_factor: that cosines and sines are multiplied by.
      beta_fast, beta_slow: turns in the pretrained context, above which a frequency is kept and below
        which it is divided.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Rope:
    """A base of wavelengths and what is done to them."""

    theta: float
    scaling: RopeScaling | Yarn | None = None


class Rotation(NamedTuple):
    """Cosines and sines of rotary angles, `[..., T, D / 2]`, float32 at least."""

    cos: Array
    sin: Array


def rotation(
    positions: Array, *, width: int, theta: float, scaling: RopeScaling | Yarn | None, dtype: str
) -> Rotation:
    """Of tokens at `positions` [..., T] for heads of `width` D; float32, or wider with `dtype`."""
    half, wide = width // 2, jnp.promote_types(dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    if isinstance(scaling, Yarn):
        kept = _kept_by_yarn(width, theta, scaling, frequencies.dtype)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    elif scaling is not None:
        # Llama 3: long wavelengths are slowed by `factor`, short ones kept, those between blended.
        wavelengths = 2 * math.pi / frequencies
        span = scaling.high_freq_factor - scaling.low_freq_factor
        ratio = scaling.original_max_position / wavelengths
        kept = jnp.clip((ratio - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = positions[..., None].astype(wide) * frequencies
    turn = Rotation(jnp.cos(angles), jnp.sin(angles))
    if isinstance(scaling, Yarn):
        turn = Rotation(*(part * jnp.asarray(scaling.attention_factor, wide) for part in turn))
    return turn


def _kept_by_yarn(width: int, theta: float, scaling: Yarn, dtype: jnp.dtype) -> Array:
    """How much of each frequency `[D / 2]` YaRN keeps: 1 at short wavelengths, 0 at long ones."""

    def index(turns: float) -> float:
        """Of the frequency that turns so often in the pretrained context."""
        ratio = scaling.original_max_position / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(theta))

    first = max(math.floor(index(scaling.beta_fast)), 0)
    last: float = min(math.ceil(index(scaling.beta_slow)), width - 1)
    if first == last:
        last += 0.001  # as transformers does, so that nothing is divided by 0
    return 1 - jnp.clip((jnp.arange(width // 2, dtype=dtype) - first) / (last - first), 0, 1)


def rotate(x: Array, turn: Rotation) -> Array:
    """Rotary embedding of `x` [..., T, heads, D] (halves, not pairs)."""
    cos, sin = (part[..., None, :] for part in turn)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
