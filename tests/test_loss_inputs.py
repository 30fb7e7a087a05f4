"""Losses on what they may be given: any values, sizes, dtypes, shapes and padding."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreset import losses

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
DTYPES = ["float16", "bfloat16", "float32", "float64"]
SCALES = ["std", "sample_std", "mean", "loo", "none"]
advantages = jax.jit(losses.group_advantages, static_argnames="scale")


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rewards_have_no_advantage_whatever_they_are(dtype):
    values = [*np.arange(-1, 1, 0.05), 1 / 3, 1e-7, 123.456, 6e4]
    sizes = np.arange(65)
    with jax.enable_x64(dtype == "float64"):
        values = jnp.asarray(values, dtype)
        where = np.broadcast_to(np.arange(64) < sizes[:, None], (len(values), 65, 64))
        for scale in SCALES:
            found = advantages(
                jnp.broadcast_to(values[:, None, None], where.shape), where=where, scale=scale
            )
            assert found.dtype == dtype
            assert not np.asarray(found).any()
            alone = losses.group_advantages(jnp.full((8,), 0.7, dtype), scale=scale)
            assert not np.asarray(alone).any()


REWARDS = st.one_of(
    st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 0.3, 0.30000001192092896, 0.3000001, 1.0, 1e5, 100000.0078125, 1e30]),
)


@repeatable
@given(rewards=st.lists(REWARDS, min_size=6, max_size=6), size=st.integers(1, 6))
def test_advantages_are_those_of_exact_arithmetic(rewards, size):
    """However near, far apart or large the rewards are; against numpy in float64."""
    rewards, where = np.float32(rewards), np.arange(6) < size
    exact = rewards[:size].astype(np.float64)
    std, centred = exact.std(), exact - exact.mean()
    spread = exact.std(ddof=1) + 1e-6 if size > 1 else 1.0
    expected = {
        "std": centred / std if std >= 1e-8 else 0 * centred,
        "sample_std": centred / spread,
    }
    poisoned = np.where(where, rewards, np.nan)
    for scale, right in expected.items():
        if scale == "std" and abs(std - 1e-8) < 1e-10:
            continue
        found = advantages(poisoned, where=where, scale=scale)
        np.testing.assert_allclose(found[:size], right, rtol=1e-4, atol=1e-6)
        assert not found[size:].any()
    others = size / (size - 1) if size > 1 else 1.0
    for scale, right in {"none": centred, "loo": centred * others}.items():
        found = advantages(poisoned, where=where, scale=scale)
        np.testing.assert_allclose(found[:size], right, atol=2e-6 * np.ptp(exact))
        assert not found[size:].any()


@repeatable
@given(rewards=st.lists(REWARDS, min_size=6, max_size=6), size=st.integers(1, 6), data=st.data())
def test_advantages_over_the_mean_are_those_of_exact_arithmetic(rewards, size, data):
    """And nobody has one where the mean isn't above 0."""
    rewards, where = np.float32(rewards), np.arange(6) < size
    if data.draw(st.booleans()):
        rewards = np.abs(rewards)
    exact = rewards[:size].astype(np.float64)
    mean, most = exact.mean(), np.abs(exact).max()
    found = advantages(np.where(where, rewards, np.nan), where=where, scale="mean")
    assert np.isfinite(found).all()
    assert not found[size:].any()
    if exact.min() >= 0 and np.ptp(exact) > 1e-30:
        np.testing.assert_allclose(found[:size], exact / mean - 1, rtol=1e-4, atol=2e-6)
    elif mean > 0.01 * most and np.ptp(exact) > 1e-30:
        np.testing.assert_allclose(found[:size], exact / mean - 1, rtol=1e-3, atol=1e-3)
    elif mean < -1e-6 * most or np.ptp(exact) == 0:
        assert not found.any()


