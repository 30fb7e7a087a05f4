"""top-k and top-p without sorting: the tokens and the distribution of the sorted definition."""

from __future__ import annotations

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxreset.sampling.tokens import Draws, draw_token
from jaxreset.sampling.truncation import least_kept, truncate

repeatable = settings(derandomize=True, deadline=None, max_examples=150)
thresholds = jax.jit(least_kept)
draw = jax.jit(draw_token)


def kept_by_sorting(weights: list[int], top_k: int, top_p: Fraction) -> list[bool]:
    """The definition, in exact numbers."""
    ordered = sorted(weights, reverse=True)[: top_k or None]
    kept = [w for n, w in enumerate(ordered) if n == 0 or sum(ordered[:n]) < top_p * sum(ordered)]
    return [w >= kept[-1] for w in weights]


@repeatable
@given(st.data())
def test_exactly_what_sorting_keeps(data):
    """Weights are multiples of 1/4096, shares of 1/64: floats add and multiply them without rounding."""
    weights = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=300).filter(any))
    top_k = data.draw(st.integers(0, 12) | st.integers(250, 310))
    top_p = Fraction(data.draw(st.integers(1, 64)), 64)
    padded = np.zeros((1, 300), np.float32)
    padded[0, : len(weights)] = np.array(weights) / 4096
    least, mass = thresholds(padded, np.int32(top_k), np.float32(top_p))
    expected = kept_by_sorting([*weights, *[0] * (300 - len(weights))], top_k, top_p)
    np.testing.assert_array_equal(padded[0] >= least, expected)
    assert float(mass[0]) * 4096 == np.array(weights)[expected[: len(weights)]].sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (0, 0.3), (50, 1.0), (40, 0.8), (1, 0.5)])
def test_what_sorting_keeps_of_random_logits(dtype, top_k, top_p):
    """Within rounding: between what slightly smaller and slightly larger shares keep."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(3, 4, 5000))
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(logits).astype(dtype)  # those of bfloat16 tie by the hundred
        logps = jax.nn.log_softmax(logits.astype("float64" if dtype == "float64" else "float32"))
        least, mass = thresholds(jnp.exp(logps), np.int32(top_k), np.float32(top_p))
        kept = np.asarray(jnp.exp(logps) >= least[..., None])
    margin = 0 if top_p == 1 else {"float64": 1e-7}.get(dtype, 1e-5)  # top_p itself is float32
    values = np.asarray(logps, np.float64).reshape(-1, 5000)
    for ours, row, sum_ in zip(kept.reshape(-1, 5000), values, np.ravel(mass), strict=True):
        fewer, more = (
            np.isfinite(truncate(row, min(top_p + side, 1), top_k)) for side in (-margin, margin)
        )
        assert (fewer <= ours).all()
        assert (ours <= more).all()
        assert sum_ == pytest.approx(np.exp(row[ours]).sum(), rel=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.8), (7, 1.0), (9, 0.9)])
def test_draws_have_the_truncated_distribution(top_k, top_p):
    count, rng = 20_000, np.random.default_rng(1)
    logits = rng.normal(size=40).astype(np.float32)
    draws = Draws(np.float32(0.7), np.float32(top_p), np.int32(top_k), 1, 0, 0, 0)
    uniforms = rng.uniform(size=(count, 1, 2)).astype(np.float32)
    tokens, logps, kept_logps = draw(np.broadcast_to(logits, (count, 1, 40)), uniforms, draws)

    scaled = logits.astype(np.float64) / 0.7
    whole = scaled - np.logaddexp.reduce(scaled)
    kept = truncate(whole, top_p, top_k)
    kept -= np.logaddexp.reduce(kept)
    np.testing.assert_allclose(logps, whole[np.asarray(tokens)], atol=1e-5)
    np.testing.assert_allclose(kept_logps, kept[np.asarray(tokens)], atol=1e-5)
    support = np.isfinite(kept)
    counts = np.bincount(np.ravel(tokens), minlength=40)
    assert counts[~support].sum() == 0
    assert support.sum() > 3
    assert chisquare(counts[support], count * np.exp(kept[support])).pvalue > 1e-3


def test_a_certain_token_stays_whatever_the_share():
    logits = np.full((1, 1, 300), -np.inf, np.float32)
    logits[0, 0, 7] = 3.0
    for top_k, top_p in itertools.product((0, 1, 5), (1e-30, 0.5, 1.0)):
        draws = Draws(np.float32(1), np.float32(top_p), np.int32(top_k), 1, 0, 0, 0)
        uniforms = np.float32([[[0.999, 0.999]]])
        token, *logps = draw(logits, uniforms, draws)
        assert (int(token[0, 0]), *map(float, np.ravel(logps))) == (7, 0.0, 0.0)


def test_a_choice_among_steps_is_truncated_as_a_vocabulary_is():
    rng = np.random.default_rng(0)
    for top_p, top_k in itertools.product((1e-6, 0.3, 0.8, 1.0), (0, 1, 3, 50)):
        logps = rng.integers(-4, 1, 9) + 0.5 * rng.integers(0, 2, 9)  # with ties
        kept = np.isfinite(truncate(logps, top_p, top_k))
        weights = np.exp(logps).astype(np.float32)
        least, _ = thresholds(weights / weights.sum(), np.int32(top_k), np.float32(top_p))
        np.testing.assert_array_equal(kept, weights / weights.sum() >= least)
    assert truncate(np.array([-3.0]), 0.5, 2) == [-3.0]
