"""What top-k and top-p leave of a distribution: inside jit without sorting it, on the host by sorting."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

BLOCK = 128  # sums run over the rows of [n, 128] blocks, which every backend does in vectors


def least_kept(probabilities: Array, top_k: Array, top_p: Array) -> tuple[Array, Array]:
    """The threshold that top-k, then top-p, put on a token's probability.

    top-k keeps the k most likely tokens; of them top-p keeps the smallest set of the most likely ones whose
    share of the k reaches `top_p`. What ties with the last one kept is kept too. So a token stays if fewer
    than k are likelier, and if the likelier ones have less than the share: two thresholds, each found by
    halving the interval that it lies in. That takes 31 sums over the vocabulary, far less than a sort.

    Args:
      probabilities: `[..., V]` float32 or float64, at most 1 in sum.
      top_k, top_p: scalars; 0 and 1 keep all.

    Returns:
      `[...]` the least probability that is kept, at most the largest one, and the sum of all that are.
    """
    blocks = in_blocks(probabilities, BLOCK)
    most = probabilities.max(axis=-1)

    def mass(least: Array) -> Array:
        return _sum(jnp.where(blocks >= least[..., None, None], blocks, 0))

    def mass_above(value: Array) -> Array:
        return _sum(jnp.where(blocks > value[..., None, None], blocks, 0))

    def count_above(value: Array) -> Array:  # exact in floats, whose sums are vectors everywhere
        return _sum((blocks > value[..., None, None]).astype(blocks.dtype))

    def by_k() -> tuple[Array, Array]:
        least = _first_below(count_above, jnp.broadcast_to(top_k, most.shape), most)
        # Of those that tie for the last place only k are weighed, though all stay.
        tied = jnp.maximum(top_k - count_above(least), 0)
        return least, mass_above(least) + tied * least

    def by_p(least: Array, whole: Array) -> Array:
        return jnp.maximum(least, _first_below(mass_above, top_p * whole, most))

    least, whole = jax.lax.cond(
        top_k > 0, by_k, lambda: (jnp.zeros_like(most), mass(jnp.zeros_like(most)))
    )
    least = jax.lax.cond(top_p < 1, by_p, lambda least, _: least, least, whole)
    return least, mass(least)


def _first_below(measure: Callable[[Array], Array], bound: Array, most: Array) -> Array:
    """`[...]` the least float, at most `most`, at which `measure` is below `bound`.

    `measure` must not grow, and 0 must be below `bound` at `most`.
    """
    integers = jnp.int64 if most.dtype == jnp.float64 else jnp.int32

    def value(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, most.dtype)

    def halve(interval: tuple[Array, Array]) -> tuple[Array, Array]:
        over, below = interval
        middle = over + (below - over) // 2
        is_below = measure(value(middle)) < bound
        return jnp.where(is_below, over, middle), jnp.where(is_below, middle, below)

    # Floats that aren't negative are in the order of their bits.
    last = jax.lax.bitcast_convert_type(most, integers)
    interval = jnp.full_like(last, -1), last
    interval = jax.lax.while_loop(lambda i: (i[1] - i[0] > 1).any(), halve, interval)
    return value(interval[1])


def in_blocks(values: Array, block: int) -> Array:
    """`[..., V]` -> `[..., n, block]`, with zeros behind the last."""
    spare = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % block)]
    return jnp.pad(values, spare).reshape(*values.shape[:-1], -1, block)


def _sum(blocks: Array) -> Array:
    return blocks.sum(axis=-2).sum(axis=-1)


def truncate(logps: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """A few choices' log-probabilities [n], normalised or not, -inf where top-k, then top-p cut.

    As `least_kept` has it for a vocabulary: on the host, since n varies.
    """
    ordered = np.sort(logps)[::-1][: top_k or None]
    weights = np.exp(ordered - ordered[0])
    before = (np.cumsum(weights) - weights) / weights.sum()  # mass of the likelier ones
    kept = (before < top_p) | (top_p >= 1)
    kept[0] = True
    return np.where(logps >= ordered[kept][-1], logps, -np.inf)