@pytest.mark.parametrize("rewards", [[-0.1, 0.2, -0.1], [0.1, 0.2, -0.3], [-1, 1, 0], [-3, 1, 1]])
def test_a_mean_that_is_rounding_alone_divides_nothing(rewards):
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            assert not advantages(jnp.array(rewards, dtype), scale="mean").any()


@pytest.mark.parametrize("scale", SCALES)
@repeatable
@given(rewards=st.lists(REWARDS, min_size=6, max_size=6), data=st.data())
def test_advantages_move_with_their_rewards(scale, rewards, data):
    rewards, order = np.abs(np.float32(rewards)), data.draw(st.permutations(range(6)))
    found = np.asarray(advantages(rewards, scale=scale))
    moved = advantages(rewards[list(order)], scale=scale)
    np.testing.assert_allclose(moved, found[list(order)], rtol=1e-5, atol=1e-6 * abs(found).max())


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_have_the_gradient_of_their_formula(scale):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        rewards, weights = rng.normal(size=(2, 3, 5))
        rewards = abs(rewards)

        def plain(x):
            centred = x - x.mean(-1, keepdims=True)
            divisors = {
                "std": jnp.std(x, -1, keepdims=True),
                "sample_std": jnp.std(x, -1, keepdims=True, ddof=1) + 1e-6,
                "mean": x.mean(-1, keepdims=True),
                "loo": 4 / 5,
                "none": 1,
            }
            return (weights * centred / divisors[scale]).sum()

        def ours(x):
            return (weights * losses.group_advantages(x, scale=scale)).sum()

        np.testing.assert_allclose(jax.grad(ours)(rewards), jax.grad(plain)(rewards), atol=1e-12)
        for odd in (jnp.full((3, 5), 0.7), jnp.zeros((3, 5)), -rewards):
            assert np.isfinite(jax.grad(ours)(odd)).all()


