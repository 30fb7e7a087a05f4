"""Streams and lanes: however a round is dealt out and moved about, every row keeps what it drew."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import assert_rounds_equal, random_prompts, random_snapshots
from test_schedule import CPU

from jaxreset.models.decoder import KV
from jaxreset.sampling import programs, schedule
from jaxreset.sampling.lanes import LaneCache, page_rows
from jaxreset.sampling.rounds import Shape, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.sampling.schedule import lane_shapes, next_batch
from jaxreset.sampling.threads import deal, run_side_by_side

# Streams


@given(st.integers(1, 200), st.integers(1, 64))
def test_every_group_is_dealt_to_one_stream_and_none_is_empty(count, most):
    parts = deal(count, most)
    assert [g for part in parts for g in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert len(parts) == min(count, most)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == -(-count // most)  # what a stream's programs have room for


def test_the_error_of_a_stream_is_raised():
    def fail():
        raise ValueError("of one stream")

    with pytest.raises(ValueError, match="of one stream"):
        run_side_by_side([lambda: 1, fail, lambda: 3])


def test_threads_compute_with_the_settings_of_their_caller():
    def seen():
        return jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision

    with jax.enable_x64(True), jax.default_matmul_precision("float32"):
        assert run_side_by_side([seen] * 3) == [(True, "float32")] * 3
    assert run_side_by_side([seen] * 3) == [(False, None)] * 3


@pytest.fixture(scope="module", autouse=True)
def narrow_windows():
    """Responses of 100 tokens take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "MIN_WINDOW", 16)
        yield


@pytest.fixture(scope="module")
def make_sampler(automaton):
    base, child = Shape(5, 4, 12, 24), Shape(11, 4, 36, 24)

    def make(**options):
        return Sampler(
            automaton,
            StopRules(max_response=24, max_steps=6, max_step_tokens=9),
            eos_ids=(1,),
            shapes=[base],
            forks=[(base, child), (child, child)],
            **options,
        )

    return make


def three_rounds(sampler, policy, seed):
    """A base round, branches from all over it, and branches of those."""
    round_ = sampler.sample(policy, random_prompts(5), rows=4, stream=Stream(seed))
    rounds = [round_]
    for phase in (1, 2):
        snapshots = random_snapshots(round_, 11 - phase, seed)
        round_ = sampler.resume(policy, snapshots, rows=4, stream=Stream(seed, phase=phase))
        rounds.append(round_)
    return rounds


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "options",
    [{"threads": 2}, {"threads": 3, "slots": 24}, {"threads": 3, "hold_cache": "never"}],
    ids=str,
)
def test_threads_draw_what_one_draws(policy64, make_sampler, options):
    one, several = make_sampler(threads=1), make_sampler(**options)
    for seed in range(3):
        drawn = (three_rounds(sampler, policy64, seed) for sampler in (one, several))
        for ours, theirs in zip(*drawn, strict=True):
            assert_rounds_equal(ours, theirs)
            assert len(ours.held) == 1
            assert len(theirs.held) == (0 if "hold_cache" in options else options["threads"])


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_no_more_rows_decode_at_once_than_slots_allow(policy32, make_sampler):
    prompts = random_prompts(5)
    for slots, parts in ((4, 1), (8, 2), (11, 2), (12, 3), (400, 3)):
        drawn = make_sampler(threads=3, slots=slots).sample(
            policy32, prompts, rows=4, stream=Stream(0)
        )
        assert len(drawn.held) == parts


def test_samplers_share_the_layout_of_a_policy(policy32, make_sampler):
    policy = policy32.with_params(policy32.params, 1)
    one, other = (make_sampler()._programs.layout(policy)[1] for _ in range(2))
    assert one is other
    assert policy in programs._LAYOUTS
    count = len(programs._LAYOUTS)
    del policy
    assert len(programs._LAYOUTS) == count - 1  # the copy goes with the policy


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_the_layout_of_accelerators_draws_the_same(policy64, make_sampler):
    """There all layers are in one stack, and one loop runs over them."""
    there = make_sampler()
    there._programs._on_cpu = False
    for ours, theirs in zip(
        three_rounds(make_sampler(), policy64, 1), three_rounds(there, policy64, 1), strict=True
    ):
        assert_rounds_equal(ours, theirs)
        (part,) = theirs.held
        assert [len(stack.keys) for stack in part.prefix] == [policy64.config.layers]
        assert len(ours.held[0].prefix) == policy64.config.layers


