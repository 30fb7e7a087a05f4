"""Evaluation: what is drawn, how sets are named, what is measured, shown and kept; training beside it."""

from __future__ import annotations

import json
import logging
import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scripted import (
    CHAIN_TOKENIZER,
    POLICY,
    PROBLEMS,
    TASK,
    ScriptedRounds,
    decode,
    prompts,
    written,
)
from typer.testing import CliRunner

from jaxreset import cli
from jaxreset.config_file import load_config, parse_config
from jaxreset.errors import ConfigError, RunError
from jaxreset.models.adapters import trained
from jaxreset.planning.shapes import run_shapes
from jaxreset.reporting.display import Display
from jaxreset.reporting.evaluation import show
from jaxreset.run import finished
from jaxreset.run.evaluate import PHASE, SetResponses, by_set, measure, named, respond
from jaxreset.run.experiment import Experiment
from jaxreset.run.finished import Evaluated
from jaxreset.run.saved_responses import saving_responses
from jaxreset.sampling.rounds import Shape, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.base import Problem

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TINY = """
    model.fresh.layers=1 model.fresh.width=16 model.fresh.heads=2 model.fresh.kv_heads=2 model.fresh.mlp=32
    objective=rrpo sampling.max_prompt_tokens=18 sampling.max_response_tokens=16
    sampling.max_step_tokens=8 warm_start.steps=0 train.steps=3 train.prompts_per_step=4
    train.microbatch_tokens=1500 train.min_signal_groups=0 data.eval_size=5 eval.batch=4 eval.samples=3
"""


def answered(script, *indexes, samples, batch=128, score=TASK.score, **options):
    """Responses to these prompts by script, see `scripted.written`: problem -> a letter a sample."""
    rounds = ScriptedRounds(
        lambda prompt, phase, row, kept: written(
            PROBLEMS[prompt % len(PROBLEMS)], script[prompt][row]
        )
    )
    drawn = respond(
        POLICY,
        prompts(*indexes),
        rounds,
        score,
        decode,
        marker=TASK.answer_marker,
        batch=batch,
        samples=samples,
        temperature=1.0,
        stream=Stream(3, 5, PHASE),
        **options,
    )
    return drawn, rounds