def test_rewards_of_other_kinds():
    np.testing.assert_allclose(advantages(np.array([True, False])), [1, -1])
    np.testing.assert_allclose(
        losses.group_advantages(np.array([[3, 1], [2, 2]])), [[1, -1], [0, 0]]
    )
    for scale, right in {"mean": [1, -1, 0], "loo": [1.5, -1.5, 0]}.items():
        np.testing.assert_allclose(advantages(np.array([2, 0, 1]), scale=scale), right, atol=1e-6)
    half = advantages(jnp.array([6e4, 0, 0, 0], jnp.float16))  # squares overflow
    np.testing.assert_allclose(half, np.array([3, -1, -1, -1]) / np.sqrt(3), rtol=1e-3)
    for scale in SCALES:
        odd = advantages(
            jnp.array([[0, jnp.inf], [jnp.inf] * 2, [jnp.nan, 1], [1, 0]]), scale=scale
        )
        assert np.isnan(odd[:3]).all()
        right = 0.5 if scale == "none" else 0.5**0.5 if scale == "sample_std" else 1
        np.testing.assert_allclose(odd[3], [right, -right], rtol=1e-5)
    for rewards, where in (
        (0.5, None),
        (np.ones(4), np.ones((2, 4))),
        (np.ones((2, 4)), np.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"shape|[Bb]roadcast"):
            losses.group_advantages(rewards, where=where)


# Log-ratios


FORMS = {
    "plain": {},
    "clip": {"clip": 0.2},
    "clip_dual": {"clip": (0.2, 0.3), "dual_clip": 3.0},
    "weights": {"token_weights": True},
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_any_log_ratio_gives_a_finite_loss_and_gradient(form, dtype):
    gaps = jnp.array([100, -100, 1e4, -1e4, 20, 0], dtype)
    behavior = jnp.full((3, 6), -1, dtype)
    logps = behavior + gaps
    rows = jnp.array([1.0, -1.0, 0.0], dtype)
    options = dict(FORMS[form])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(logps):
        if "token_weights" in options:
            options["token_weights"] = losses.importance_weights(logps, behavior, cap=2.0)
        return losses.policy_loss(
            logps,
            rows,
            jnp.ones((3, 6), bool),
            behavior_logps=behavior,
            penalties=0.1 * losses.kl_penalty(logps, behavior),
            aggregation="token",
            **options,
        )

    (loss, metrics), gradient = run(logps)
    assert loss.dtype == jnp.float32
    assert np.isfinite([loss, *metrics.values()]).all()
    assert np.isfinite(gradient.astype(np.float32)).all()
    # Away from the divergence's gradient, which grows with the gap, PPO's is as it defines it.
    divergence = 0.1 * gaps.astype(jnp.float32) / 18
    policy = gradient.astype(jnp.float32) - divergence
    if "clip" in options:
        np.testing.assert_allclose(policy[0, [0, 2, 4]], 0, atol=0.5)  # has risen more than enough
        falls = policy[1, [0, 2, 4]]
        if "dual_clip" in options:
            np.testing.assert_allclose(falls, 0, atol=0.5)
        else:
            assert (falls > 100).all()  # it must still fall
        np.testing.assert_allclose(policy[0, 5], -1 / 18, rtol=2e-2)


def test_a_ratio_is_bounded_only_where_its_dtype_ends():
    """At log-ratios up to 60 the clipped loss is PPO's to the last bit."""
    behavior = jnp.zeros((1, 4))
    logps = jnp.array([[60.0, 10.0, 0.1, -60.0]])
    value, gradient = jax.value_and_grad(
        lambda x: losses.policy_loss(
            x, [-1.0], np.ones((1, 4)), behavior_logps=behavior, clip=0.2, normalizer=1.0
        )[0]
    )(logps)
    ratio = jnp.exp(logps)
    np.testing.assert_array_equal(value, jnp.maximum(ratio, jnp.clip(ratio, 0.8, 1.2)).mean())
    np.testing.assert_array_equal(gradient[0, :3], ratio[0, :3] / 4)
    assert gradient[0, 3] == 0


# Padding


@pytest.fixture(scope="module")
def chain():
    """Loss and gradients of all that a trainer puts together, by every array."""

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4))
    def run(hidden, head, behavior, reference, rows, weights, more, tokens, mask):
        logps, entropy = losses.token_logps_and_entropy(hidden, head, tokens, where=mask)
        with_mask = losses.kl_penalty(logps, reference, where=mask, estimator="k3")
        without = sum(losses.kl_penalty(logps, reference, estimator=e) for e in ("k1", "k2"))
        weights = weights * losses.importance_weights(logps, behavior, cap=2.0)
        return losses.policy_loss(
            logps,
            rows,
            mask,
            behavior_logps=behavior,
            clip=0.2,
            dual_clip=3.0,
            token_weights=weights,
            penalties=with_mask + without - 0.1 * entropy + more,
            aggregation="token",
        )[0]

    return run