# Lanes


class Numpy:
    """`lanes.Moves` in plain numpy, on stores of one number a slot."""

    def empty(self, groups, rows, slots):
        return (KV(np.zeros((1, groups, rows, 1, 1, slots), int), None),)

    def move(self, source, target, moved):
        width = min(store[0].keys.shape[-1] for store in (source, target))
        for a, b, c, d, chosen in zip(*moved.source, *moved.target, moved.chosen, strict=True):
            if chosen:
                target[0].keys[0, c, d, ..., :width] = source[0].keys[0, a, b, ..., :width]
        return target


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_row_is_found_on_its_page(data):
    groups, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    size, slots = data.draw(st.integers(1, 300)), data.draw(st.none() | st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    wanted = np.clip(rng.geometric(4 / (3 + size), (groups, rows)), 1, size)
    moves, lengths, batch = Numpy(), np.zeros((groups, rows), int), None
    shapes = lane_shapes(groups, rows, 70, size, slots=slots)
    hold = data.draw(st.booleans())
    cache = LaneCache(moves, (groups, rows), size, full=shapes[0][:2], hold=hold)
    most = np.full(groups, size)
    while batch := next_batch(
        lengths, lengths < wanted, most, shapes, prefix=70, costs=CPU, before=batch
    ):
        own = cache.enter(batch)
        window = batch.shape.window
        assert own[0].keys.shape[1:] == (*batch.live.shape, 1, 1, size)
        left = []
        for m, k in np.argwhere(batch.live):
            row = batch.groups[m], batch.rows[m, k]
            # What a row has drawn comes with it.
            names = np.arange(lengths[row]) + 1000 * (row[0] * rows + row[1]) + 1
            np.testing.assert_array_equal(own[0].keys[0, m, k, 0, 0, : lengths[row]], names)
            left.append(min(wanted[row], window) - lengths[row])
        steps = sorted(left)[-1 - batch.leave]
        for (m, k), can in zip(np.argwhere(batch.live), left, strict=True):
            row = batch.groups[m], batch.rows[m, k]
            end = lengths[row] + min(can, steps)
            # Each slot holds the name of the row and of the token.
            names = np.arange(lengths[row], end) + 1000 * (row[0] * rows + row[1]) + 1
            own[0].keys[0, m, k, 0, 0, lengths[row] : end] = names
            lengths[row] = end
        cells = batch.groups[:, None], batch.rows
        cache.leave(own, lengths[cells] >= wanted[cells])
    if not hold:
        return
    pages = cache.finish()
    for row in np.ndindex(groups, rows):
        page = pages.stores[pages.page[row]][0].keys
        found = page[0].reshape(-1, page.shape[-1])[pages.cell[row], : wanted[row]]
        np.testing.assert_array_equal(
            found, np.arange(wanted[row]) + 1000 * (row[0] * rows + row[1]) + 1
        )
    # Pages hold a few rows too many, and windows four times what a row needs at most.
    kept = sum(page[0].keys.size for page in pages.stores.values())
    widths = {page[0].keys.shape[-1] for page in pages.stores.values()}
    if next(iter(pages.stores.values()))[0].keys.shape[1:3] != (groups, rows):
        spare = sum(2 * page_rows(width) * width for width in widths)
        assert kept <= spare + 4 * np.maximum(wanted, 32).sum()


@pytest.mark.slow
def test_only_rounds_that_a_fork_goes_back_to_are_held(policy32, make_sampler):
    sampler = make_sampler()
    base = sampler.sample(policy32, random_prompts(5), rows=4, stream=Stream(0))
    assert base.held
    evaluated = Sampler(sampler.automaton, sampler.stop, shapes=sampler.shapes, forks=[])
    assert not evaluated.sample(policy32, random_prompts(5), rows=4, stream=Stream(0)).held
