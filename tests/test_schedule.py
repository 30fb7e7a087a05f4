"""Segments: which rows decode together changes no token, wastes little, and ends."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import assert_rounds_equal, random_prompts, random_snapshots

from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import KV, Decoder
from jaxreset.models.placement import param_shardings
from jaxreset.parallel import make_mesh
from jaxreset.run.compiles import compiles
from jaxreset.sampling import decoding, schedule
from jaxreset.sampling.decoding import Limits, decode
from jaxreset.sampling.drawing import idle_lanes
from jaxreset.sampling.rounds import Shape, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.sampling.schedule import Costs, LaneShape, lane_shapes, next_batch
from jaxreset.sampling.tokens import Draws
from jaxreset.steps import build_automaton

CPU, ACCELERATOR = Costs(8, 1e-2), Costs(256, 1e-2)


def simulate(wanted, shapes, *, prefix=64, costs=CPU):
    """Draws rows of the lengths `wanted` [N, K]; returns each segment's lanes, rows and steps."""
    lengths, segments = np.zeros_like(wanted), []
    most = np.full(len(wanted), wanted.max(initial=0))
    while batch := next_batch(lengths, lengths < wanted, most, shapes, prefix=prefix, costs=costs):
        groups, window = batch.groups[:, None], batch.shape.window
        own = lengths[groups, batch.rows]
        left = np.where(batch.live, np.minimum(wanted[groups, batch.rows], window) - own, 0)
        assert (left[batch.live] > 0).all()
        cells = np.stack(np.broadcast_arrays(groups, batch.rows), -1)[batch.live]
        assert len(np.unique(cells, axis=0)) == len(cells)  # no row twice
        # The segment ends with the step after which at most `leave` lanes can go on.
        assert (left > 0).sum() > batch.leave
        steps = np.sort(left.ravel())[::-1][batch.leave]
        np.add.at(lengths, (groups, batch.rows), np.minimum(left, steps))
        segments.append((batch, int(steps)))
    np.testing.assert_array_equal(lengths, wanted)
    return segments


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_row_is_drawn_to_its_end_in_the_shapes_that_were_compiled(data):
    groups, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    size, prefix = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 600))
    slots = data.draw(st.none() | st.integers(1, 80))
    shards = data.draw(st.sampled_from([1, 2, 4]))
    groups = -(-groups // shards) * shards
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    wanted = rng.integers(0, size + 1, (groups, rows))
    shapes = lane_shapes(groups, rows, prefix, size, slots=slots, shards=shards)
    assert {shape[:2] for shape in shapes if shape.window == size} == {s[:2] for s in shapes}
    assert all(shape.groups % shards == 0 for shape in shapes)
    if slots is not None:
        most = max(slots, rows * shards, 2 * shards)
        assert all(shape.groups * shape.rows <= most for shape in shapes)
    simulate(wanted, shapes, prefix=prefix)


def long_tail(rng, shape, *, median=40, most=512):
    return np.clip(rng.lognormal(np.log(median), 1.0, shape), 1, most).astype(int)


def test_few_lanes_idle_although_lengths_have_a_long_tail():
    wanted = long_tail(np.random.default_rng(0), (128, 8))
    segments = simulate(wanted, lane_shapes(128, 8, 64, 512, slots=64))
    spent = sum(steps * batch.live.size for batch, steps in segments)
    assert wanted.sum() / spent > 0.8
    # A batch that is never changed waits for the longest of its 64 rows.
    static = 64 * wanted.reshape(-1, 64).max(1).sum()
    assert wanted.sum() / static < 0.3


@pytest.mark.parametrize("costs", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])
def test_a_batch_of_all_rows_shrinks_as_they_end(costs):
    wanted = long_tail(np.random.default_rng(1), (32, 8))
    segments = simulate(wanted, lane_shapes(32, 8, 64, 512), costs=costs)
    lanes = [batch.live.size for batch, _ in segments]
    assert lanes[0] == 256
    assert lanes[-1] <= 16
    spent = sum(steps * batch.live.size for batch, steps in segments)
    assert wanted.sum() / spent > (0.6 if costs is CPU else 0.55)  # there idle lanes cost little
    assert wanted.sum() / (wanted.max() * wanted.size) < 0.2
    if costs is ACCELERATOR:  # where few rows cost as much as many, they decode together
        assert sum(steps for _, steps in segments) < 1.2 * wanted.max()


# Exactness