@repeatable
@given(seed=st.integers(0, 10**6))
def test_padding_of_every_array_is_inert(chain, seed):
    rng = np.random.default_rng(seed)
    mask = np.arange(5) < rng.integers(0, 6, (4, 1))

    def spoilt(values, kept):
        odd = [np.nan, np.inf, -np.inf, 1e30, -1e30, 0]
        return np.where(kept, values, rng.choice(odd, values.shape).astype(np.float32))

    hidden, head = rng.normal(size=(4, 5, 3)), rng.normal(size=(3, 7))
    tokens = [*rng.normal(-2, 0.5, (2, 4, 5)), rng.normal(size=4), *rng.normal(size=(2, 4, 5))]
    hidden, head, behavior, reference, rows, weights, more = map(
        np.float32, (hidden, head, *tokens)
    )
    ids = rng.integers(0, 7, (4, 5))
    clean = chain(hidden, head, behavior, reference, rows, weights, more, ids, mask)
    dirty = chain(
        spoilt(hidden, mask[..., None]),
        head,
        spoilt(behavior, mask),
        spoilt(reference, mask),
        spoilt(rows, mask.any(-1)),
        spoilt(weights, mask),
        spoilt(more, mask),
        np.where(mask, ids, rng.choice([-100, -1, 7, 2**30], (4, 5))),
        mask,
    )
    for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def test_padding_of_advantages_of_tokens_is_inert():
    logps, mask = (
        jnp.array([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]),
        np.array([[1, 1, 0], [0] * 3]),
    )

    @jax.value_and_grad
    def run(logps, advantages):
        return losses.policy_loss(logps, advantages, mask)[0]

    for odd in (0.0, np.nan, np.inf):
        loss, gradient = run(logps, np.array([[1, -2, odd], [odd] * 3], np.float32))
        np.testing.assert_array_equal(loss, (1.0 * 1 - 2 * 2) / 2 / 2)
        np.testing.assert_array_equal(gradient, [[-0.25, 0.5, 0], [0, 0, 0]])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_without_a_mask_has_no_gradient_on_padding_either(estimator):
    logps, mask = jnp.array([-1.0, -2.0, -3.0, -jnp.inf]), np.array([1, 0, 0, 0])
    reference = jnp.array([-1.5, -jnp.inf, jnp.nan, -1.0])

    def loss(logps):
        penalties = losses.kl_penalty(logps, reference, estimator=estimator)
        return losses.policy_loss(logps, 0.0, mask, penalties=penalties)[0]

    np.testing.assert_allclose(jax.grad(loss)(logps), [0.5, 0, 0, 0])


# Counts


@pytest.mark.parametrize(("dtype", "count"), [("float16", 70_000), ("bfloat16", 2_056)])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_tokens_are_counted_and_summed_in_float32(dtype, count, aggregation):
    shape = (8, count // 8)
    logps, mask = jnp.full(shape, -0.5, dtype), np.ones(shape, bool)
    normalizer = count if aggregation == "constant" else None
    loss, metrics = losses.policy_loss(
        logps,
        jnp.ones(8, dtype),
        mask,
        behavior_logps=logps,
        aggregation=aggregation,
        normalizer=normalizer,
    )
    assert float(metrics["tokens"]) == count
    assert metrics["ratio"] == 1
    np.testing.assert_allclose(loss, 0.5, rtol=1e-5)


# Shapes


@pytest.mark.parametrize(
    ("name", "values", "shapes"),
    [
        ("advantages", np.ones((2, 1)), ["(2, 1)", "(2,)", "(2, 3)"]),
        ("advantages", np.ones((1, 3)), ["(1, 3)", "(2,)", "(2, 3)"]),
        ("advantages", np.ones((1, 2, 3)), ["(1, 2, 3)", "(2,)", "(2, 3)"]),
        ("advantages", 1.0, ["()", "(2,)", "(2, 3)"]),
        ("advantages", np.ones(3), ["(3,)", "(2,)", "(2, 3)"]),
        ("mask", np.ones(3, bool), ["(3,)", "(2, 3)"]),
        ("mask", np.ones((1, 2, 3), bool), ["(1, 2, 3)", "(2, 3)"]),
        ("mask", True, ["()", "(2, 3)"]),
        ("behavior_logps", np.ones((2, 1)), ["(2, 1)", "(2, 3)"]),
        ("token_weights", np.ones(2), ["(2,)", "(2, 3)"]),
        ("penalties", 0.1, ["()", "(2, 3)"]),
        ("normalizer", np.ones(2), ["(2,)", "()"]),
    ],
)
def test_what_would_broadcast_is_refused_by_name_and_shapes(name, values, shapes):
    arrays = {"logps": np.zeros((2, 3)), "advantages": np.ones(2), "mask": np.ones((2, 3))}
    for loss in (
        losses.policy_loss,
        losses.srpo_loss,
        partial(losses.grpo_loss, clip=None, dual_clip=None),
    ):
        with pytest.raises(ValueError, match=name) as refused:
            loss(**arrays | {name: values})
        assert all(shape in str(refused.value) for shape in shapes)


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (4, 6)])
def test_a_mask_of_fewer_axes_is_not_counted_wrongly(shape):
    with pytest.raises(ValueError, match=r"mask has shape .* expected \(2, 4, 6\)"):
        losses.policy_loss(np.zeros((2, 4, 6)), np.ones((2, 4)), np.ones(shape, bool))


