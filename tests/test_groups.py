"""Advantages across groups."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreset.groups import Group, set_advantages

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
SIZE = (6, 8)  # one compiled program for all tests of advantages


def group(rewards, prompt=0, normalized_with=0):
    rewards = np.asarray(rewards, np.float64)
    ones = [np.ones(1, np.int32)] * len(rewards)
    logps = [np.zeros(1, np.float32)] * len(rewards)
    return Group(prompt, np.arange(3, dtype=np.int32), ones, logps, rewards, normalized_with)


def advantages(groups, scale="std", size=SIZE):
    set_advantages(groups, scale=scale, size=size)
    return [g.advantages for g in groups]


def reference(rewards, scale):
    centred = np.asarray(rewards) - np.mean(rewards)
    if scale == "none":
        return centred
    if scale == "sample_std":
        return centred / (np.std(rewards, ddof=1) + 1e-6)
    if scale == "loo":
        return centred * len(rewards) / (len(rewards) - 1)
    if scale == "mean":
        return centred / np.mean(rewards)
    return centred / np.std(rewards) if np.std(rewards) > 1e-8 else 0 * centred


@pytest.mark.parametrize("scale", ["std", "sample_std", "mean", "loo", "none"])
def test_groups_of_one_number_are_normalised_together(scale):
    first, second = [1.0, 0.0, 0.25, 1.0], [0.0, 0.0, 0.0, 1.0]
    groups = [
        group(first, prompt=4, normalized_with=0),
        group([1.0, 0.0], prompt=5, normalized_with=0),
        group(second, prompt=4, normalized_with=0),
        group([0.0, 0.0, 1.0, 0.0], prompt=4, normalized_with=2),
    ]
    found = advantages(groups, scale)
    together = reference(first + second, scale)
    for one, expected in zip(
        found,
        (
            together[:4],
            reference([1.0, 0.0], scale),
            together[4:],
            reference([0.0, 0.0, 1.0, 0.0], scale),
        ),
        strict=True,
    ):
        assert one.shape == expected.shape
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


@repeatable
@given(
    data=st.data(),
    shape=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=6
    ),
)
def test_advantages_do_not_depend_on_order_or_neighbours(data, shape):
    reward = st.sampled_from([0.0, 0.5, 1.0])
    groups = [
        group(data.draw(st.lists(reward, min_size=k, max_size=k)), prompt, number)
        for prompt, number, k in shape
        if sum(s[2] for s in shape if s[:2] == (prompt, number)) <= SIZE[1]
    ]
    sets = {(g.prompt, g.normalized_with) for g in groups}
    advantages(data.draw(st.permutations(groups)))
    for name in sets:
        members = [g for g in groups if (g.prompt, g.normalized_with) == name]
        expected = reference(np.concatenate([g.rewards for g in members]), "std")
        joined = np.concatenate([g.advantages for g in members])
        np.testing.assert_allclose(joined, expected, rtol=1e-5, atol=1e-6)
        for g in members:
            assert g.has_signal == bool(np.any(expected))


def test_equal_rewards_have_no_signal():
    ones, mixed = group([1.0] * 4), group([0.1] * 8, prompt=1)
    assert not ones.has_signal  # before any are set
    advantages([ones, mixed])
    assert ones.advantages.tolist() == [0.0] * 4
    assert not ones.has_signal
    assert not mixed.has_signal


def test_two_all_equal_groups_that_count_as_one_have_signal():
    right, wrong = group([1.0] * 4), group([0.0] * 4)
    advantages([right, wrong])
    np.testing.assert_allclose(right.advantages, np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(wrong.advantages, -np.ones(4), rtol=1e-6)
    assert right.has_signal
    assert wrong.has_signal


def test_no_groups_at_all():
    set_advantages([], scale="std", size=SIZE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_spoils_its_own_set_only(bad):
    good, odd, with_it = group([1.0, 0.0]), group([0.0, bad], prompt=3), group([1.0], prompt=3)
    advantages([good, odd, with_it])
    np.testing.assert_allclose(good.advantages, [1, -1], rtol=1e-6)
    assert np.isnan([*odd.advantages, *with_it.advantages]).all()
    assert odd.has_signal  # so the update meets it, and is skipped


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group([0.0], prompt=i) for i in range(7)], r"7 sets of up to 1 rollouts exceed"),
        ([group([0.0] * 9)], r"1 sets of up to 9 rollouts exceed size=\(6, 8\)"),
        ([group([0.0] * 5), group([0.0] * 4)], r"1 sets of up to 9 rollouts exceed"),
    ],
)
def test_more_than_the_compiled_size_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        set_advantages(groups, scale="std", size=SIZE)


def test_cut_responses_can_lose_reward_or_their_advantage():
    def one():
        made = group([1.0, 1.0, 0.0, 0.0])
        made.cut = np.array([True, False, False, True])
        return made

    penalized, masked = one(), one()
    set_advantages([penalized], scale="none", size=SIZE, cut_penalty=0.5)
    np.testing.assert_allclose(penalized.advantages, [0.25, 0.75, -0.25, -0.75])
    np.testing.assert_allclose(penalized.rewards, [1, 1, 0, 0])  # which are reported
    set_advantages([masked], scale="none", size=SIZE, mask_cut=True)
    np.testing.assert_allclose(masked.advantages, [0, 0.5, -0.5, 0])
    uncut = group([1.0, 0.0])  # by default
    set_advantages([uncut], scale="none", size=SIZE, cut_penalty=0.5, mask_cut=True)
    np.testing.assert_allclose(uncut.advantages, [0.5, -0.5])


@pytest.mark.parametrize("scale", ["std", "sample_std", "mean", "loo", "none"])
@repeatable
@given(
    reward=st.floats(-1e3, 1e3),
    penalty=st.floats(0, 10),
    size=st.integers(2, 8),
    wide=st.sampled_from([np.float64, np.float32]),
)
def test_a_penalty_for_all_gives_nobody_an_advantage(scale, reward, penalty, size, wide):
    """All are cut, or those that aren't get as little."""
    every, some = group(wide([reward] * size)), group([reward + penalty] * size, prompt=1)
    every.cut = np.ones(size, bool)
    some.cut = np.arange(size) > 0
    some.rewards[0] -= penalty
    set_advantages([every, some], scale=scale, size=SIZE, cut_penalty=penalty)
    assert not every.has_signal
    assert not some.has_signal


