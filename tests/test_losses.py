from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxreset import losses

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
FORMS = {
    "unclipped_sequence_mean": losses.srpo_loss,
    "clipped_token_mean": losses.grpo_loss,
    "clipped_sequence_mean": lambda *a, **k: losses.policy_loss(*a, clip=0.2, dual_clip=3.0, **k),
}


def load(path):
    case = np.load(path)
    positions = np.arange(case["logps"].shape[1])
    mask = (case["response_mask"] > 0) & (positions >= case["suffix_start"][:, None])
    return case, mask


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_reproduce_the_published_ones(path, form):
    case, mask = load(path)
    with jax.enable_x64(True):
        advantages = losses.group_advantages(jnp.asarray(case["rewards"]))
        np.testing.assert_allclose(advantages, case["advantages"], rtol=1e-12)
        # The published losses round the advantages to float32 on their way in.
        advantages = advantages.astype(jnp.float32).astype(jnp.float64)

        @jax.jit
        def loss(logps):
            return FORMS[form](
                logps, advantages.reshape(-1), mask, behavior_logps=case["behavior_logps"]
            )[0]

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(case["logps"]))
    np.testing.assert_allclose(value, case[f"{form}_loss"], rtol=1e-10)
    np.testing.assert_allclose(gradient, case[f"{form}_grad"], rtol=1e-10, atol=1e-14)


def test_rrpo_is_srpo_on_the_same_groups():
    case, mask = load(GOLDEN[0])
    args = jnp.asarray(case["logps"]), jnp.asarray(case["advantages"]).reshape(-1), mask
    assert losses.rrpo_loss(*args)[0] == losses.srpo_loss(*args)[0]


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("clip", [None, 0.2, (0.1, 0.3)])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 23))
def test_microbatches_sum_to_the_minibatch_and_padding_is_inert(aggregation, clip, seed, cut):
    rng = np.random.default_rng(seed)
    rows, length = 24, 6
    mask = np.arange(length) < rng.integers(0, length + 1, rows)[:, None]
    logps, behavior = rng.normal(-1, 0.5, (2, rows, length))
    advantages = rng.normal(size=rows)
    normalizer = {"sequence": rows, "token": max(mask.sum(), 1), "constant": 100.0}[aggregation]

    with jax.enable_x64(True):

        def loss(logps, rows):
            return losses.policy_loss(
                logps,
                advantages[rows],
                mask[rows],
                behavior_logps=behavior[rows],
                clip=clip,
                aggregation=aggregation,
                normalizer=normalizer,
            )[0]

        def run(logps, rows):
            return jax.value_and_grad(loss)(jnp.asarray(logps[rows]), rows)

        whole, whole_grad = run(logps, slice(None))
        first, first_grad = run(logps, slice(0, cut))
        second, second_grad = run(logps, slice(cut, None))
        poisoned = np.where(mask, logps, np.nan)
        dirty, dirty_grad = run(poisoned, slice(None))
    np.testing.assert_allclose(first + second, whole, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([first_grad, second_grad]), whole_grad, atol=1e-12)
    np.testing.assert_allclose(dirty, whole, atol=0)
    np.testing.assert_allclose(dirty_grad, whole_grad, atol=0)


@pytest.mark.parametrize("scale", ["std", "sample_std", "mean", "loo", "none"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 6), padding=st.integers(0, 3))
def test_masked_group_equals_the_subset(scale, seed, size, padding):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 3, size).astype(np.float32)
    padded = np.concatenate([rewards, rng.normal(size=padding).astype(np.float32)])
    where = np.arange(size + padding) < size
    whole = losses.group_advantages(padded, where=where, scale=scale)
    np.testing.assert_allclose(
        whole[:size], losses.group_advantages(rewards, scale=scale), atol=1e-6
    )
    assert not np.any(whole[size:])


def test_group_of_equal_rewards_has_no_advantage():
    assert not np.any(losses.group_advantages(jnp.full((3, 4), 0.3)))
    assert not np.any(losses.group_advantages(jnp.ones((2, 4)), where=jnp.zeros((2, 4), bool)))