def test_helpers_refuse_other_shapes_too():
    one, other = np.zeros((2, 3)), np.zeros(3)
    for name, call in {
        "reference_logps": lambda: losses.kl_penalty(one, other),
        "where": lambda: losses.kl_penalty(one, one, where=other),
        "behavior_logps": lambda: losses.importance_weights(one, other, cap=1.0),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), expected \(2, 3\)"):
            call()


SCORED = {"hidden": np.ones((2, 3, 4)), "head": np.ones((4, 5)), "tokens": np.ones((2, 3), int)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.ones((2, 1), int)}, r"tokens has shape \(2, 1\), expected \(2, 3\)"),
        ({"tokens": np.ones((2, 3))}, "tokens are float32, expected integers"),
        ({"head": np.ones((5, 4))}, r"head has shape \(5, 4\).* hidden \(2, 3, 4\)"),
        ({"where": np.ones(3, bool)}, r"where has shape \(3,\), expected \(2, 3\)"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": jnp.float32(-1)}, "temperature must be above 0"),
        ({"temperature": np.ones(3)}, r"temperature has shape \(3,\)"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"vocab_chunk": -2}, "vocab_chunk must be at least 1"),
    ],
)
def test_scoring_refuses(changes, message):
    for score in (losses.token_logps, jax.jit(partial(losses.token_logps, **SCORED | changes))):
        with pytest.raises(ValueError, match=message):
            score(**SCORED | changes) if score is losses.token_logps else score()


@pytest.mark.parametrize("vocab_chunk", [None, 2])
def test_a_token_outside_the_vocabulary_has_no_log_probability(vocab_chunk):
    tokens = np.array([[0, 4, 5], [-1, 1, -100]])
    found = losses.token_logps(SCORED["hidden"], SCORED["head"], tokens, vocab_chunk=vocab_chunk)
    assert np.isnan(found).tolist() == [[False, False, True], [True, False, True]]
    np.testing.assert_allclose(found[0, 0], -np.log(5), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens_at_all(shape):
    hidden, tokens = np.zeros((*shape, 4)), np.zeros(shape, int)
    logps, entropy = losses.token_logps_and_entropy(hidden, SCORED["head"], tokens)
    assert logps.shape == entropy.shape == shape
    loss, metrics = losses.policy_loss(np.zeros((*shape, 4)), np.ones(shape), np.zeros((*shape, 4)))
    assert (loss, metrics["tokens"]) == (0, 0)


def test_lists_integers_and_booleans_are_taken_as_numbers():
    logps, mask = [[-1.0, -2.0], [-3.0, -4.0]], [[1, 1], [1, 0]]
    expected = (1.5 * 1 - 3.0 * 0) / 2
    for rows in ([1, 0], [True, False], np.array([1, 0], np.int8), jnp.array([1.0, 0.0])):
        np.testing.assert_allclose(losses.srpo_loss(logps, rows, mask)[0], expected)
    loss, _ = losses.grpo_loss(logps, [1, 0], mask, behavior_logps=logps, clip=[0.1, 0.2])
    np.testing.assert_allclose(loss, -2 / 3, rtol=1e-6)


def test_the_presets_say_what_they_are():
    for name in ("grpo", "rrpo", "srpo"):
        preset = getattr(losses, f"{name}_loss")
        assert inspect.isfunction(preset)
        assert inspect.getdoc(preset).startswith(name.upper())
        assert "policy_loss" in inspect.getdoc(preset)
