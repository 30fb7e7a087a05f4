"""The sampler: resets equal fresh prompts, honest log-probabilities, named randomness, stops."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from scipy import stats

from jaxreset.groups import Group
from jaxreset.learning.microbatches import PackShape, pack
from jaxreset.learning.update import exists, score
from jaxreset.run.compiles import compiles
from jaxreset.sampling.checks import check_snapshots
from jaxreset.sampling.rounds import Shape, Snapshot, StopReason, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.spelling import token_bytes
from jaxreset.steps import build_automaton

VOCAB = TINY.vocab
CUTS = 200
NEAR_TIE = 1e-4
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
TRUNCATIONS = [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 7, "top_p": 0.8}]

trained_logps = jax.jit(
    score.__wrapped__,
    static_argnames=("graph", "remat"),
    compiler_options={"xla_backend_optimization_level": 0},
)


def random_prompts(count=8, *, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest + 1)) for _ in range(count)]


def all_rows(round_):
    return list(np.ndindex(*round_.lengths.shape))


def random_snapshots(round_, count, seed):
    """Cuts anywhere: in the kept prefix, inside steps, at the prompt's end, at the row's end."""
    rng = np.random.default_rng(seed)
    snapshots = []
    for _ in range(count):
        group, row = (int(rng.integers(size)) for size in round_.lengths.shape)
        shortest = round_.prompt_lengths[group]
        longest = len(round_.prefixes[group]) + round_.lengths[group, row]
        length = int(rng.choice([shortest, longest, rng.integers(shortest, longest + 1)]))
        # A full response has no room for more: see the test of the limits of what is kept.
        length = min(length, int(shortest) + 23)
        snapshots.append(Snapshot(round_, group, row, length))
    return snapshots


def whole_rows(round_, size=40):
    """Every row as one right-padded sequence: [rows, size], padded to 200 rows to compile once."""
    out = np.zeros((CUTS, size), np.int32)
    for i, (group, row) in enumerate(all_rows(round_)):
        tokens = np.concatenate([round_.prefixes[group], round_.suffix(group, row)])
        out[i, : len(tokens)] = tokens
    return out


def teacher_forced(policy, round_, temperature=1.0):
    """log-softmax(logits / T) at each drawn token, by one causal pass: a [tokens, V] per row."""
    logits = np.asarray(policy.logits(whole_rows(round_)), np.float64) / np.float32(temperature)
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    starts = [len(round_.prefixes[group]) - 1 for group, _ in all_rows(round_)]
    counts = round_.lengths.ravel()
    return [logps[i, s : s + n] for i, (s, n) in enumerate(zip(starts, counts, strict=True))]


def assert_rows_equal(policy, resumed, fresh):
    """The same rows; in float32, up to where the two best logits nearly tie."""
    logps = teacher_forced(policy, fresh)
    for n, best in enumerate(logps):
        ours, theirs = resumed.suffix(n, 0), fresh.suffix(n, 0)
        if policy.config.dtype == "float32":
            ordered = np.sort(best, axis=-1)
            (ties,) = np.nonzero(ordered[:, -1] - ordered[:, -2] <= NEAR_TIE)
            if ties.size:
                ours, theirs = ours[: ties[0]], theirs[: ties[0]]
        np.testing.assert_array_equal(ours, theirs, err_msg=f"snapshot {n}")


# Resets


@pytest.mark.slow
def test_greedy_resume_equals_a_fresh_prompt_at_200_cuts_of_two_generations(policy, sampler):
    base = sampler.sample(policy, random_prompts(), rows=4, stream=Stream(1))
    snapshots, seen = random_snapshots(base, CUTS, seed=2), Counter()
    for generation in (1, 2):
        resumed = sampler.resume(policy, snapshots, rows=1, stream=Stream(0), temperature=0)
        kept = [s.length - int(s.round.prompt_lengths[s.group]) for s in snapshots]
        prompts = [s.tokens for s in snapshots]
        fresh = sampler.sample(policy, prompts, kept=kept, rows=1, stream=Stream(0), temperature=0)
        assert_rows_equal(policy, resumed, fresh)
        if policy.config.dtype == "float64":
            np.testing.assert_array_equal(resumed.reasons, fresh.reasons)
            np.testing.assert_array_equal(resumed.lengths, fresh.lengths)
        for s, k in zip(snapshots, kept, strict=True):
            boundaries = {0, *(end for _, end in sampler.steps(s.round.response(s.group, s.row)))}
            seen["prompt only", generation] += k == 0
            seen["inside a step", generation] += k not in boundaries
            seen["inside the prefix", generation] += 0 < s.length < len(s.round.prefixes[s.group])
        # The second generation resumes a resumed round, drawn with some variety.
        parent = sampler.resume(policy, snapshots, rows=1, stream=Stream(3))
        np.testing.assert_array_equal(parent.prompt_lengths, resumed.prompt_lengths)
        snapshots = random_snapshots(parent, CUTS, seed=4)
    assert seen.pop(("inside the prefix", 1)) == 0  # a prompt isn't cut
    assert min(seen.values()) > 20


def test_snapshot_before_a_step_keeps_the_steps_before_it(policy64, sampler):
    base = sampler.sample(policy64, random_prompts(), rows=4, stream=Stream(1))
    for group, row in all_rows(base):
        response, prompt = base.response(group, row), base.prompt(group)
        spans = sampler.steps(response)
        for step, (start, _) in enumerate(spans, start=1):
            snapshot = sampler.snapshot(base, group, row, before_step=step)
            expected = np.concatenate([prompt, response[:start]])
            np.testing.assert_array_equal(snapshot.tokens, expected)
        with pytest.raises(ValueError, match=f"before_step=0: .* steps 1 to {len(spans)}"):
            sampler.snapshot(base, group, row, before_step=0)
        with pytest.raises(ValueError, match=f"before_step={len(spans) + 1}"):
            sampler.snapshot(base, group, row, before_step=len(spans) + 1)


# Log-probabilities


def as_groups(round_):
    rows = range(round_.lengths.shape[1])
    return [
        Group(
            prompt=group,
            prefix=prefix,
            suffixes=[round_.suffix(group, row) for row in rows],
            behavior_logps=[
                round_.behavior_logps[group, row, : round_.lengths[group, row]] for row in rows
            ],
            rewards=np.zeros(len(rows)),
            advantages=np.zeros(len(rows)),
        )
        for group, prefix in enumerate(round_.prefixes)
    ]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_logps_agree_with_a_teacher_forced_pass_and_with_the_trainer(policy, sampler, truncation):
    tolerance = TOLERANCE[policy.config.dtype]
    draw = {"temperature": 0.7} | truncation
    base = sampler.sample(policy, random_prompts(), rows=4, stream=Stream(5), **draw)
    snapshots = random_snapshots(base, CUTS, seed=6)
    resumed = sampler.resume(policy, snapshots, rows=1, stream=Stream(7), **draw)
    for round_, shape in ((base, PackShape(8, 4, 12, 24)), (resumed, PackShape(200, 1, 36, 24))):
        forced = teacher_forced(policy, round_, temperature=0.7)
        for (group, row), logps in zip(all_rows(round_), forced, strict=True):
            tokens = round_.suffix(group, row)
            places = np.arange(len(tokens)), tokens
            behavior = round_.behavior_logps[group, row, : len(tokens)]
            np.testing.assert_allclose(behavior, logps[places], rtol=0, atol=tolerance)
            kept = np.stack([truncated(step, **truncation) for step in logps])
            sampling = round_.sampling_logps[group, row, : len(tokens)]
            np.testing.assert_allclose(sampling, kept[places], rtol=0, atol=tolerance)
        (batch,) = pack(as_groups(round_), [shape])
        rest = nnx.State({}), batch, np.float32(0.7)  # nothing is frozen
        logps = trained_logps(policy.params, *rest, graph=policy.graph, remat=False)
        mask = exists(batch)
        assert mask.sum() == round_.lengths.sum()
        # Packing sorts the rows, and holds what the sampler said in float32.
        drawn = np.arange(round_.tokens.shape[-1]) < round_.lengths[..., None]
        trained, sampled = (
            np.sort(x) for x in (np.asarray(logps)[mask], round_.behavior_logps[drawn])
        )
        np.testing.assert_allclose(trained, sampled, rtol=0, atol=tolerance)


def truncated(logps, top_k=0, top_p=1.0):
    """Top-k, then the fewest of those, most likely first, that reach top_p; renormalised. [V]."""
    kept = np.argsort(-logps)[: top_k or None]
    mass = np.cumsum(np.exp(logps[kept]))
    kept = kept[: 1 + np.searchsorted(mass / mass[-1], np.float32(top_p))]
    out = np.full(logps.shape, -np.inf)
    out[kept] = logps[kept] - np.logaddexp.reduce(logps[kept])
    return out


def test_greedy_takes_the_best_token_and_reports_its_logp_at_temperature_1(policy64, sampler):
    drawn = sampler.sample(policy64, random_prompts(), rows=4, stream=Stream(0), temperature=0)
    for (group, row), logps in zip(all_rows(drawn), teacher_forced(policy64, drawn), strict=True):
        tokens = drawn.suffix(group, row)
        np.testing.assert_array_equal(tokens, logps.argmax(-1))
        np.testing.assert_allclose(
            drawn.behavior_logps[group, row, : len(tokens)], logps.max(-1), atol=1e-9
        )


# Randomness


@pytest.fixture(scope="module")
def many(tokenizer):
    """5,000 rows of each of 4 prompts, of two tokens; nothing stops them before."""
    steps = build_automaton(token_bytes(tokenizer), delimiter="\n")
    return Sampler(steps, StopRules(2, max_step_tokens=1), shapes=[Shape(4, 5000, 6, 2)])


def assert_frequencies(tokens, probabilities, name=""):
    """Chi-square at 1 in 1,000; the rarest outcomes are counted together."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    expected = probabilities * len(tokens)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    assert stats.chisquare(counts[used], expected[used]).pvalue > 1e-3, name


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9, "top_k": 12}], ids=str)
def test_first_tokens_follow_the_softmax(policy32, many, truncation):
    prompts = [[5, 6, 7]] * 4
    drawn = many.sample(
        policy32, prompts, rows=5000, stream=Stream(11), temperature=1.3, max_new=1, **truncation
    )
    logits = np.asarray(policy32.logits(np.array(prompts)), np.float64)[0, -1] / 1.3
    logps = truncated(logits - np.logaddexp.reduce(logits), **truncation)
    assert (np.exp(logps) > 0.01).sum() > 5
    assert_frequencies(drawn.tokens[..., 0].ravel(), np.exp(logps))


