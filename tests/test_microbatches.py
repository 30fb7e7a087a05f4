"""Groups laid into microbatches: nothing lost, nothing twice, and little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreset.groups import Group
from jaxreset.learning.microbatches import GroupBatch, PackShape, empty_batch, pack, pack_shapes

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
SHAPES = [PackShape(bins, 8, width, 9) for width in (20, 40) for bins in (6, 1)]


def make_group(rng, prefix, lengths):
    """A group of these sizes; every number in it is positive."""
    return Group(
        prompt=0,
        prefix=rng.integers(1, 1000, prefix).astype(np.int32),
        suffixes=[rng.integers(1, 1000, n).astype(np.int32) for n in lengths],
        behavior_logps=[rng.uniform(0.1, 5, n).astype(np.float32) for n in lengths],
        rewards=np.zeros(len(lengths)),
        advantages=rng.uniform(0.1, 2, len(lengths)).astype(np.float32),
    )


@st.composite
def ragged_groups(draw):
    """A group that a bin of `SHAPES` holds, with advantages of rows or of tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    group = make_group(rng, draw(st.integers(1, 21)), lengths)
    if draw(st.booleans()):
        group.token_advantages = [rng.uniform(0.1, 2, n).astype(np.float32) for n in lengths]
    return group


def unpacked(batch: GroupBatch) -> list[tuple]:
    """Every suffix: its input as one sequence, targets, log-probabilities and advantages."""
    packing, found = batch.packing, []
    for i, c in np.argwhere(batch.lengths):
        length = batch.lengths[i, c]
        lane, slots = np.divmod(batch.cells[i, c, :length], batch.rows.shape[-1])
        cells = i, lane, slots
        assert len(set(lane)) == len(set(packing.suffixes[cells])) == 1
        (group,) = set(packing.groups[cells])
        mine = packing.prefix_groups[i] == group
        positions = [*packing.prefix_positions[i, mine], *packing.positions[cells]]
        assert positions == list(range(mine.sum() + length))
        others = packing.suffixes[i, lane[0]] == packing.suffixes[cells][0]
        assert others.sum() == length  # nothing else in the lane has its id
        found.append(
            (
                [*batch.prefix[i, mine].tolist(), *batch.rows[cells].tolist()],
                batch.targets[cells].tolist(),
                batch.behavior_logps[i, c, :length].tolist(),
                batch.advantages[i, c, :length].tolist(),
            )
        )
    return found


def suffixes_of(groups) -> list[tuple]:
    """The same of groups: inputs are all tokens but the last."""
    return [
        ([*g.prefix.tolist(), *s.tolist()[:-1]], s.tolist(), logps.tolist(), advantages.tolist())
        for g in groups
        for s, logps, advantages in zip(
            g.suffixes,
            g.behavior_logps,
            g.token_advantages or map(np.full, map(len, g.suffixes), g.advantages),
            strict=True,
        )
        if len(s)
    ]


@repeatable
@given(groups=st.lists(ragged_groups(), max_size=30))
def test_every_suffix_is_packed_once_behind_its_prefix_and_the_rest_is_zero(groups):
    batches = pack(groups, SHAPES)
    found = [suffix for batch in batches for suffix in unpacked(batch)]
    assert sorted(found) == sorted(suffixes_of(groups))
    for batch in batches:
        n, k, s = batch.rows.shape
        shape = PackShape(n, k, batch.prefix.shape[1], s)
        assert shape in SHAPES
        assert batch.prefix.shape == (n, shape.prefix)
        assert batch.targets.shape == (n, k, s)
        assert batch.lengths.shape == batch.cells.shape[:2]
        assert batch.advantages.shape == batch.behavior_logps.shape == batch.cells.shape
        assert batch.slots == n * (shape.prefix + k * s)
        # All entries of a group are positive, so counting them counts what isn't padding.
        tokens = np.count_nonzero(batch.targets)
        for field in (batch.rows, batch.packing.groups, batch.packing.suffixes):
            assert np.count_nonzero(field) == tokens
        assert np.count_nonzero(batch.behavior_logps) == batch.lengths.sum() == tokens
        assert np.count_nonzero(batch.advantages) == tokens
        assert np.count_nonzero(batch.prefix) == batch.tokens - tokens
    with_tokens = [g for g in groups if g.tokens]
    assert sum(b.tokens for b in batches) == sum(len(g.prefix) - 1 + g.tokens for g in with_tokens)