def test_each_response_is_a_group_of_its_own_named_by_prompt_and_sample():
    drawn, rounds = answered({0: "S1T", 1: "SSS", 2: "C0S"}, 0, 1, 2, samples=3, batch=4)
    names = [list(zip(call.ids, call.first_rows, strict=True)) for call in rounds.calls]
    assert [len(n) for n in names] == [4, 4, 1]
    assert [*chain(*names)] == [(p, row) for p in range(3) for row in range(3)]
    assert {call.rows for call in rounds.calls} == {1}
    assert {call.stream for call in rounds.calls} == {Stream(3, 5, PHASE)}
    assert drawn.problems == list(PROBLEMS)
    assert drawn.texts[0][0] == "".join(f"{s}\n" for s in TASK.solution(PROBLEMS[0]))
    np.testing.assert_array_equal(drawn.solved, [[1, 0, 0], [1, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(drawn.rewards, drawn.solved)
    np.testing.assert_array_equal(drawn.answered, [[1, 1, 0], [1, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(drawn.cut, [[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    assert drawn.tokens[2, 1] == 1  # end-of-sequence alone
    assert drawn.tokens[0, 0] == len(CHAIN_TOKENIZER.encode(drawn.texts[0][0]))


@pytest.mark.usefixtures("hasty")
def test_more_samples_change_nothing_of_the_first(policy32, automaton):
    asked, stream = prompts(0, 1, 2), Stream(4, 7, PHASE)
    sampler = Sampler(
        automaton, StopRules(12, 6, 9), eos_ids=(1,), shapes=[Shape(5, 1, 9, 12)], threads=1
    )

    def texts(samples, batch):
        return respond(
            policy32, asked, sampler, TASK.score, decode, marker="\\boxed{", batch=batch,
            samples=samples, temperature=1.0, stream=stream,
        ).texts  # fmt: skip

    alone = sampler.sample(
        policy32, [p.tokens for p in asked], rows=1, stream=stream, ids=[0, 1, 2]
    )
    firsts = [[decode(alone.response(g, 0))] for g in range(3)]
    several = texts(4, batch=5)
    assert len({*chain(*several)}) > 9
    assert texts(4, batch=2) == several
    assert texts(1, batch=2) == [row[:1] for row in several] == firsts


def metrics_of(sampled, greedy="SSS", **options):
    count = len(next(iter(sampled.values())))
    drawn, _ = answered(sampled, *sampled, samples=count, **options)
    best, _ = answered(dict(enumerate(greedy)), *range(len(greedy)), samples=1)
    return measure(SetResponses("test", drawn, best), TASK.answer)


def test_one_response_each_gives_the_accuracy_and_nothing_for_several():
    metrics = metrics_of({0: "S", 1: "1", 2: "C"}, greedy="SS0")
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["accuracy_low"] < 1 / 3 < metrics["accuracy_high"]
    assert metrics["greedy_accuracy"] == pytest.approx(2 / 3)
    assert metrics["problems"] == 3
    assert metrics["verifier_errors"] == 0
    assert (metrics["cut"], metrics["answered"]) == pytest.approx((1 / 3, 2 / 3))
    assert (metrics["greedy_cut"], metrics["greedy_answered"]) == pytest.approx((0, 2 / 3))
    lengths = [len(CHAIN_TOKENIZER.encode(written(PROBLEMS[n], o))) for n, o in enumerate("S1C")]
    assert metrics["response_tokens"] == pytest.approx(np.mean(lengths))
    assert metrics["greedy_response_tokens"] > 1
    assert not [name for name in metrics if "@" in name]


def test_several_responses_give_avg_pass_and_majority():
    """Of problem 0 one of four is right, its wrong ones agree; of 1 half are; of 2 all that answer."""
    metrics = metrics_of({0: "S111", 1: "SS12", 2: "SS0C"})
    assert metrics["accuracy"] == metrics["avg@4"] == metrics["pass@1"] == pytest.approx(5 / 12)
    assert metrics["pass@2"] == pytest.approx((1 / 2 + 5 / 6 + 5 / 6) / 3)
    assert metrics["pass@4"] == 1
    # A sum that is wrong from step 1 or 2 on is off by one in either case: two wrong votes that agree.
    assert metrics["majority@4"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    several = {name for name in metrics if "@" in name}
    ends = ("", "_low", "_high")
    every = {f"{n}{e}" for n in ("pass@1", "pass@2", "pass@4", "majority@4") for e in ends}
    assert several == every | {"avg@4"}
    for name in ("pass@1", "pass@2", "pass@4", "majority@4"):
        assert 0 <= metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"] <= 1
    assert metrics["pass@1_low"] == metrics["accuracy_low"]


def test_what_the_verifier_fails_on_is_wrong_counted_and_kept():
    def fails_on_cut(items):
        if any("\\boxed" not in text for _, text in items):
            raise RecursionError("no box")
        return TASK.score(items)

    kept = []
    metrics = metrics_of({0: "SC", 1: "CS", 2: "SS"}, score=fails_on_cut, keep_errors=kept.extend)
    assert metrics["verifier_errors"] == 2
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert [(e["problem"], e["step"], e["evaluation"]) for e in kept] == [
        ("p0", 5, True),
        ("p1", 5, True),
    ]
    with pytest.raises(RunError, match=r"failed on all 4 responses of the evaluation at step 5"):
        metrics_of({0: "CC", 1: "CC"}, score=fails_on_cut)


def test_a_task_whose_answer_fails_is_named_and_its_responses_do_not_vote(caplog):
    both, _ = answered({0: "S1", 1: "S1"}, 0, 1, samples=2)
    one, _ = answered({0: "S", 1: "S"}, 0, 1, samples=1)

    def fails_on_right(problem, text):
        if TASK.answer(problem, text) == "6":
            raise KeyError("six")
        return TASK.answer(problem, text)

    with caplog.at_level(logging.WARNING):
        metrics = measure(SetResponses("hard", both, one), fails_on_right)
    assert metrics["majority@2"] == 0
    assert "hard: the task's answer(problem, response) failed on 2 of 4 responses" in caplog.text
    assert "KeyError: 'six'" in caplog.text
    caplog.clear()
    measure(SetResponses("hard", both, one), lambda problem, text: 6)
    assert "failed on 4 of 4 responses" in caplog.text
    assert "TypeError: it returned 6: expected a text, or None" in caplog.text
    caplog.clear()
    assert measure(SetResponses("hard", both, one), TASK.answer)["majority@2"] == 0.5
    assert caplog.text == ""


NAMES = st.lists(st.text("ab/_-", min_size=1, max_size=4).filter(lambda n: n.strip("/") == n), min_size=1,
                 max_size=4, unique=True)  # fmt: skip


@given(NAMES, st.data())
@settings(derandomize=True, max_examples=50, deadline=None)
def test_sets_are_found_again_by_their_names(names, data):
    keys = ["accuracy", "pass@2_low", "cut"]
    sets = {name: {key: data.draw(st.floats(0, 1)) for key in keys} for name in names}
    metrics = named(sets)
    assert metrics["eval/accuracy"] == sets[names[0]]["accuracy"]
    assert len(metrics) == len(names) * len(keys)
    assert by_set({"step": 3, "loss": 0.5, "prompts/eval": 1.0} | metrics, names) == sets


def test_several_samples_take_no_other_program():
    one, many = (parse_config({"eval": {"samples": n, "batch": 8}}) for n in (1, 16))
    objective = one.make_objective()
    assert run_shapes(one, objective) == run_shapes(many, objective)
    assert run_shapes(many, objective).evaluate[:2] == (8, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.samples=0", r"eval\.samples: .*greater than 0, got 0"),
        ("eval.samples=-2", r"eval\.samples: .*greater than 0, got -2"),
        ("eval.samples=1.5", r"eval\.samples: .*integer.*got 1\.5"),
        ("eval.samples=many", r"eval\.samples: .*integer.*got 'many'"),
        ("eval.sample=2", r"eval\.sample: unknown key; did you mean 'samples'"),
    ],
)
def test_impossible_numbers_of_samples_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [override])


@pytest.fixture
def one_device(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


class Scripted:
    """What `Experiment.evaluate` reads of an experiment, its sampler by script."""

    def __init__(self, sets, script, **section):
        self.config = parse_config({"seed": 9, "eval": section})
        self.sampler = ScriptedRounds(script)
        self.task, self.decode, self.score = TASK, decode, TASK.score
        self.collector = SimpleNamespace(interrupt=lambda: None, keep_errors=lambda errors: None)
        self.problems = SimpleNamespace(test=sets)
        self.asking = SimpleNamespace()

    def test_prompts(self, name):
        return prompts(*self.problems.test[name])


def test_the_first_set_is_the_main_one_and_each_has_random_numbers_of_its_own():
    """Greedy draws, which use none, are told apart here by another seed of the script's memory."""

    def script(prompt, phase, row, kept):
        experiment.sampler._seen.clear()
        right = phase == PHASE or (prompt, row) == (0, 0)
        return written(PROBLEMS[prompt % len(PROBLEMS)], "S" if right else "1")

    experiment = Scripted({"main": (0, 1, 2), "hard": (0, 1)}, script, samples=2, batch=4)
    seen = []
    metrics = Experiment.evaluate(experiment, POLICY, 6, seen.append)
    assert (metrics["eval/accuracy"], metrics["eval/hard/accuracy"]) == (1.0, 0.25)
    assert (metrics["eval/problems"], metrics["eval/hard/problems"]) == (3, 2)
    assert metrics["eval/hard/greedy_accuracy"] == 0.5
    assert (metrics["eval/pass@2"], metrics["eval/hard/pass@2"]) == (1.0, 0.5)
    assert {call.stream for call in experiment.sampler.calls} == {
        Stream(9, 6, PHASE),
        Stream(9, 6, PHASE + 1),
    }
    assert [of.name for of in seen] == ["main", "hard"]
    assert seen[0].sampled.texts[2][1] == decode(
        np.array(CHAIN_TOKENIZER.encode(written(PROBLEMS[2], "S")))
    )
    assert by_set(metrics, experiment.problems.test)["hard"]["accuracy"] == 0.25


def even_length(problems, responses):
    return [float(len(text) % 2 == 0) for text in responses]


def three_steps(experiment, start, evaluate):
    """The trained weights and the records of three steps from the start, with an evaluation before each."""
    experiment.begin(start.with_params(jax.tree.map(jnp.copy, start.params), 0))
    experiment.source.position = 0
    records = []
    for _ in range(3):
        evaluate()
        records.append(experiment.step())
    return jax.device_get(trained(experiment.policy.params)[0]), records


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "hasty")
def test_training_is_bitwise_the_same_with_evaluations_in_between(tmp_path):
    config = load_config(QUICKSTART, [*TINY.split(), f"run.dir={tmp_path}"])
    evaluations, seen = [], []
    with Experiment(config, reward={"even": even_length}) as experiment:
        start = experiment.warm_started()
        experiment.problems.test["hard"] = [*PROBLEMS]
        plain, records = three_steps(experiment, start, lambda: None)
        beside, others = three_steps(
            experiment, start, lambda: evaluations.append(experiment.evaluate(see=seen.append))
        )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(beside), strict=True):
        np.testing.assert_array_equal(one, other)
    times = ("time/", "seconds")
    for one, other in zip(records, others, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(times)} == {
            k: v for k, v in other.items() if not k.startswith(times)
        }
    assert any(record["grad_norm"] > 0 for record in records)

    assert evaluations[0]["eval/problems"] == 5
    assert evaluations[0]["eval/hard/problems"] == 3
    assert evaluations[0] != evaluations[1] != evaluations[2]
    names = {key.removeprefix("eval/") for key in evaluations[0]}
    main = {name for name in names if "/" not in name}
    assert names == main | {f"hard/{name}" for name in main}
    assert {"avg@3", "pass@2", "pass@3", "majority@3_high", "response_tokens"} <= main
    assert [of.name for of in seen] == ["test", "hard"] * 3
    assert np.shape(seen[0].sampled.texts) == (5, 3)
    assert np.shape(seen[0].greedy.texts) == (5, 1)


def responses(name="test"):
    sampled, _ = answered({0: "S1", 1: "0S"}, 0, 1, samples=2)
    greedy, _ = answered({0: "S", 1: "1"}, 0, 1, samples=1)
    return SetResponses(name, sampled, greedy)


def test_responses_are_kept_one_line_a_problem(tmp_path):
    file = tmp_path / "made" / "responses.jsonl"
    with saving_responses(file) as see:
        assert not file.exists()
        see(responses())
        see(responses("hard"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["set"], line["problem"]) for line in lines] == [
        *(("test", "p0"), ("test", "p1")),
        *(("hard", "p0"), ("hard", "p1")),
    ]
    assert lines[1] == {
        "set": "test",
        "problem": "p1",
        "question": "a9b9c9d9",
        "answer": "6",
        "responses": ["", written(PROBLEMS[1], "S")],
        "rewards": [0.0, 1.0],
        "greedy_response": written(PROBLEMS[1], "1"),
        "greedy_reward": 0.0,
    }
    assert [*file.parent.iterdir()] == [file]


def test_responses_take_no_other_files_place_and_are_whole_or_not_there(tmp_path):
    file = tmp_path / "responses.jsonl"
    with pytest.raises(ZeroDivisionError), saving_responses(file) as see:  # noqa: PT012
        see(responses())
        1 / 0  # noqa: B018
    assert not [*tmp_path.iterdir()]
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"--save .*responses\.jsonl: it exists already"):
        saving_responses(file).__enter__()
    assert file.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--save .*: .*responses\.jsonl is no folder"):
        saving_responses(file / "inside").__enter__()
    with saving_responses(None) as see:
        see(responses())


SETS = {
    "test": measure(responses(), TASK.answer),
    "[hard]": measure(responses("[hard]"), TASK.answer) | {"accuracy": 0.125},
}


def shown(action, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    action(console)
    return console.export_text()


def test_the_table_has_a_row_for_each_set():
    text = shown(lambda console: show(4, SETS, console))
    assert "step 4, 4 held-out problems in 2 sets" in text
    head, *rows = [
        re.split(r" *[│┃] *", line.strip(" │┃")) for line in text.splitlines() if line[0] in "│┃"
    ]
    assert head == [
        *(
            "set",
            "problems",
            "sampled",
            "greedy",
            "pass@2",
            "majority@2",
            "tokens",
            "cut",
            "answered",
        )
    ]
    assert rows[0][:2] == ["test", "2"]
    assert re.fullmatch(r"50\.0% \[\d+\.\d%, \d+\.\d%\]", rows[0][2])
    assert rows[0][3:] == ["50.0%", "100.0%", "75.0%", "16", "0.0%", "75.0%"]
    assert rows[1][0] == "[hard]"
    assert rows[1][2].startswith("12.5% [")
    one = shown(lambda console: show(0, {"test": SETS["test"]}, console))
    assert "step 0, 2 held-out problems\n" in one


def test_a_runs_summary_has_a_column_for_each_other_set(tmp_path):
    history = [{"step": 0} | named(SETS), {"step": 1, "tokens_sampled": 7.0, "optimizer_steps": 1}]
    text = shown(lambda c: Display(c).summary(history, tmp_path, tmp_path / "curve.png"))
    assert re.search(r"sampled\s+┃ greedy ┃\s+\[hard\] ┃ tokens sampled", text)
    assert re.search(r"50\.0% \[[^\]]*\] │\s+50\.0% │ 12\.5% \[", text)


def test_the_command_prints_a_table_or_one_object_and_hands_on_where_to_save(monkeypatch, tmp_path):
    asked = []

    def evaluate_run(config, *, save):
        asked.append((config.eval.samples, save))
        return Evaluated(4, named(SETS), SETS)

    monkeypatch.setattr(finished, "evaluate_run", evaluate_run)
    run = CliRunner(env={"COLUMNS": "160"}).invoke
    result = run(cli.app, ["eval", str(QUICKSTART), "eval.samples=2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found.pop("sets") == SETS
    assert found == {"step": 4} | named(SETS)
    save = tmp_path / "responses.jsonl"
    result = run(cli.app, ["eval", str(QUICKSTART), "--save", str(save)])
    assert "majority@2" in result.output
    assert f"responses: {save}" in result.output
    assert asked == [(2, None), (1, save)]


def test_problems_are_asked_by_the_name_of_their_set():
    class Asking:
        def tokens(self, problems):
            return [np.array([len(p.question)], np.int32) for p in problems]

    of = SimpleNamespace(
        problems=SimpleNamespace(
            test={"main": list(PROBLEMS), "other": [Problem("q", "a1b2c3d4e5", "5")]}
        ),
        asking=Asking(),
    )
    assert [p.problem for p in Experiment.test_prompts(of)] == list(PROBLEMS)
    assert [p.number for p in Experiment.test_prompts(of, "main")] == [0, 1, 2]
    (other,) = Experiment.test_prompts(of, "other")
    assert (other.problem.id, other.number, other.tokens.tolist()) == ("q", 0, [10])