def test_draws_are_independent_wherever_their_names_differ(policy32, many):
    """All tokens equally likely, so that each pair of them is."""
    flat = policy32.with_params(jax.tree.map(jnp.zeros_like, policy32.params), 0)

    def draw(stream=Stream(3, 4, 5), ids=(0, 1, 2, 3), first_row=0):  # noqa: B008
        drawn = many.sample(
            flat, [[5]] * 4, rows=5000, stream=stream, ids=ids, first_rows=[first_row] * 4
        )
        assert (drawn.lengths == 2).all()
        return drawn.tokens

    named = draw()
    np.testing.assert_array_equal(named, draw())
    np.testing.assert_array_equal(named[:, 2:], draw(first_row=2)[:, :-2])
    np.testing.assert_array_equal(named[[2, 0, 3, 1]], draw(ids=(2, 0, 3, 1)))
    pairs = {
        "position": (named[..., 0], named[..., 1]),
        "row": (named[:, 1:, 0], named[:, :-1, 0]),
        "prompt": (named[1:, :, 0], named[:-1, :, 0]),
        "row and position": (named[:, 1:, 0], named[:, :-1, 1]),
        "first row": (named, draw(first_row=5000)),
        "id": (named, draw(ids=(4, 5, 6, 7))),
        "seed": (named, draw(Stream(9, 4, 5))),
        "step": (named, draw(Stream(3, 9, 5))),
        "phase": (named, draw(Stream(3, 4, 9))),
        "seed and step": (named, draw(Stream(4, 3, 5))),
    }
    for name, (first, second) in pairs.items():
        together = (first * VOCAB + second).ravel()
        assert_frequencies(together, np.full(VOCAB**2, VOCAB**-2.0), name)


