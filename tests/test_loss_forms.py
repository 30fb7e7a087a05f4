"""Advantages of tokens, and token losses that a caller brings."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreset import losses

ROWS, LENGTH = 6, 5
LOSSES = {
    "plain": losses.policy_loss,
    "token": partial(losses.policy_loss, aggregation="token"),
    "constant": partial(losses.policy_loss, aggregation="constant", normalizer=64.0),
    "clip": losses.grpo_loss,
    "srpo": losses.srpo_loss,
}


def arrays(seed=0):
    """logps, rows' advantages, mask (the last row has no token) and behavior log-probabilities."""
    rng = np.random.default_rng(seed)
    logps, behavior = rng.normal(-1, 0.5, (2, ROWS, LENGTH)).astype(np.float32)
    mask = np.arange(LENGTH) < [[5], [4], [3], [2], [1], [0]]
    return logps, rng.normal(size=ROWS).astype(np.float32), mask, behavior


def run(loss, logps, advantages, mask, behavior, **options):
    """Loss, metrics, and the gradient by logps."""

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def both(logps):
        return loss(logps, advantages, mask, behavior_logps=behavior, **options)

    return both(logps)


def assert_same_bits(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_a_rows_advantage_is_that_of_each_of_its_tokens(name):
    logps, rows, mask, behavior = arrays()
    tokens = np.repeat(rows[:, None], LENGTH, axis=1)
    options = {"penalties": 0.1 * logps, "token_weights": np.exp(behavior)}
    for more in ({}, options):
        one = run(LOSSES[name], logps, rows, mask, behavior, **more)
        assert_same_bits(one, run(LOSSES[name], logps, tokens, mask, behavior, **more))


@pytest.mark.parametrize("shape", [(ROWS, LENGTH), (2, 3, LENGTH), (LENGTH,)])
def test_each_token_has_its_own_advantage(shape):
    logps, advantages = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    loss, _ = losses.policy_loss(logps, advantages, np.ones(shape, bool))
    np.testing.assert_allclose(loss, -(advantages * logps).mean(), rtol=1e-6)


def plain(logps, advantages, mask, *, behavior_logps):
    return -advantages * logps


def sequence_ratio(logps, advantages, mask, *, behavior_logps):
    """GSPO (arXiv 2507.18071): the ratio of a whole sequence, by its length, clipped."""
    counts = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    ratio = jnp.exp((logps - behavior_logps).sum(-1, keepdims=True) / counts)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 0.9, 1.1))


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_form_of_the_default_is_the_default(aggregation):
    logps, rows, mask, behavior = arrays()
    options = {"penalties": 0.1 * logps, "token_weights": np.exp(behavior)}
    for more in ({}, options):
        args = losses.policy_loss, logps, rows, mask, behavior
        default = run(*args, aggregation=aggregation, **more)
        assert_same_bits(default, run(*args, aggregation=aggregation, form=plain, **more))


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_form_over_whole_rows_splits_over_microbatches(aggregation, cut):
    normalizer = {"sequence": ROWS, "token": 15, "constant": 64}[aggregation]
    with jax.enable_x64(True):
        logps, rows, mask, behavior = (
            x if x.dtype == bool else x.astype(np.float64) for x in arrays(1)
        )

        def part(at):
            more = {"form": sequence_ratio, "aggregation": aggregation, "normalizer": normalizer}
            args = (x[at] for x in (logps, rows, mask, behavior))
            (loss, _), gradient = run(losses.policy_loss, *args, **more)
            return loss, gradient

        whole, whole_gradient = part(slice(None))
        first, second = part(slice(0, cut)), part(slice(cut, None))
    np.testing.assert_allclose(first[0] + second[0], whole, atol=1e-14)
    gradient = np.concatenate([first[1], second[1]])
    np.testing.assert_allclose(gradient, whole_gradient, atol=1e-14)
    assert np.abs(whole_gradient[:5]).max() > 0
    counts = mask.sum(-1, keepdims=True)
    ratio = np.exp(np.where(mask, logps - behavior, 0).sum(-1, keepdims=True)[:5] / counts[:5])
    gains = np.minimum(rows[:5, None] * ratio, rows[:5, None] * ratio.clip(0.9, 1.1))
    share = 1 if aggregation == "sequence" else counts[:5]
    np.testing.assert_allclose(whole, -(gains * share).sum() / normalizer, rtol=1e-12)


def test_a_form_gets_clean_wide_arrays_of_tokens():
    logps, rows, mask, behavior = arrays()
    seen = []

    def watch(logps, advantages, mask, *, behavior_logps):
        seen.append((logps, advantages, behavior_logps, mask))
        return jnp.where(mask, logps.astype(jnp.float16), jnp.nan)  # padding isn't read

    spoilt = (np.where(mask, x, np.nan).astype(np.float16) for x in (logps, behavior))
    half, behavior = spoilt
    loss, metrics = losses.policy_loss(half, rows, mask, behavior_logps=behavior, form=watch)
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss)
    assert sorted(metrics) == ["logp_gap", "ratio", "tokens"]
    for x in seen[0][:3]:
        assert (x.shape, x.dtype) == (mask.shape, jnp.float32)
        assert np.isfinite(x).all()
        assert not x[~mask].any()
    assert seen[0][3].dtype == bool
    losses.policy_loss(half, rows, mask, form=watch)
    assert seen[1][2] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": plain, "clip": 0.2}, "form takes the surrogate's place, so clip=0.2"),
        ({"form": plain, "dual_clip": 3.0}, "dual_clip=3.0 must be None"),
        ({"form": lambda *a, **k: a[0].sum(-1)}, r"result of form=<lambda> has shape \(6,\)"),
        ({"form": lambda *a, **k: a[0].mean()}, r"has shape \(\), expected \(6, 5\)"),
    ],
)
def test_forms_that_are_refused(options, message):
    logps, rows, mask, behavior = arrays()
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(logps, rows, mask, behavior_logps=behavior, **options)
    with pytest.raises(ValueError, match="form takes"):
        losses.grpo_loss(logps, rows, mask, behavior_logps=behavior, form=plain)
