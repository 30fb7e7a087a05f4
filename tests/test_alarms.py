"""Alarms: which metrics call for which, what they say, and that each sounds once a run."""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from jaxreset.config_file import load_config
from jaxreset.reporting.alarms import STEPS, Alarm, Alarms, describe, kinds, read_alarms
from jaxreset.reporting.curve import draw_curve
from jaxreset.reporting.display import Display
from jaxreset.reporting.report import write_report
from jaxreset.run.folder import RunFolder
from jaxreset.tasks.chain import ChainTask
from jaxreset.tasks.sums import SumsTask

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
GOOD = {
    "reward/mean": 0.4, "groups/with_signal": 3.0, "response/cut": 0.3, "response/answered": 0.6,
    "response/steps": 3.0, "reset/answer_boxed": 0.7, "verifier/errors": 0, "verifier/timeouts": 0,
}  # fmt: skip
NOTHING = {"reward/mean": 0.0, "groups/with_signal": 0.0}
SOLVED = {"step": 0, "eval/accuracy": 0.1, "eval/greedy_accuracy": 0.0}


def steps(*lines):
    return [SOLVED, *({"step": n, **GOOD, **line} for n, line in enumerate(lines, 1))]


@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        ("no reward", NOTHING),
        ("cut", {"response/cut": 1.0}),
        ("cut", {"response/cut": 0.96}),
        ("unanswered", {"response/answered": 0.0}),
        ("one step", {"response/steps": 1.02}),
        ("no step named", {"reset/answer_boxed": 0.04}),
        ("no signal", {"reward/mean": 1.0, "groups/with_signal": 0.0}),
        ("no signal", {"reward/mean": -1.0, "groups/with_signal": 0.0}),
    ],
)
def test_so_many_odd_steps_in_a_row_sound_an_alarm(kind, odd):
    many = [odd] * STEPS[kind]
    assert kinds(steps(*many)) == [kind]
    assert kinds(steps({}, *many)) == [kind]
    assert kinds(steps(*many[1:])) == []
    assert kinds(steps(*many[1:], {}, *many[1:])) == []
    assert kinds(steps(*many, {})) == []


def test_steps_that_teach_sound_none():
    assert kinds([]) == kinds([SOLVED]) == []
    assert kinds(steps(*[{}] * 20)) == []
    # a ladder learns from resets where no response from the prompt is right
    assert kinds(steps(*[{"reward/mean": 0.0}] * 20)) == []
    # of an older version, or of a reward that wasn't finite
    old = {key: GOOD[key] for key in ("reward/mean", "groups/with_signal", "response/cut")}
    assert kinds([{"step": n, **old} for n in range(20)]) == []
    assert kinds(steps(*[{"reward/mean": None}] * 20)) == []


def test_one_step_without_reward_is_enough_where_nothing_is_solved():
    unsolved = {"step": 0, "eval/accuracy": 0.0, "eval/greedy_accuracy": 0.0}
    assert kinds([unsolved]) == []
    assert kinds([unsolved, {"step": 1, **GOOD, **NOTHING}]) == ["no reward"]
    assert kinds([unsolved | {"eval/greedy_accuracy": 0.1}, {"step": 1, **GOOD, **NOTHING}]) == []
    assert kinds([unsolved, SOLVED, {"step": 1, **GOOD, **NOTHING}]) == []
    assert kinds([unsolved, {"step": 1, **GOOD}]) == []


@pytest.mark.parametrize(
    ("kind", "record", "ends", "words"),
    [
        ("cut", {"response/cut": 1.0}, {"length": 8}, "100% .*sampling.max_response_tokens .96"),
        ("cut", {"response/cut": 1.0}, {"steps": 8}, "sampling.max_steps .20"),
        ("unanswered", {"response/answered": 0.0}, {}, "0% .*answer marker .*warm_start.steps"),
        ("no reward", {"response/answered": 0.1}, {}, "rewards are 0.*10% .*answer marker"),
        ("no reward", {"response/cut": 0.875}, {"budget": 7}, "88% .*max_response_tokens"),
        ("no reward", {"verifier/errors": 3}, {}, "failed on 3 .*verifier_errors.jsonl"),
        ("no reward", {}, {"eos": 8}, "all are judged wrong.*too hard.*verifier"),
        ("no signal", {"reward/mean": 1.0}, {}, "reward 1.*harder problems"),
        ("no signal", {"reward/mean": 0.1}, {}, "reward 0.1.*easier problems"),
        ("one step", {"response/steps": 1.02}, {}, r"1.02 on average.*'\\n'.*Set task.delimiter"),
        (
            "no step named",
            {"reset/answer_boxed": 0.02},
            {},
            "in 2% of .*localizer.mode=score.*tokens 48",
        ),
        ("nothing solved", {"eval/answered": 0.02}, {}, "solved nothing: 2% .*: jaxreset prompt"),
        ("nothing solved", {"eval/cut": 0.97}, {}, "solved nothing: 97% .*max_response_tokens"),
    ],
)
def test_an_alarm_names_the_likely_cause_and_what_to_change(kind, record, ends, words):
    config = load_config(QUICKSTART, ["sampling.max_response_tokens=96", "sampling.max_steps=20"])
    text = describe(kind, GOOD | record, Counter(ends), config, ChainTask())
    assert len(text) < 500
    assert re.search(words, text)