def test_a_row_does_not_depend_on_the_batch(policy64, sampler):
    prompts, stream = random_prompts(), Stream(21, step=4, phase=2)
    base = sampler.sample(policy64, prompts, rows=4, stream=stream, ids=range(30, 38))
    again = sampler.sample(policy64, prompts, rows=4, stream=stream, ids=range(30, 38))
    np.testing.assert_array_equal(base.tokens, again.tokens)
    order = np.random.default_rng(0).permutation(8)[:5]
    part = sampler.sample(
        policy64, [prompts[n] for n in order], rows=4, stream=stream, ids=30 + order
    )
    np.testing.assert_array_equal(part.tokens, base.tokens[order])
    np.testing.assert_allclose(part.behavior_logps, base.behavior_logps[order], atol=1e-9)
    # Each row alone, in another padded shape.
    alone = sampler.sample(
        policy64,
        [prompts[n] for n in range(8) for _ in range(4)],
        rows=1,
        stream=stream,
        ids=np.repeat(np.arange(30, 38), 4),
        first_rows=[0, 1, 2, 3] * 8,
    )
    np.testing.assert_array_equal(alone.tokens.reshape(base.tokens.shape), base.tokens)
    np.testing.assert_array_equal(alone.reasons.reshape(8, 4), base.reasons)