@pytest.mark.parametrize("vocab_chunk", [None, 4, 11])
@pytest.mark.parametrize("chunk", [1, 7, 15, None])
@pytest.mark.parametrize("shape", [(3, 5), (15,)])
def test_chunked_logps_and_entropies_equal_those_of_log_softmax(shape, chunk, vocab_chunk):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, head = (
            jnp.asarray(rng.normal(size=(*shape, 8))),
            jnp.asarray(rng.normal(size=(8, 11))),
        )
        tokens = jnp.asarray(rng.integers(0, 11, shape))

        def plain(hidden, head, temperature):
            logps = jax.nn.log_softmax(hidden @ head / temperature)
            entropy = -(jnp.exp(logps) * logps).sum(-1)
            return jnp.take_along_axis(logps, tokens[..., None], -1)[..., 0], entropy

        chunks = {"chunk": chunk, "vocab_chunk": vocab_chunk}

        def both(hidden, head, temperature):
            return losses.token_logps_and_entropy(
                hidden, head, tokens, temperature=temperature, **chunks
            )

        def weigh(f):
            def weighed(*args):
                logps, entropy = f(*args)
                return (logps**2 + 3 * entropy**2).sum()

            return jax.grad(weighed, argnums=(0, 1, 2))(hidden, head, 0.7)

        ours, theirs = both(hidden, head, 0.7), plain(hidden, head, 0.7)
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
        for one, other in zip(weigh(both), weigh(plain), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10)
        alone = losses.token_logps(hidden, head, tokens, temperature=0.7, **chunks)
        np.testing.assert_allclose(alone, theirs[0], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, "aggregation must be"),
        ({"clip": 0.2}, "clip needs behavior_logps"),
        ({"dual_clip": 3.0}, "dual_clip=3.0"),
        ({"aggregation": "constant"}, "needs normalizer"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3), bool), **options)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_has_in_expectation_the_divergence_and_its_gradient(estimator):
    """Over all tokens, each weighed by the policy's probability, as if it had drawn them."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logits, other = jnp.asarray(rng.normal(size=(2, 4, 7)))
        reference = jax.nn.log_softmax(other)

        def divergence(logits):
            logps = jax.nn.log_softmax(logits)
            return (jnp.exp(logps) * (logps - reference)).sum()

        drawn = jax.nn.softmax(logits)

        def estimated(logits):
            penalty = losses.kl_penalty(jax.nn.log_softmax(logits), reference, estimator=estimator)
            return (drawn * penalty).sum()

        np.testing.assert_allclose(
            jax.grad(estimated)(logits), jax.grad(divergence)(logits), atol=1e-12
        )
        if estimator != "k2":
            np.testing.assert_allclose(estimated(logits), divergence(logits), atol=1e-12)
        if estimator != "k1":
            assert losses.kl_penalty(logits, reference, estimator=estimator).min() >= 0


def test_importance_weights_are_capped_ratios_without_a_gradient():
    trainer, behavior = jnp.log(jnp.array([[0.5, 0.9], [0.1, 0.2]])), jnp.log(jnp.full((2, 2), 0.3))
    weights = losses.importance_weights(trainer, behavior, cap=2.0)
    np.testing.assert_allclose(weights, [[5 / 3, 2.0], [1 / 3, 2 / 3]], rtol=1e-6)
    slope = jax.grad(lambda x: losses.importance_weights(x, behavior, cap=2.0).sum())(trainer)
    assert not slope.any()


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_weights_and_penalties_are_per_token_and_padding_is_inert(aggregation):
    rng = np.random.default_rng(0)
    logps, weights, penalties = rng.normal(size=(3, 2, 4)).astype(np.float32)
    advantages, mask = np.array([1.0, -2.0], np.float32), np.arange(4) < [[3], [2]]
    junk = [np.where(mask, x, np.nan) for x in (logps, weights, penalties)]
    loss, _ = losses.policy_loss(
        junk[0],
        advantages,
        mask,
        token_weights=junk[1],
        penalties=junk[2],
        aggregation=aggregation,
    )
    per_token = np.where(mask, -advantages[:, None] * logps * weights + penalties, 0)
    counts = mask.sum(1)
    rows = (per_token.sum(1) / counts).mean()
    expected = rows if aggregation == "sequence" else per_token.sum() / counts.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator must be 'k1', 'k2' or 'k3', got 'k4'"):
        losses.kl_penalty(jnp.zeros(2), jnp.zeros(2), estimator="k4")


def test_the_mean_of_the_group_and_that_of_the_others():
    """By hand: MaxRL's (r - mean) / mean, and RLOO's r minus the mean of the others."""
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    over_mean = losses.group_advantages(rewards, scale="mean")
    expected = [[3, -1, -1, -1], [1 / 3] * 3 + [-1], [0] * 4, [0] * 4]
    np.testing.assert_allclose(over_mean, expected, rtol=1e-6)
    others = (rewards.sum(-1, keepdims=True) - rewards) / 3
    left_out = losses.group_advantages(rewards, scale="loo")
    np.testing.assert_allclose(left_out, rewards - others, rtol=1e-6)
    assert losses.group_advantages(jnp.ones(1), scale="loo") == 0


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be"):
        losses.group_advantages(jnp.zeros(4), scale="max")


def test_losses_import_nothing_else_of_ours_nor_of_what_trainers_need():
    code = "import sys, jaxreset.losses; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"transformers", "grain", "flax", "optax"} & set(loaded)
    ours = {name for name in loaded if name.split(".")[0] == "jaxreset"}
    assert {name for name in ours if not name.startswith("jaxreset.losses")} == {"jaxreset"}