def test_a_group_at_the_limits_fills_a_bin():
    rng = np.random.default_rng(0)
    full = make_group(rng, 21, [9] * 8)
    (batch,) = pack([full], SHAPES)
    assert batch.prefix.shape == (1, 20)
    assert batch.tokens == batch.slots
    assert batch.prefix[0].tolist() == full.prefix[:-1].tolist()
    assert batch.rows[0, :, 0].tolist() == [full.prefix[-1]] * 8  # fed again by each suffix


@pytest.mark.parametrize(
    ("lengths", "prefix"), [([1] * 33, 2), ([2] * 4, 22), ([2, 10], 2)], ids=str
)
def test_a_group_that_no_bin_holds_is_refused_with_its_sizes(lengths, prefix):
    odd = make_group(np.random.default_rng(0), prefix, lengths)
    sizes = rf"\({len(lengths)}, {prefix}, {max(lengths)}\) fits in no bin of .*lanes=8"
    with pytest.raises(ValueError, match=sizes):
        pack([odd], SHAPES)


@pytest.mark.parametrize("shapes", [[(2,), (1,)], [(2,), (3, 1)], [(2,)], [(2,), ()]])
def test_advantages_that_are_not_one_for_each_token_are_refused(shapes):
    odd = make_group(np.random.default_rng(0), 2, [2, 3])
    odd.token_advantages = [np.ones(shape) for shape in shapes]
    with pytest.raises(
        ValueError, match=r"token_advantages have shapes \[\(2,\).* of \[2, 3\] tokens"
    ):
        pack([odd], SHAPES)


def test_packing_nothing_and_an_empty_batch():
    rng = np.random.default_rng(0)
    assert pack([], SHAPES) == pack([make_group(rng, 4, [0, 0])], SHAPES) == []
    batch = empty_batch(SHAPES[1])
    assert batch.tokens == 0
    assert len(batch.prefix) == 1


def test_sizes_of_microbatches_are_within_the_budget_and_divide_over_the_shards():
    shapes = pack_shapes(8, 100, 50, tokens=50_000, shards=4)
    assert [s.bins for s in shapes] == [100, 12, 92, 8]
    assert max(s.bins * (s.prefix + s.lanes * s.slots) for s in shapes) <= 50_000
    # A long prefix leaves one width, and a small budget one size: a bin for each shard.
    assert pack_shapes(8, 200, 50, tokens=10, shards=4) == [PackShape(4, 8, 200, 50)]
    # A wider bin than fits would only take memory, so where none does the least is taken.
    assert pack_shapes(8, 100, 50, tokens=2000, shards=4) == [PackShape(4, 8, 100, 50)]
    assert pack_shapes(8, 100, 200, tokens=2000, shards=4) == [PackShape(4, 8, 100, 200)]


def grade_school_groups(rng, count, *, resets):
    """Prompts and responses about as long as GSM8K's: groups of 8, or base and reset groups of 4."""

    def lengths(median, spread, most, size=None):
        return np.clip(median * np.exp(spread * rng.normal(size=size)), 8, most).astype(int)

    groups = []
    for _ in range(count):
        prompt = lengths(110, 0.35, 256)
        groups.append(make_group(rng, prompt, lengths(150, 0.4, 512, 4 if resets else 8)))
        if resets:
            kept = int(rng.uniform() * lengths(150, 0.4, 512))
            groups.append(make_group(rng, prompt + kept, lengths(90, 0.6, 512 - kept, 4)))
    return groups


@pytest.mark.parametrize("resets", [True, False])
def test_little_is_padding_at_lengths_like_those_of_grade_school_problems(resets):
    shapes = pack_shapes(8, 767 if resets else 255, 512, tokens=32_768)
    shares = []
    for seed in range(6):
        groups = grade_school_groups(np.random.default_rng(seed), 32, resets=resets)
        batches = pack(groups, shapes)
        shares.append(1 - sum(b.tokens for b in batches) / sum(b.slots for b in batches))
    assert np.mean(shares) < 0.2, shares