def test_a_resumed_row_does_not_depend_on_the_batch(policy64, sampler):
    base = sampler.sample(policy64, random_prompts(), rows=4, stream=Stream(1), ids=range(9, 17))
    snapshots = random_snapshots(base, 40, seed=8)
    numbers = np.arange(40) % 7
    resumed = sampler.resume(policy64, snapshots, rows=1, stream=Stream(2), first_rows=numbers)
    order = np.random.default_rng(0).permutation(40)[:17]
    part = sampler.resume(
        policy64,
        [snapshots[n] for n in order],
        rows=1,
        stream=Stream(2),
        first_rows=numbers[order],
    )
    np.testing.assert_array_equal(part.tokens, resumed.tokens[order])
    fresh = sampler.sample(
        policy64,
        [s.tokens for s in snapshots],
        kept=[s.length - int(base.prompt_lengths[s.group]) for s in snapshots],
        ids=[int(base.ids[s.group]) for s in snapshots],
        rows=1,
        stream=Stream(2),
        first_rows=numbers,
    )
    np.testing.assert_array_equal(fresh.tokens, resumed.tokens)


# Stop conditions


def walk(pieces, kept, drawn, *, stop, max_new, eos):
    """Tokens drawn until a row must end, and why; on the text, as one would say it."""
    text, steps, step_tokens = "", 0, 0
    for count, token in enumerate([*kept, *drawn], start=1):
        text, before = text + pieces[token], text.count("\n")
        step_tokens += 1
        ended = text.count("\n") > before or step_tokens == stop.max_step_tokens
        if ended:
            steps, step_tokens = steps + 1, 0
        new = count - len(kept)
        if new <= 0:
            continue
        if token in eos:
            return new, StopReason.EOS
        if pieces[token] and text.endswith(("b=", "1}", "c:")):
            return new, StopReason.STOP_STRING
        if ended and "\\boxed{" in text:
            return new, StopReason.ANSWER
        if ended and steps >= stop.max_steps:
            return new, StopReason.STEPS
        if ended and stop.max_response - count < stop.max_step_tokens:
            return new, StopReason.BUDGET
        if new == max_new or count == stop.max_response:
            return new, StopReason.LENGTH
    return len(drawn), StopReason.RUNNING


