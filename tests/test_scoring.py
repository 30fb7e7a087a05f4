"""What a run makes of a verifier that fails: which response costs what, and when it is broken."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxreset.errors import ConfigError, RunError
from jaxreset.tasks import scoring
from jaxreset.tasks.base import Problem, Scores


def items(*responses):
    return [(Problem(f"p{n}", "?", "!"), response) for n, response in enumerate(responses)]


def in_process(failing=(), *, nan=()):
    """A task that scores all it is given in one call, 1 each, and raises if one text is failing."""

    def score(items):
        if any(text in failing for _, text in items):
            raise ZeroDivisionError("in the verifier")
        return Scores(np.array([np.nan if text in nan else 1.0 for _, text in items]), ())

    return score


def test_a_task_that_raises_in_this_process_does_so_for_one_response():
    scores = scoring.score_together(in_process({"b", "d"}, nan={"c"}), items(*"abcde"))
    np.testing.assert_array_equal(scores.rewards, [1, 0, np.nan, 0, 1])  # see skipped updates
    assert scores.errors == (1, 3)
    assert scores.reasons == ("ZeroDivisionError: in the verifier",) * 2


def test_an_error_that_no_response_repeats_is_raised():
    calls = []

    def score(items):
        calls.append(len(items))
        if len(calls) == 1:
            raise OSError("once")
        return Scores(np.ones(len(items)), ())

    with pytest.raises(OSError, match="once"):
        scoring.score_together(score, items(*"abc"))
    assert calls == [3, 1, 1, 1]


@pytest.mark.parametrize("error", [RunError("no worker"), ConfigError("no file")])
def test_an_error_for_the_user_is_passed_on(error):
    def score(items):
        raise error

    with pytest.raises(type(error), match="no "):
        scoring.score_together(score, items(*"abc"))


def test_what_a_task_returns_is_checked():

    def score(items):
        return Scores([1, None, "1", 1e300, True], (3,))

    scores = scoring.score_together(score, items(*"abcde"))
    np.testing.assert_array_equal(scores.rewards, [1, 0, 0, 0, 1])
    assert scores.rewards.dtype == np.float64
    assert scores.errors == (1, 2, 3)
    with pytest.raises(RunError, match="5 rewards for 4 responses"):
        scoring.score_together(score, items(*"abcd"))


def test_several_processes_tell_one_another_what_failed(monkeypatch):
    """As process 1 of two, which scores the second half."""
    monkeypatch.setattr(scoring, "own_share", lambda count: range(count // 2, count))
    theirs = [[(0.5, True, False, {}), (0.0, False, True, {})], ["ValueError: there"]]
    monkeypatch.setattr(scoring, "gather", lambda ours: [*theirs.pop(0), *ours])
    scores = scoring.score_together(in_process({"c"}), items(*"abcd"))
    np.testing.assert_array_equal(scores.rewards, [0.5, 0, 0, 1])
    assert (scores.timeouts, scores.errors) == ((0,), (1, 2))
    assert scores.reasons == ("ValueError: there", "ZeroDivisionError: in the verifier")


def judged(*rounds, keep=lambda errors: None, failing=("x",)):
    """How many errors, of rounds written as texts; a text's second letter is its problem."""
    made = []
    for texts in rounds:
        pairs = [(Problem(text[1:], "?", "!"), text[0]) for text in texts]
        scores = scoring.score_together(in_process(failing), pairs)
        made.append(scoring.verdicts(pairs, scores))
    return scoring.judge(made, step=3, evaluation=False, keep=keep)


def test_a_verifier_that_fails_on_all_is_broken(caplog):
    kept = []
    assert judged(["a1", "a2"], keep=kept.extend) == 0
    assert judged(["x1", "x1", "x2", "a2"], ["x1"], keep=kept.extend) == 4
    assert (
        judged(["x1", "x1"], ["x1"], keep=kept.extend) == 3
    )  # one problem: it may be the problem's
    assert len(kept) == 7
    assert kept[0] == {
        "step": 3, "evaluation": False, "problem": "1", "response": "x",
        "error": "ZeroDivisionError: in the verifier",
    }  # fmt: skip
    assert (
        "failed on 4 of 5 responses, scored 0. The first: problem '1', response 'x'" in caplog.text
    )
    with pytest.raises(RunError, match=r"failed on all 3 responses of step 3.*Division") as broken:
        judged(["x1", "x1"], ["x2"], keep=kept.extend)
    assert "problem '1', response 'x'" in str(broken.value)
    assert len(kept) == 10  # the run folder has them too


def test_kept_errors_have_an_end(tmp_path, monkeypatch):
    file = tmp_path / "errors.jsonl"
    lines = [{"step": step, "error": "é\udcff"} for step in range(5)]
    scoring.keep_errors(file, lines[:3])
    scoring.keep_errors(file, lines[3:])
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines
    monkeypatch.setattr(scoring, "KEPT_BYTES", file.stat().st_size + 100)
    scoring.keep_errors(file, lines)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == lines + lines[: len(kept) - 5]
    assert 5 < len(kept) < 10