def tree(text="a3=3\n" * 500):
    return {"groups": [{"rows": [{"text": text, "end": "length"}]}]}


def test_each_kind_sounds_once_a_run_which_may_go_on(tmp_path, caplog):
    folder = RunFolder(load_config(QUICKSTART, [f"run.dir={tmp_path}"]))
    history = steps(*[{"response/cut": 1.0}] * 5)

    def go_on(done):
        """From step `done` to the end."""
        shown = []
        alarms = Alarms(
            folder.config, ChainTask(), folder.alarms, history[: done + 1], shown.append
        )
        alarms.start(eos_ids=())
        for line in history[done + 1 :]:
            alarms.note(line, [tree()])
        return shown

    with caplog.at_level(logging.WARNING):
        shown = go_on(0)
    assert [(alarm.kind, alarm.step) for alarm in shown] == [("no end", 0), ("cut", 3)]
    assert read_alarms(folder.alarms) == shown
    assert 500 < len(shown[1].response) < 700
    assert len(caplog.records) == 2
    assert "no end-of-sequence token" in caplog.text
    assert "a3=3" in caplog.text
    for back, again in ((4, []), (3, []), (2, [shown[1]])):
        folder.cut_back(back)
        assert go_on(back) == again
        assert read_alarms(folder.alarms) == shown
    folder.cut_back(-1)
    assert not folder.alarms.exists()


def test_a_first_evaluation_that_solves_nothing_is_said_at_once(tmp_path):
    config = load_config(
        QUICKSTART, ["model.path=some/model", "task.name=sums", "warm_start.steps=0"]
    )
    zero = {"step": 0, "eval/accuracy": 0.0, "eval/greedy_accuracy": 0.0, "eval/answered": 0.02}
    shown = []
    alarms = Alarms(config, SumsTask(), tmp_path / "alarms.jsonl", [], shown.append)
    alarms.note(zero, response="I can help with that!")
    [alarm] = shown
    assert (alarm.kind, alarm.step, alarm.response) == (
        "nothing solved",
        0,
        "I can help with that!",
    )
    assert re.search("task.examples.*task.chat.*task.answer_marker", alarm.text)
    alarms.note(zero | {"step": 5}, response="again")
    assert shown == [alarm]
    later = Alarms(config, SumsTask(), tmp_path / "other.jsonl", [SOLVED], shown.append)
    later.note(zero | {"step": 5}, response="not the first")
    assert shown == [alarm]


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_one_step_is_an_alarm_where_there_are_resets(tmp_path, objective):
    config = load_config(QUICKSTART, [f"objective={objective}"])
    shown = []
    alarms = Alarms(config, ChainTask(), tmp_path / "alarms.jsonl", [SOLVED], shown.append)
    for line in steps(*[{"response/steps": 1.0}] * 4)[1:]:
        alarms.note(line, [tree()])
    assert [alarm.kind for alarm in shown] == ["one step"] * (objective == "srpo")


def test_a_policy_that_can_end_is_no_alarm(tmp_path):
    alarms = Alarms(load_config(QUICKSTART, []), ChainTask(), tmp_path / "alarms.jsonl", [])
    alarms.start(eos_ids=(1,))
    assert not list(tmp_path.iterdir())


def test_an_alarm_is_shown_and_reported(tmp_path):
    alarm = Alarm("no reward", 3, "All rewards are 0 [see rollouts/].", "<b>\\boxed{[1]}")
    out = io.StringIO()
    display = Display(Console(file=out, width=100))
    display.alarm(alarm)
    idle = {"step": 1, "optimizer_steps": 0.0}
    display.summary([idle], tmp_path, tmp_path)
    assert "All rewards are 0 [see rollouts/]." in out.getvalue()
    assert "<b>\\boxed{[1]}" in out.getvalue()
    assert "nothing was learnt: no optimizer step in 1 steps" in out.getvalue()
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm._asdict()) + "\n")
    curve = draw_curve([], tmp_path / "curve.png")
    report = write_report(tmp_path, [], curve).read_text()
    assert "<b>step 3: no reward.</b> All rewards are 0 [see rollouts/]." in report
    assert "&lt;b&gt;\\boxed{[1]}" in report