def test_rows_stop_where_a_walk_over_their_text_says(policy32, tokenizer, sampler):
    pieces = [piece.decode() for piece in token_bytes(tokenizer)]
    rng, seen = np.random.default_rng(0), Counter()
    for trial in range(40):
        stop = StopRules(
            max_response=int(rng.integers(12, 25)),
            max_steps=int(rng.integers(1, 7)),
            max_step_tokens=int(rng.integers(2, 13)),
        )
        eos = (int(rng.integers(1, VOCAB)),)
        max_new = int(rng.integers(1, 25)) if trial % 2 else None
        strict = Sampler(sampler.automaton, stop, eos_ids=eos, shapes=sampler.shapes)
        kept = [list(rng.integers(0, VOCAB, rng.integers(0, 12))) for _ in range(100)]
        drawn = strict.sample(
            policy32,
            [[5, 6, *tokens] for tokens in kept],
            kept=[len(tokens) for tokens in kept],
            rows=1,
            stream=Stream(trial),
            max_new=max_new,
        )
        for n, tokens in enumerate(kept):
            ends = walk(pieces, tokens, drawn.suffix(n, 0), stop=stop, max_new=max_new, eos=eos)
            assert (drawn.lengths[n, 0], drawn.reasons[n, 0]) == ends, (trial, n)
            np.testing.assert_array_equal(drawn.response(n, 0)[: len(tokens)], tokens)
            seen[ends[1]] += 1
    assert set(seen) == set(StopReason) - {StopReason.RUNNING}
    assert min(seen.values()) > 30


def test_end_of_sequence_is_part_of_the_response_and_of_its_mask(policy32, sampler):
    drawn = sampler.sample(policy32, random_prompts(), rows=4, stream=Stream(30))
    ended = drawn.reasons == StopReason.EOS
    last = np.take_along_axis(drawn.tokens, drawn.lengths[..., None] - 1, axis=-1)[..., 0]
    assert ended.sum() > 3
    np.testing.assert_array_equal(last == 1, ended)
    (batch,) = pack(as_groups(drawn), [PackShape(8, 4, 12, 24)])
    mask = exists(batch)
    targets = np.take_along_axis(batch.targets.reshape(8, -1), batch.cells.reshape(8, -1), 1)
    assert ((targets.reshape(mask.shape) == 1) & mask).sum() == ended.sum()
    assert batch.lengths.sum() == mask.sum() == drawn.lengths.sum()


def test_nothing_is_drawn_where_the_kept_part_fills_the_response(policy32, sampler):
    drawn = sampler.sample(policy32, [[5, *[6] * 24]], kept=[24], rows=1, stream=Stream(0))
    assert drawn.lengths[0, 0] == 0
    assert len(drawn.response(0, 0)) == sampler.stop.max_response


def test_without_a_limit_on_steps_a_delimiter_stops_nothing(policy32, automaton):
    free = Sampler(automaton, StopRules(24), shapes=[Shape(200, 1, 36, 24)])
    drawn = free.sample(policy32, [[5, 6]] * 50, rows=1, stream=Stream(0))
    assert StopReason.BUDGET not in drawn.reasons


# Compiled once


@pytest.fixture(scope="module")
def compiled(policies, automaton):
    """Shapes that no other test compiles."""
    base, child = Shape(3, 2, 9, 7), Shape(5, 2, 16, 7)
    sampler = Sampler(
        automaton,
        StopRules(7, max_steps=5, max_step_tokens=3),
        eos_ids=(1,),
        shapes=[base],
        forks=[(base, child), (child, child)],
    )
    start = compiles()
    sampler.compile(policies["float32"])
    assert compiles() - start >= 5  # prefill, decode; fork, decode; fork
    return sampler


