"""Advantages across groups, and groups laid into microbatches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreset.groups import Group, GroupBatch, PackShape, empty_batch, pack, set_advantages

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
    return centred / np.std(rewards) if np.std(rewards) > 1e-8 else 0 * centred


@pytest.mark.parametrize("scale", ["std", "sample_std", "none"])
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
def test_rewards_that_are_not_finite_are_refused(bad):
    good = group([1.0, 0.0])
    with pytest.raises(ValueError, match=r"rewards of prompt 3 aren't finite: .*(nan|inf)"):
        set_advantages([good, group([0.0, bad], prompt=3)], scale="std", size=SIZE)
    assert good.advantages.size == 0  # nothing was set


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


# ---- packing ----

SHAPES = (PackShape(2, 4, 4, 3), PackShape(3, 4, 9, 3), PackShape(2, 8, 9, 6))


@st.composite
def ragged_groups(draw, rows=8, prefix=9, suffix=6):
    """A group that the last of `SHAPES` holds; every number in it is positive."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k = draw(st.integers(1, rows))
    lengths = draw(st.lists(st.integers(1, suffix), min_size=k, max_size=k))
    made = Group(
        prompt=0,
        prefix=rng.integers(1, 1000, draw(st.integers(1, prefix))).astype(np.int32),
        suffixes=[rng.integers(1, 1000, n).astype(np.int32) for n in lengths],
        behavior_logps=[rng.uniform(0.1, 5, n).astype(np.float32) for n in lengths],
        rewards=np.zeros(k),
    )
    made.advantages = rng.uniform(0.1, 2, k).astype(np.float32)
    return made


def unpacked(batch: GroupBatch, i: int) -> tuple:
    """Group i of a batch by its lengths; prefix and row inputs as one sequence."""
    held, rows = batch.prefix_lengths[i], np.flatnonzero(batch.lengths[i])
    prefix = batch.prefix[i, :held].tolist()
    sequences, targets, logps = [], [], []
    for j in rows:
        n = batch.lengths[i, j]
        sequences.append(prefix + batch.rows[i, j, :n].tolist())
        targets.append(batch.targets[i, j, :n].tolist())
        logps.append(batch.behavior_logps[i, j, :n].tolist())
    return sequences, targets, logps, batch.advantages[i, rows].tolist()


def as_packed(g: Group) -> tuple:
    """The same of a group: inputs are all tokens but the last."""
    sequences = [[*g.prefix.tolist(), *s.tolist()[:-1]] for s in g.suffixes]
    suffixes = [s.tolist() for s in g.suffixes]
    return sequences, suffixes, [x.tolist() for x in g.behavior_logps], g.advantages.tolist()


def first_fit(g: Group) -> PackShape:
    longest = max(len(s) for s in g.suffixes)
    return next(
        s
        for s in SHAPES
        if len(g.suffixes) <= s.rows and len(g.prefix) <= s.prefix and longest <= s.suffix
    )


@repeatable
@given(groups=st.lists(ragged_groups(), max_size=9))
def test_every_token_is_packed_once_into_the_smallest_shape_and_the_rest_is_zero(groups):
    batches = pack(groups, SHAPES)
    by_shape = {shape: [g for g in groups if first_fit(g) == shape] for shape in SHAPES}
    expected = [
        (shape, members[i : i + shape.groups])
        for shape, members in by_shape.items()
        for i in range(0, len(members), shape.groups)
    ]
    assert len(batches) == len(expected)
    for batch, (shape, members) in zip(batches, expected, strict=True):
        n, k, p, s = shape
        assert batch.prefix.shape == (n, p)
        assert batch.lengths.shape == batch.advantages.shape == (n, k)
        assert batch.rows.shape == batch.targets.shape == batch.behavior_logps.shape == (n, k, s)
        for i, member in enumerate(members):
            assert unpacked(batch, i) == as_packed(member)
        # All entries of a group are positive, so counting them counts what isn't padding.
        tokens = sum(g.tokens for g in members)
        for field in (batch.rows, batch.targets, batch.behavior_logps):
            assert np.count_nonzero(field) == tokens
        assert batch.lengths.sum() == tokens
        held = sum(len(g.prefix) - 1 for g in members)
        assert np.count_nonzero(batch.prefix) == batch.prefix_lengths.sum() == held
        assert np.count_nonzero(batch.advantages) == sum(len(g.suffixes) for g in members)
        for field, kind in zip(batch, "iiiiiff", strict=True):
            assert (field.dtype.kind, field.dtype.itemsize) == (kind, 4)


def test_packing_keeps_a_group_at_the_limits():
    full = Group(
        prompt=0,
        prefix=np.arange(1, 5, dtype=np.int32),
        suffixes=[np.arange(5, 8, dtype=np.int32)] * 4,
        behavior_logps=[np.full(3, -0.5, np.float32)] * 4,
        rewards=np.zeros(4),
        advantages=np.ones(4, np.float32),
    )
    (batch,) = pack([full], SHAPES)
    assert batch.prefix.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]
    assert batch.rows[0].tolist() == [[4, 5, 6]] * 4  # the last prefix token is fed again
    assert batch.targets[0].tolist() == [[5, 6, 7]] * 4
    assert batch.lengths.tolist() == [[3] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("rows", "prefix", "suffix"),
    [(9, 2, 2), (2, 10, 2), (2, 2, 7)],
    ids=["rows", "prefix", "suffix"],
)
def test_a_group_that_fits_nowhere_is_refused_with_its_sizes(rows, prefix, suffix):
    short = [np.ones(1, np.int32)] * (rows - 1)
    odd = Group(
        prompt=0,
        prefix=np.ones(prefix, np.int32),
        suffixes=[*short, np.ones(suffix, np.int32)],
        behavior_logps=[],
        rewards=np.zeros(rows),
    )
    with pytest.raises(
        ValueError, match=rf"\({rows}, {prefix}, {suffix}\) fits none of .*groups=2"
    ):
        pack([odd], SHAPES)


def test_packing_nothing_and_an_empty_batch():
    assert pack([], SHAPES) == []
    for field in empty_batch(SHAPES[1]):
        assert not field.any()
        assert field.shape[0] == 3
