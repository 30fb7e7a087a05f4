"""What all functions here ask of the arrays that they are given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def wide(values: Any) -> Array:
    """As an array of float32 at least."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def shaped(name: str, values: Array, shape: tuple[int, ...], reason: str) -> Array:
    """`values`, if they have that shape: what broadcasts is counted wrongly without a word."""
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, expected {shape}: {reason}")
    return values