def test_nothing_compiles_after_compile(policy32, compiled):
    before = compiles()
    for trial in range(4):
        count = 1 + trial % 3
        draw = {
            "rows": 2,
            "stream": Stream(trial, step=trial, phase=trial),
            "temperature": (0.0, 0.7, 1.0, 1.3)[trial],
            "top_p": (1.0, 0.9, 0.5, 1.0)[trial],
            "top_k": (0, 3, 0, 9)[trial],
            "max_new": (None, 4, 7, 2)[trial],
        }
        other = Sampler(
            compiled.automaton,
            StopRules(7 - trial, max_steps=1 + trial, max_step_tokens=2 + trial),
            eos_ids=(trial,),
            shapes=compiled.shapes,
            forks=compiled.forks,
        )
        prompts = random_prompts(count, seed=trial, longest=9)
        parent = other.sample(policy32, prompts, ids=range(50, 50 + count), **draw)
        for generation in range(3):
            # Also so few and short that the parent's shape would hold them.
            snapshots = random_snapshots(parent, 1 + (trial + generation) % 5, seed=trial)
            parent = other.resume(policy32, snapshots, **draw)
    drawn = compiled.sample(policy32, [[5, 6], [7]], rows=2, stream=Stream(0))
    compiled.resume(policy32, [Snapshot(drawn, 0, 0, 3)], rows=2, stream=Stream(1))
    assert compiles() == before


def test_a_resume_with_a_stream_that_was_used_repeats_no_noise(policy64, sampler):
    def branches(parent, stream):
        """From before each row's first step, numbered as the row: the same noise draws the same row."""
        cells = all_rows(parent)
        snapshots = [Snapshot(parent, g, r, int(parent.prompt_lengths[g])) for g, r in cells]
        numbers = [r for _, r in cells]
        return sampler.resume(policy64, snapshots, rows=1, stream=stream, first_rows=numbers)

    def same(a, b):
        rows = zip(a.tokens.reshape(32, -1), b.tokens.reshape(32, -1), strict=True)
        return sum(np.array_equal(x, y) for x, y in rows)

    first, second = Stream(5, 2), Stream(5, 2, phase=1)
    base = sampler.sample(policy64, random_prompts(), rows=4, stream=first)
    again = sampler.sample(policy64, random_prompts(), rows=4, stream=first)
    assert same(base, again) == 32
    child = branches(base, first)
    assert same(child, base) < 5
    assert same(child, branches(base, first)) == 32  # the same call draws the same
    assert same(child, branches(base, second)) < 5
    assert branches(base, second).streams == (first, second)  # one that is new is taken as it is
    # Whatever is given to a chain of resumes, no two of its rounds share their noise.
    chain = [base, child]
    for stream in (first, second, second, first, child.streams[-1]):
        chain.append(branches(chain[-1], stream))
    assert max(same(a, b) for a, b in itertools.combinations(chain, 2)) < 5
    assert len(set(chain[-1].streams)) == len(chain)


# Errors


def test_snapshots_belong_to_the_weights_that_drew_them(policy32, sampler):
    base = sampler.sample(policy32, [[5, 6]], rows=4, stream=Stream(0))
    snapshots = [Snapshot(base, 0, 0, 3)]
    twin = policy32.with_params(jax.tree.map(jnp.copy, policy32.params), policy32.version)
    with pytest.raises(
        ValueError, match=r"other weights .* both are of version 7: .* sample again"
    ):
        sampler.resume(policy32.with_lora(1, 1.0), snapshots, rows=1, stream=Stream(1))
    with pytest.raises(ValueError, match="other weights"):
        sampler.resume(twin, snapshots, rows=1, stream=Stream(1))
    # The same arrays are the same weights, whatever holds them; a round knows no more of them.
    graph, params = nnx.split(nnx.merge(policy32.graph, policy32.params))
    check_snapshots(snapshots, dataclasses.replace(policy32, graph=graph, params=params))
    theirs = sampler.sample(twin, [[5, 6]], rows=4, stream=Stream(0))
    check_snapshots([Snapshot(theirs, 0, 0, 3)], twin)
    del twin
    with pytest.raises(ValueError, match="other weights"):
        check_snapshots([Snapshot(theirs, 0, 0, 3)], policy32)
    assert {reference() for reference in theirs.weights} == {None}


