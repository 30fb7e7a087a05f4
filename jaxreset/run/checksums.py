"""Checksums of arrays, computed where the arrays lie and the same in every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.jit
def checksum(x: Array) -> Array:
    """Checksum of an array, a uint32, of all its bits and where these stand.

    A change of one word always changes the sum; any other, values that changed places among them, but
    for a chance of 2**-32. Each word is scrambled with its position, and the sum wraps around, so it is
    the same in any order and over any number of devices.
    """
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size) + along
    mixed = words + position * jnp.uint32(0x9E3779B1)
    # The finalizer of MurmurHash3: a permutation of the words.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(x: Array) -> Array:
    """The bits of `x` as uint32; 64-bit numbers are two along a last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