def test_nobody_has_an_advantage_where_all_are_masked():
    made = group([1.0, 0.0, 0.25, 1.0])
    made.cut = np.ones(4, bool)
    set_advantages([made], scale="std", size=SIZE, mask_cut=True)
    assert not made.has_signal


@pytest.mark.parametrize("scale", ["std", "sample_std", "mean", "loo", "none"])
def test_rewards_that_came_to_be_equal_by_other_sums_are_equal(scale):
    sums = group([0.1 + 0.2, 0.3, 0.6 - 0.3, 3 * 0.1])
    assert len(set(sums.rewards)) > 1
    apart, second = group([0.1 + 0.2] * 4, prompt=1), group([0.3] * 4, prompt=1)
    advantages([sums, apart, second], scale)
    assert not any(g.has_signal for g in (sums, apart, second))


def test_rewards_that_lie_near_keep_their_difference():
    """Of which float32 would leave nothing."""
    near = group([1000.0, 1000.00001, 1000.00001, 1000.00002])
    large = group([1e12, 1e12 + 1, 1e12, 1e12], prompt=1)
    advantages([near, large])
    np.testing.assert_allclose(near.advantages, reference([0, 1, 1, 2], "std"), atol=1e-4)
    np.testing.assert_allclose(large.advantages, reference([0, 1, 0, 0], "std"), atol=1e-6)


def test_rewards_over_their_mean_are_not_moved_first():
    apart = group([3.0, 1.0, 2.0, 2.0])
    advantages([apart], "mean")
    np.testing.assert_allclose(apart.advantages, [0.5, -0.5, 0, 0], rtol=1e-6)


def test_signal_is_that_of_tokens_where_they_have_their_own():
    made = group([1.0, 0.0])
    advantages([made])
    made.token_advantages = [np.zeros(1), np.zeros(1)]
    assert not made.has_signal
    made.token_advantages[1][0] = np.nan
    advantages([made])
    assert made.has_signal
    level = group([1.0, 1.0])
    level.token_advantages = [np.array([0.0, 0.5]), np.zeros(1)]
    advantages([level])
    assert level.has_signal


def test_a_function_in_place_of_a_scale():
    traced = []

    def over_best(rewards, *, where):
        traced.append(rewards.shape)
        best = jnp.max(rewards, axis=-1, keepdims=True, initial=-jnp.inf, where=where)
        return jnp.where(where, rewards - best, jnp.nan)  # padding isn't read

    for _ in range(2):
        first, second, other = group([1.0, 3.0]), group([5.0]), group([2.5, 2.5], prompt=1)
        advantages([first, other, second], over_best)
        assert traced == [SIZE]  # compiled once
        assert np.concatenate([first.advantages, second.advantages]).tolist() == [-4, -2, 0]
        assert not other.has_signal
        assert first.advantages.dtype == np.float32


def test_a_function_meets_rewards_as_they_are():
    """But for rounding: those that are equal in all but float64's last digits stay so."""

    def same(rewards, *, where):
        return rewards

    sums, odd = group([0.1 + 0.2, 0.3, 1.5]), group([np.inf, 1.0], prompt=1)
    set_advantages([sums, odd], scale=same, size=SIZE, cut_penalty=0.25)
    assert sums.advantages.tolist() == [np.float32(0.3), np.float32(0.3), 1.5]
    sums.cut = np.array([False, False, True])
    set_advantages([sums], scale=same, size=SIZE, cut_penalty=0.25)
    assert sums.advantages[2] == 1.25
    assert np.isnan(odd.advantages).all()


def test_a_functions_result_of_another_shape_is_refused():
    def baseline(rewards, *, where):
        return rewards.mean(-1)

    with pytest.raises(
        ValueError, match=r"result of scale=baseline has shape \(6,\), expected \(6, 8\)"
    ):
        advantages([group([1.0, 0.0])], baseline)
    with pytest.raises(ValueError, match="scale must be one of"):
        advantages([group([1.0, 0.0])], "max")