def test_a_policy_of_another_vocabulary_is_refused(policy32, sampler):
    wider = dataclasses.replace(policy32, config=dataclasses.replace(policy32.config, vocab=40))
    with pytest.raises(
        ValueError, match="its vocabulary is 40, the sampler's step table is for 45"
    ):
        sampler.sample(wider, [[5, 6]], rows=4, stream=Stream(0))


def test_a_delimiter_that_texts_leave_out_is_refused(policy32):
    for pattern in ({"delimiter": "<eos>"}, {"delimiter": "\n", "answer_marker": "x<pad>"}):
        with pytest.raises(ValueError, match=f"{list(pattern)[-1]}=.*is left out of it; choose"):
            Sampler.for_policy(policy32, StopRules(9), **pattern)


def test_bad_calls_are_refused_with_their_values(policy32, sampler):
    def sample(prompts=((5, 6),), **options):
        return sampler.sample(policy32, prompts, **{"rows": 4, "stream": Stream(0)} | options)

    one, two = sample(), sample()
    kept = [Snapshot(one, 0, 0, 3)]

    def resume(snapshots, policy=policy32):
        return sampler.resume(policy, snapshots, rows=1, stream=Stream(0))

    end = 2 + int(one.lengths[0, 0])
    newer = policy32.with_params(policy32.params, policy32.version + 1)
    cases = [
        (lambda: resume(kept, newer), r"version 7, the policy is at version 8: .* sample again"),
        (lambda: resume([*kept, Snapshot(two, 0, 0, 3)]), "expected all of one round"),
        (
            lambda: resume([kept[0]._replace(length=1)]),
            "length 1: row 0 of group 0 has a prompt of 2",
        ),
        (lambda: resume([kept[0]._replace(length=end + 1)]), f"length {end + 1}: .* ends at {end}"),
        (lambda: sample([[5], []]), r"2 prompts, of \[1, 0\] tokens: expected at least one"),
        (lambda: sample([]), r"0 prompts, of \[\] tokens: expected at least one prompt"),
        (
            lambda: sample([[5] * 37]),
            "1 groups of 4 rows with prefixes of up to 37 tokens fit none",
        ),
        (lambda: sample([[5]] * 9), r"9 groups of 4 rows .*\(8, 4, 12, 24\)"),
        (lambda: sample(rows=3), "1 groups of 3 rows"),
        (lambda: sample(temperature=-0.1), "temperature=-0.1, .* expected temperature >= 0"),
        (lambda: sample(top_p=0.0), "top_p=0.0, .*0 < top_p <= 1"),
        (lambda: sample(top_p=1.5), "top_p=1.5"),
        (lambda: sample(top_k=-1), "top_k=-1: .*top_k >= 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


BAD_INPUTS = {
    "more kept than the prompt has": {"kept": [3]},
    "one id for two prompts": {"prompts": [[5], [6]], "ids": [9]},
    "one first row for two prompts": {"prompts": [[5], [6]], "first_rows": [4]},
    "a token outside the vocabulary": {"prompts": [[5, VOCAB]]},
    "no room for a token": {"max_new": 0},
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_are_named(policy32, sampler, name):
    call = {"prompts": [[5, 6]], "rows": 4, "stream": Stream(0)} | BAD_INPUTS[name]
    with pytest.raises(ValueError, match=f"{list(BAD_INPUTS[name])[-1]}.*expected"):
        sampler.sample(policy32, **call)


def assert_rounds_equal(ours, theirs, atol=1e-9):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_array_equal(ours.reasons, theirs.reasons)
    np.testing.assert_allclose(ours.behavior_logps, theirs.behavior_logps, rtol=0, atol=atol)
