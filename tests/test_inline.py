"""Questions put behind snapshots: only they are prefilled, and nothing else changes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scripted import CHAIN_TOKENIZER, PROBLEMS
from test_sampling import (
    TOLERANCE,
    assert_rounds_equal,
    random_prompts,
    random_snapshots,
)

from jaxreset.resets.localize import PolicyLocalizer
from jaxreset.resets.rules import Failure
from jaxreset.run.compiles import compiles
from jaxreset.sampling.rounds import Shape, Snapshot, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.asking import Asking

DRAWN, ASKED = Shape(8, 4, 12, 24), Shape(4, 2, 44, 10)
FRESH = ASKED._replace(groups=8)
QUESTIONS = [np.array(q) for q in ([3], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18])]


@pytest.fixture(scope="module")
def make_sampler(automaton):
    """Samplers of short answers to questions about what the fixture `sampler` draws."""

    def make(**options):
        return Sampler(
            automaton,
            StopRules(max_response=10),
            eos_ids=(1,),
            forks=[(DRAWN, ASKED)],
            question_tokens=8,
            **options,
        )

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("hold_cache", ["always", "never"])
def test_a_question_behind_a_snapshot_equals_one_prompt(
    policies, sampler, make_sampler, hold_cache
):
    for dtype, policy in policies.items():
        with jax.enable_x64(dtype == "float64"):
            asks = make_sampler(shapes=[], hold_cache=hold_cache)
            asks.compile(policy)
            base = sampler.sample(policy, random_prompts(), rows=4, stream=Stream(1))
            if hold_cache == "never":
                base = dataclasses.replace(base, held=())
            snapshots, before = random_snapshots(base, 4, seed=2), compiles()
            draw = {"rows": 2, "stream": Stream(3), "temperature": 0.7}
            answers = asks.resume(policy, snapshots, questions=QUESTIONS, **draw)
            assert compiles() == before
            whole = [
                np.concatenate([s.tokens, q]) for s, q in zip(snapshots, QUESTIONS, strict=True)
            ]
            ids = [int(base.ids[s.group]) for s in snapshots]
            fresh = make_sampler(shapes=[ASKED]).sample(policy, whole, ids=ids, **draw)
            assert_rounds_equal(answers, fresh, atol=TOLERANCE[dtype])
            for n, prompt in enumerate(whole):  # the answer is a response of its own
                np.testing.assert_array_equal(answers.prompt(n), prompt)
                assert 1 <= answers.lengths[n].min() <= answers.lengths[n].max() <= 10


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (QUESTIONS[:3], "questions: 3, expected one for each of 4 snapshots"),
        ([*QUESTIONS[:3], []], "questions: of 0 to 8 tokens, expected 1 to question_tokens=8"),
        ([*QUESTIONS[:3], [2] * 9], "questions: of 1 to 9 tokens, expected 1 to question_tokens=8"),
        ([*QUESTIONS[:3], [45]], "number 3 has ids from 45 to 45, expected 0 to 44"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(
    policy32, sampler, make_sampler, questions, message
):
    base = sampler.sample(policy32, random_prompts(), rows=4, stream=Stream(1))
    snapshots = random_snapshots(base, 4, seed=2)
    with pytest.raises(ValueError, match=message):
        make_sampler().resume(policy32, snapshots, questions=questions, rows=2, stream=Stream(0))


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_inline_localizer_asks_behind_each_attempt(policy64, sampler, automaton, batch):
    """Attempts of two rounds, in one list; the answers are those to the whole text as a prompt."""
    base = sampler.sample(policy64, random_prompts(), rows=4, stream=Stream(1))
    first = random_snapshots(base, 4, seed=2)
    later = sampler.resume(policy64, first, rows=1, stream=Stream(1, phase=2))
    ends = [
        Snapshot(r, g, 0, len(r.prefixes[g]) + int(r.lengths[g, 0]))
        for g in range(4)
        for r in (base, later)
    ]
    texts = ["?\n", "a1?\n", "b2c3?\n", "?\n", "a1b2c3d4?\n", "e5?\n", "?\n", "c3?\n"]
    echo = SimpleNamespace(inline_localization=lambda problem, steps: steps[0])
    failures = [
        Failure(echo, PROBLEMS[0], [text], (3, 5, 1, int(end.round.ids[end.group]), row))
        for row, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    child = ASKED._replace(rows=1)
    cuts = sampler.forks[0][1]
    answering = Sampler(
        automaton,
        StopRules(max_response=10),
        shapes=[],
        forks=[(DRAWN, child), (cuts, child)],
        question_tokens=8,
    )
    ask = PolicyLocalizer(
        answering,
        Asking(echo, CHAIN_TOKENIZER),
        batch=batch,
        question_limit=8,
        inline=True,
        temperature=0.9,
        top_p=1.0,
    )
    answers, tokens = ask(policy64, failures, ends)
    assert answers[4] == ""  # nine tokens, so not asked
    fresh = Sampler(automaton, StopRules(max_response=10), shapes=[FRESH._replace(rows=1)])
    asked = [i for i in range(8) if i != 4]
    drawn = fresh.sample(
        policy64,
        [np.concatenate([ends[i].tokens, CHAIN_TOKENIZER.encode(texts[i])]) for i in asked],
        rows=1,
        stream=Stream(3, 5, 1),
        ids=[failures[i].seed[3] for i in asked],
        first_rows=asked,
        temperature=0.9,
    )
    assert tokens == drawn.lengths.sum()
    for n, i in enumerate(asked):
        assert answers[i] == policy64.decode(drawn.suffix(n, 0))