@pytest.fixture(scope="module")
def make_sampler(automaton):
    shape = Shape(4, 4, 44, 32)  # of prompts and of resets, so that both share their programs

    def make(**options):
        return Sampler(
            automaton,
            StopRules(max_response=32, max_steps=9, max_step_tokens=12),
            eos_ids=(1,),
            shapes=[shape],
            forks=[(shape, shape)],
            **options,
        )

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("dtype", "slots"), [("float64", None), ("float64", 8), ("float32", 8)], ids=str
)
def test_segments_change_no_token(policies, make_sampler, monkeypatch, dtype, slots):
    """Narrow windows, rows that wait and batches that shrink draw what one plain loop draws."""
    policy, atol = policies[dtype], {"float64": 1e-9, "float32": 1e-5}[dtype]

    def rounds(sampler):
        base = sampler.sample(policy, random_prompts(4), rows=4, stream=Stream(seed), **draw)
        snapshots = random_snapshots(base, 4, seed)
        reset = sampler.resume(policy, snapshots, rows=4, stream=Stream(seed, phase=1), **draw)
        snapshots = random_snapshots(reset, 3, seed)
        return base, reset, sampler.resume(policy, snapshots, rows=4, stream=Stream(seed, phase=2))

    plain = make_sampler(threads=1)
    segmented = make_sampler(slots=slots, threads=1 if slots is None else 2)
    with jax.enable_x64(dtype == "float64"):
        for seed in range(6):
            draw = {"temperature": [0.0, 1.0, 0.7][seed % 3]}
            monkeypatch.setattr(schedule, "MIN_WINDOW", 64)
            expected = rounds(plain)
            for r in expected:  # all lanes, until the longest row ends
                assert r.lane_steps == r.lengths.max() * r.shape.groups * r.shape.rows
            monkeypatch.setattr(schedule, "MIN_WINDOW", 8)  # windows of 8 and 32 slots
            monkeypatch.setattr(schedule, "MIN_LANES", 2)
            for ours, theirs in zip(rounds(segmented), expected, strict=True):
                assert_rounds_equal(ours, theirs, atol=atol)
                longest = theirs.lengths == theirs.lengths.max()
                # A batch shrinks by half, so not where most rows go on until the end.
                at_most = theirs.lane_steps - (2 * longest.sum() <= longest.size)
                assert ours.lane_steps <= at_most


@pytest.mark.parametrize("hold_cache", ["always", "never"])
def test_a_round_that_is_not_held_is_prefilled_again(policy64, make_sampler, hold_cache):
    sampler = make_sampler(hold_cache=hold_cache)
    sampler.compile(policy64)
    before = compiles()
    base = sampler.sample(policy64, random_prompts(4), rows=4, stream=Stream(1))
    assert (base.held == ()) == (hold_cache == "never")
    snapshots = random_snapshots(base, 4, 1)
    branches = sampler.resume(policy64, snapshots, rows=4, stream=Stream(2))
    assert compiles() == before
    kept = [s.length - int(base.prompt_lengths[s.group]) for s in snapshots]
    fresh = Sampler(sampler.automaton, sampler.stop, eos_ids=(1,), shapes=[branches.shape]).sample(
        policy64,
        [s.tokens for s in snapshots],
        kept=kept,
        ids=[int(base.ids[s.group]) for s in snapshots],
        rows=4,
        stream=Stream(2),
    )
    assert_rounds_equal(branches, fresh)


# Programs


def small_round(prefix, size, rows):
    """A compiled `decode` of 8 rows of one prefix, or of 8 prefixes of one row."""
    config = DecoderConfig(
        vocab=28, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, dtype="float32"
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    groups = 8 // rows

    def store(*around, slots):
        around = (2, groups, *around, 2)
        keys, values = (*around, 8, slots), (*around, slots, 8)
        return (KV(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in (keys, values))),)

    automaton = build_automaton([b"\n"] * 28, delimiter="\n", vocab_size=28)
    i32, f32 = np.int32(0), np.float32(1)
    lowered = decode.lower(
        params,
        store(slots=prefix),
        store(rows, slots=size),
        idle_lanes(LaneShape(groups, rows, size), in_place=True),
        automaton,
        Limits(i32, i32, i32, i32, np.zeros(1, np.int32)),
        Draws(f32, f32, i32, i32, *np.zeros((3, 1), np.uint32)[:, 0]),
        i32,
        graph=graph,
        window=size,
    )
    return lowered.compile().memory_analysis()


@pytest.mark.slow
def test_memory_grows_as_one_prefix_and_the_suffixes():
    """P + 8 * S slots, not 8 * (P + S), of what the compiled program takes and makes."""

    def peak(prefix, size, rows=8):
        m = small_round(prefix, size, rows)
        return (
            m.argument_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes
            + m.temp_size_in_bytes
        )

    slot = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, heads, width, float32
    start, step = peak(1024, 256), 1024
    by_prefix = (peak(1024 + step, 256) - start) / (slot * step)
    by_suffix = (peak(1024, 256 + step) - start) / (slot * step)
    unshared = (peak(1024 + step, 256, rows=1) - peak(1024, 256, rows=1)) / (slot * step)
    assert 1 <= by_prefix < 3  # the prefix, and scores of the rows
    assert 8 <= by_suffix < 24
    assert unshared >= 8


@pytest.mark.slow
def test_no_weights_are_gathered_inside_the_decoding_loop(policy32, automaton):
    """On a mesh with fsdp, a step exchanges activations, never parameters or caches."""
    mesh = make_mesh(2, 2, 2)
    params = jax.device_put(policy32.params, param_shardings(mesh, policy32.params))
    policy = policy32.with_params(params, policy32.version)
    shape = Shape(4, 4, 16, 32)
    seen = []

    def spy(*args, **options):
        seen.append(decode.lower(*args, **options).compile().as_text())
        return decode(*args, **options)

    sampler = Sampler(automaton, StopRules(32), shapes=[shape], mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "decode", spy)
        sampler.sample(policy, random_prompts(4), rows=4, stream=Stream(0))
    # Elements of what all-gathers make: a row's query or activations at most, no weights, no cache.
    inside = [line for line in seen[0].splitlines() if "/while/body" in line]
    assert any("all-reduce" in line for line in inside)  # so the loop was looked at
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", "\n".join(inside))
    smallest_weight = TINY.width * TINY.kv_heads * TINY.head_dim
    for dimensions in gathered:
        assert np.prod([int(d) for d in dimensions.split(",") if d]) < smallest_weight, dimensions
