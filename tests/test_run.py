"""Whole runs of a tiny policy: what they write, repeat, and take up again after a stop or a kill.

The policy has hardly learnt anything, so the reward is scripted: a response is right where its text
has an even length. About half are, and groups carry a gradient.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from model_helpers import assert_same_params

from jaxreset import cli
from jaxreset.config_file import DUMPED, load_config
from jaxreset.errors import ConfigError, RunError
from jaxreset.learning import learner as learner_module
from jaxreset.learning.learner import Learner, TrainProgress
from jaxreset.learning.optimizer import make_optimizer
from jaxreset.learning.update import TrainState, init_state
from jaxreset.models.adapters import trained
from jaxreset.models.policy import load_policy
from jaxreset.reporting.curve import draw_curve
from jaxreset.reporting.report import write_report
from jaxreset.run import loop
from jaxreset.run.checkpoints import Checkpoints, saved_steps
from jaxreset.run.endings import save_finished
from jaxreset.run.experiment import Experiment
from jaxreset.run.folder import RunFolder
from jaxreset.run.lock import locked
from jaxreset.run.loop import train
from jaxreset.run.saved_arrays import load_params
from jaxreset.sampling import programs, schedule
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks import pipeline
from jaxreset.tasks.base import Scores
from jaxreset.tasks.chain import ChainTask

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TINY = """
    model.fresh.layers=2 model.fresh.width=32 model.fresh.heads=2 model.fresh.kv_heads=2 model.fresh.mlp=64
    task.min_terms=3 task.max_terms=5 task.misread=0 task.strict=false reset.localizer.max_tokens=5
    sampling.max_prompt_tokens=18 sampling.max_response_tokens=32 sampling.max_step_tokens=8
    reset.localizer.max_question_tokens=80 warm_start.steps=5 warm_start.batch=8
    train.steps=4 train.prompts_per_step=4 train.microbatch_tokens=1500 train.min_signal_groups=16
    data.eval_size=16 eval.batch=16 eval.every_steps=null checkpoint.every_steps=2
"""
EXEMPT = ("time/", "seconds", "compiles")


def even_length(task, items):
    return Scores(np.array([len(text) % 2 == 0 for _, text in items], np.float64), ())


@pytest.fixture(scope="module", autouse=True)
def scripted(compiled_in_haste):
    """The scripted reward, on one device."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(ChainTask, "score", even_length)
        yield


def tiny(folder, *overrides):
    return load_config(QUICKSTART, [*TINY.split(), f"run.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """A run of four steps: its optimizer steps once, with gradients waiting before and after."""
    return train(tiny(tmp_path_factory.mktemp("unstopped")))


def repeatable(history):
    return [{k: v for k, v in line.items() if not k.startswith(EXEMPT)} for line in history]


def rollouts(folder):
    return {file.name: file.read_text() for file in sorted((folder / "rollouts").iterdir())}


def saved_state(result):
    """Everything of a run's last checkpoint, gradients waiting for an optimizer step included."""
    config = load_config(result.folder / "config.yaml")
    optimizer = make_optimizer(config.optimizer.make(config.train.steps))
    checkpoints = Checkpoints(result.folder / "checkpoints", config.checkpoint)
    params, _ = trained(result.policy.params)
    return checkpoints.restore(init_state(params, optimizer))


def assert_same_end(one, other):
    """Both runs ended with the same bits and the same rollouts."""
    (state, progress), (other_state, other_progress) = saved_state(one), saved_state(other)
    assert progress == other_progress
    assert_same_params(state, other_state)
    assert_same_params(one.policy.params, other.policy.params)
    assert rollouts(one.folder) == rollouts(other.folder)


def test_a_run_writes_its_folder(unstopped):
    folder = unstopped.folder
    assert {f.name for f in folder.iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "rollouts", "checkpoints", "learning_curve.png",
        "report.html", "warm_start.jsonl",
    }  # fmt: skip
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["loss"]["aggregation"] == "sequence"  # resolved
    assert saved["train"]["min_signal_groups"] == 16
    started = load_config(folder / "config.yaml")
    assert saved["task"]["date"] == started.task.date.isoformat()  # the day of its start
    task = started.task.model_copy(update={"date": None})
    assert started.model_copy(update={"task": task}) == tiny(folder)
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["2", "4"]
    assert unstopped.curve.read_bytes().startswith(b"\x89PNG")
    assert unstopped.curve.parent == folder


def test_rewards_that_are_not_finite_skip_updates_and_end_the_run(tmp_path, monkeypatch):
    def sometimes_nan(task, items):
        scores = even_length(task, items)
        rewards = np.where([len(text) % 7 == 0 for _, text in items], np.nan, scores.rewards)
        return Scores(rewards, ())

    monkeypatch.setattr(ChainTask, "score", sometimes_nan)
    overrides = ("train.min_signal_groups=0", "train.max_nonfinite=3", "warm_start.steps=0")
    with pytest.raises(RunError, match=r"3 gradients in a row .* groups in nonfinite/"):
        train(tiny(tmp_path, *overrides))
    files = sorted((tmp_path / "nonfinite").iterdir())
    assert [file.name for file in files] == [f"step_{n:06d}.jsonl" for n in (1, 2, 3)]
    for file in files:
        for line in file.read_text().splitlines():
            group = json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
            assert None in group["rewards"] or None in group["advantages"]
            assert len(group["suffixes"]) == len(group["suffix_texts"]) == len(group["rewards"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["skipped_updates"] for line in history[1:]] == [1, 1]  # the third ended the run
    assert [line["grad_norm"] for line in history[1:]] == [None, None]
    for file in (tmp_path / "rollouts").iterdir():
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
    curve = draw_curve(history, tmp_path / "learning_curve.png")
    assert "class='wrong'" in write_report(tmp_path, history, curve).read_text()


def test_a_run_in_bfloat16_learns_from_resets(tmp_path):
    """With a falling rate, and minibatches."""
    options = "objective=rrpo", "train.minibatch_prompts=2", "optimizer.schedule=linear"
    brief = (
        "warm_start.steps=0",
        "train.steps=2",
        "model.fresh.layers=1",
        "train.microbatch_tokens=1",
    )
    config = tiny(tmp_path, "model.dtype=bfloat16", "train.min_signal_groups=0", *options, *brief)
    before = new_params(config)
    done = train(config)
    for line in done.history[1:]:
        assert np.isfinite(list(line.values())).all()
        assert line["groups/with_signal"] > 0
        assert line["optimizer_steps"] == 2
        assert line["grad_norm"] > 0
        assert line["logp_gap"] < 0.1
    full = config.optimizer.learning_rate  # the second of four updates, then the last
    rates = [line["learning_rate"] for line in done.history[1:]]
    np.testing.assert_allclose(rates, [0.75 * full, 0.25 * full], rtol=1e-6)
    for old, new in zip(before, jax.tree.leaves(done.policy.params), strict=True):
        assert new.dtype == np.float32  # what is trained is kept wide
        assert not np.array_equal(old, new)


def new_params(config):
    return [np.float32(x) for x in jax.tree.leaves(Experiment(config).start_policy.params)]


def test_a_verifier_that_fails_on_some_responses_does_not_end_a_run(tmp_path, monkeypatch):
    """Nor does it when the run goes on, and it fails on the same ones."""

    def fails_on_some(task, items):
        for _, text in items:
            if len(text) % 7 == 0:
                raise RecursionError(f"{len(text)} characters")
        return even_length(task, items)

    monkeypatch.setattr(ChainTask, "score", fails_on_some)
    whole = train(tiny(tmp_path))
    errors = (tmp_path / "verifier_errors.jsonl").read_text()
    for line in map(json.loads, errors.splitlines()):
        assert len(line["response"]) % 7 == 0
        assert line["error"] == f"RecursionError: {len(line['response'])} characters"
    counts = [line["verifier/errors"] for line in whole.history[1:]]
    assert sum(counts) > 0
    assert sum(counts) + sum(line.get("eval/verifier_errors", 0) for line in whole.history) == len(
        errors.splitlines()
    )
    tree = json.loads((tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    for row in tree["groups"][0]["rows"]:
        assert row["reward"] == (len(row["text"]) % 2 == 0 and len(row["text"]) % 7 > 0)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again = train(tiny(tmp_path))
    assert repeatable(again.history) == repeatable(whole.history)
    assert (tmp_path / "verifier_errors.jsonl").read_text() == errors


def test_a_verifier_that_fails_on_all_ends_the_run(tmp_path, monkeypatch, capsys):
    def broken(task, items):
        raise KeyError("no such grader")

    monkeypatch.setattr(ChainTask, "score", broken)
    settings = *TINY.split(), f"run.dir={tmp_path}", "warm_start.steps=0"
    jaxreset(monkeypatch, "train", QUICKSTART, *settings, code=1)
    shown = capsys.readouterr().err
    assert "failed on all 16 responses of the evaluation at step 0" in shown
    assert re.search(r"problem 'test:0', response '.*': KeyError: 'no such grader'", shown)
    assert len((tmp_path / "verifier_errors.jsonl").read_text().splitlines()) == 16


def test_a_run_without_reward_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ChainTask, "score", lambda task, items: Scores(np.zeros(len(items)), ()))
    settings = *TINY.split(), f"run.dir={tmp_path}", "warm_start.steps=0"
    monkeypatch.setenv("COLUMNS", "1000")
    jaxreset(monkeypatch, "train", QUICKSTART, *settings, "train.steps=2")
    shown = capsys.readouterr().out
    assert shown.count("All rewards are 0, so nothing is learnt: ") == 1
    assert "nothing was learnt: no optimizer step in 2 steps" in shown
    at_once, alarm = map(json.loads, (tmp_path / "alarms.jsonl").read_text().splitlines())
    assert (at_once["kind"], at_once["step"]) == ("nothing solved", 0)
    assert at_once["response"]
    assert (alarm["kind"], alarm["step"]) == ("no reward", 1)
    first = json.loads((tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert alarm["response"] == first["groups"][0]["rows"][0]["text"]
    assert "All rewards are 0" in (tmp_path / "report.html").read_text()


def test_metrics_have_one_line_a_step(unstopped):
    lines = (unstopped.folder / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert history == unstopped.history
    assert [line["step"] for line in history] == [0, 1, 2, 3, 4]
    assert ["eval/accuracy" in line for line in history] == [True, False, False, False, True]
    for line in history[1:]:
        assert {
            "seconds", "tokens_sampled", "loss", "grad_norm", "reward/mean", "logp_gap", "compiles",
            "reset/step", "reset/kept_tokens", "groups/signal_share", "time/tokens_per_second",
        } <= line.keys()  # fmt: skip
        assert all(isinstance(v, int | float) and np.isfinite(v) for v in line.values())
        assert 0.2 < line["reward/mean"] < 0.8
        assert line["data/position"] == 4 * line["step"]
    # Sixteen groups with a gradient take two or three steps to come together.
    assert [line["optimizer_steps"] for line in history[1:]] in ([0, 0, 1, 0], [0, 1, 0, 0])
    assert [line["grad_norm"] > 0 for line in history[1:]] == [
        line["optimizer_steps"] > 0 for line in history[1:]
    ]


def test_rollouts_are_reset_trees(unstopped):
    files = sorted((unstopped.folder / "rollouts").iterdir())
    assert [f.name for f in files] == [f"step_{n:06}.jsonl" for n in (1, 2, 3, 4)]
    for step, file in enumerate(files, 1):
        trees = [json.loads(line) for line in file.read_text().splitlines()]
        assert [tree["index"] for tree in trees] == list(range(4 * step - 4, 4 * step))
        for tree in trees:
            base, reset = tree["groups"]
            assert tree["step"] == step
            assert base["kept"] == ""
            assert len(base["rows"]) == len(reset["rows"]) == 4
            for row in base["rows"] + reset["rows"]:
                assert row["reward"] == (len(row["text"]) % 2 == 0)
            if reset["parent_row"] is not None:  # else nothing failed
                parent = base["rows"][reset["parent_row"]]
                assert parent["reward"] == 0
                assert parent["text"].startswith(reset["kept"])
                assert all(row["text"].startswith(reset["kept"]) for row in reset["rows"])


def test_one_seed_gives_one_run(unstopped, tmp_path):
    again = train(tiny(tmp_path / "again"))
    assert repeatable(again.history) == repeatable(unstopped.history)
    assert_same_end(again, unstopped)


def test_another_seed_gives_another_run(unstopped, tmp_path):
    other = train(tiny(tmp_path / "other", "seed=1", "train.steps=1"))
    assert other.history[1]["tokens_sampled"] != unstopped.history[1]["tokens_sampled"]


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(unstopped, tmp_path):
    stopped = train(tiny(tmp_path, "train.steps=2"))
    assert stopped.history[-1]["step"] == 2
    assert saved_state(stopped)[1].signal_groups > 0 or stopped.history[2]["optimizer_steps"]
    as_an_older_version_left_it(tmp_path)
    resumed = train(tiny(tmp_path))
    # The line of step 2 differs: it was a last one, and so evaluated.
    for n in (0, 1, 3, 4):
        assert repeatable(resumed.history)[n] == repeatable(unstopped.history)[n]
    assert_same_end(resumed, unstopped)


def as_an_older_version_left_it(folder):
    """The saved config without the keys that the first version didn't know."""

    def kept(values, known):
        if not isinstance(known, dict):
            return values
        return {key: kept(values[key], old) for key, old in known.items()}

    known = yaml.safe_load((Path(__file__).parent / "fixtures" / "older_config.yaml").read_text())
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["loss"]["advantage_scale"] = values["loss"]["advantage"]  # as it was called
    (folder / "config.yaml").write_text(f"{DUMPED}\n{yaml.safe_dump(kept(values, known))}")


FROM_THE_START = ("objective=grpo", "loss.kl=10", "train.min_signal_groups=0", "checkpoint.keep=1")


def test_a_stopped_run_is_pulled_towards_the_policy_that_it_started_from(tmp_path):
    """Of which no checkpoint is left, but what the warm start made."""
    whole = train(tiny(tmp_path / "whole", *FROM_THE_START))
    train(tiny(tmp_path / "stopped", *FROM_THE_START, "train.steps=2"))
    assert_same_end(train(tiny(tmp_path / "stopped", *FROM_THE_START)), whole)


def test_adapters_alone_are_trained_and_saved(tmp_path, monkeypatch, capsys):
    options = *FROM_THE_START, "model.lora.rank=4", "model.lora.targets=[q, v, up]"
    whole = train(tiny(tmp_path / "whole", *options))
    check_shapes_and_logps(whole.history)
    train(tiny(tmp_path / "stopped", *options, "train.steps=2"))
    resumed = train(tiny(tmp_path / "stopped", *options))
    assert_same_end(resumed, whole)

    state, _ = saved_state(whole)
    adapters, base = trained(whole.policy.params)
    assert len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(adapters)) == 6
    stored = sum(x.size for x in jax.tree.leaves(state))
    assert stored < 4.1 * sum(x.size for x in jax.tree.leaves(adapters))  # and two moments, a sum
    assert all(np.asarray(b).any() for b in jax.tree.leaves(adapters))  # B was 0
    assert_same_params(base, load_params(whole.folder / "start", base))  # after the warm start

    config = whole.folder / "config.yaml"
    jaxreset(monkeypatch, "eval", config, "--json")
    accuracy = json.loads(capsys.readouterr().out)["eval/accuracy"]
    assert accuracy == whole.history[-1]["eval/accuracy"]
    jaxreset(monkeypatch, "export", config, tmp_path / "model")
    merged, tokens = load_policy(tmp_path / "model"), np.arange(10)[None]
    np.testing.assert_allclose(merged.logits(tokens), whole.policy.logits(tokens), atol=1e-5)


def test_a_killed_run_starts_again_at_its_checkpoint(unstopped, tmp_path, monkeypatch):
    save = Checkpoints.save

    def killed(self, state, progress, *metrics):
        if progress.step == 4:
            raise KeyboardInterrupt
        save(self, state, progress, *metrics)

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path))
    monkeypatch.undo()
    assert len(rollouts(tmp_path)) == 4  # of steps that will be run again
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        assert metrics.tell() > 0
        metrics.write('{"step": 5, "los')
    (tmp_path / "rollouts" / "step_000005.jsonl").write_text("torn")
    resumed = train(tiny(tmp_path))
    assert repeatable(resumed.history) == repeatable(unstopped.history)
    assert_same_end(resumed, unstopped)


def signal_at(call, number):
    """Scores as `even_length`; the machine is to be taken away while it does so for the nth time."""
    calls = []

    def score(task, items):
        calls.append(len(items))
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return even_length(task, items)

    return score


def assert_nothing_is_lost(folder, step):
    """All steps in the metrics are saved, up to this one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(step + 1))
    assert max(map(int, os.listdir(folder / "checkpoints"))) == step
    return lines


@pytest.mark.parametrize(
    ("number", "name", "code", "call", "step"),
    [(signal.SIGTERM, "SIGTERM", 75, 5, 1), (signal.SIGINT, "Ctrl-C", 130, 11, 4)],
)
def test_a_signal_ends_a_run_before_its_next_round(
    unstopped, tmp_path, monkeypatch, capsys, number, name, code, call, step
):
    """Two evaluations at the start and the end, and two rounds a step: what is drawn of a step is
    thrown away, and of the last step only the evaluation is left to do."""
    before = signal.getsignal(number)
    config = unstopped.folder / "config.yaml"
    monkeypatch.setattr(ChainTask, "score", signal_at(call, number))
    jaxreset(monkeypatch, "train", config, f"run.dir={tmp_path}", code=code)
    shown = capsys.readouterr()
    assert f"ended by {name}; step {step} is saved, the same command goes on from" in shown.err
    assert signal.getsignal(number) is before
    assert "eval/accuracy" not in assert_nothing_is_lost(tmp_path, step)[-1]
    monkeypatch.setattr(ChainTask, "score", even_length)
    resumed = train(tiny(tmp_path))
    assert repeatable(resumed.history) == repeatable(unstopped.history)
    assert_same_end(resumed, unstopped)


# Where Ctrl-C comes: what is called then, for the how manyth time, and the last step that is saved.
MOMENTS = [
    (pipeline.PromptSource, "__init__", 1, None),  # all is being read
    (ChainTask, "demonstrate_solution", 20, None),  # the warm start
    (Checkpoints, "save", 1, 0),
    (Learner, "compile", 1, 0),
    (Sampler, "sample", 1, 0),  # the evaluation at the start
    (Learner, "learn", 1, 1),
    (RunFolder, "log", 1, 2),
    (loop, "write_report", 1, 4),
]


def test_ctrl_c_loses_no_finished_step(unstopped, tmp_path, monkeypatch, capsys):
    """One run, interrupted again and again."""
    for owner, called, nth, saved in MOMENTS:
        function, calls = getattr(owner, called), []

        def interrupted(*args, function=function, calls=calls, nth=nth, **kwargs):
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGINT)
            return function(*args, **kwargs)

        code = 0 if saved == 4 else 130  # it has ended
        with monkeypatch.context() as patch:
            patch.setattr(owner, called, interrupted)
            jaxreset(patch, "train", QUICKSTART, *TINY.split(), f"run.dir={tmp_path}", code=code)
        assert len(calls) >= nth
        shown = capsys.readouterr().err
        assert not (tmp_path / "run.lock").exists()
        if saved is None:
            assert "ended by Ctrl-C; the same command starts again" in shown
            assert not (tmp_path / "checkpoints").exists()
        elif saved < 4:
            assert f"ended by Ctrl-C; step {saved} is saved, the same command goes on" in shown
            if saved:  # else it has no metrics yet
                assert_nothing_is_lost(tmp_path, saved)
    assert_nothing_is_lost(tmp_path, 4)
    resumed = train(tiny(tmp_path))  # which only reads what is there
    assert repeatable(resumed.history) == repeatable(unstopped.history)
    assert_same_end(resumed, unstopped)


def test_sigterm_ends_a_warm_start(tmp_path, monkeypatch, capsys):
    make = pipeline.PromptSource.__init__

    def about_to_begin(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        make(self, *args, **kwargs)

    monkeypatch.setattr(pipeline.PromptSource, "__init__", about_to_begin)
    jaxreset(monkeypatch, "train", QUICKSTART, *TINY.split(), f"run.dir={tmp_path}", code=75)
    assert "ended by SIGTERM; the same command starts again" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_in_a_folder_keeps_others_out_and_lets_them_read(unstopped, monkeypatch, capsys):
    config = unstopped.folder / "config.yaml"
    with locked(unstopped.folder):
        with pytest.raises(ConfigError, match=f"in use: process {os.getpid()} on host"):
            train(tiny(unstopped.folder))
        jaxreset(monkeypatch, "train", config, code=2)
        assert f"in use: process {os.getpid()} on host" in capsys.readouterr().err
        jaxreset(monkeypatch, "train", config, "--dry-run")
        jaxreset(monkeypatch, "eval", config, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 4


# No result changes with these but for rounding.
SMALLER = (
    "train.remat=true", "train.microbatch_tokens=700", "sampling.slots=8",
    "sampling.hold_cache=never", "task.processes=1", "checkpoint.every_steps=3",
)  # fmt: skip
ALWAYS = (
    "objective=rrpo", "model.fresh.layers=1", "warm_start.steps=0", "train.steps=3",
    "train.min_signal_groups=0",
)  # fmt: skip


def test_a_run_out_of_memory_goes_on_with_keys_that_take_less(tmp_path, monkeypatch, capsys):
    """It ends in the update of step 2, with step 0 saved by the config, after the update has taken the
    sum of gradients over; what it had finished is saved all the same."""
    accumulate, learn = learner_module.accumulate, Learner.learn

    def too_large(gradients, *args, **kwargs):
        accumulate(gradients, *args, **kwargs)
        assert all(x.is_deleted() for x in jax.tree.leaves(gradients))
        message = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nlong tables"
        raise jax.errors.JaxRuntimeError(message)

    def learn_in_vain(self, *args):
        if self.progress.step == 1:
            patch.setattr(learner_module, "accumulate", too_large)
        return learn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", learn_in_vain)
        run = "train", QUICKSTART, *TINY.split(), *ALWAYS, f"run.dir={tmp_path}/run"
        jaxreset(patch, *run, "checkpoint.every_steps=100", code=1)
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1  # noqa: PT018
    assert "memory doesn't suffice (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)" in shown
    for key in (
        "train.remat=true", "train.microbatch_tokens=750", "sampling.hold_cache=never",
        "sampling.slots=", "step 1 is saved",
    ):  # fmt: skip
        assert key in shown
    assert_nothing_is_lost(tmp_path / "run", 1)

    (tmp_path / "run" / "run.lock").write_text("{}")  # of one that was killed
    moved = train(tiny(tmp_path / "run", *ALWAYS, *SMALLER))
    whole = train(tiny(tmp_path / "whole", *ALWAYS, *SMALLER))
    changes = json.loads((tmp_path / "run" / "changes.jsonl").read_text())
    assert changes["step"] == 1
    assert {key.partition("=")[0] for key in SMALLER} == changes["changed"].keys()
    assert load_config(tmp_path / "run" / "config.yaml").train.remat
    assert_equal_within_rounding(moved, whole, after=0)


def assert_equal_within_rounding(one, other, *, after):
    """The same was drawn in each step after this one, and what was learnt from it is almost the same."""
    for line, theirs in zip(one.history[after + 1 :], other.history[after + 1 :], strict=True):
        assert line["optimizer_steps"] == 1
        for name in ("tokens_sampled", "reward/mean", "groups/with_signal"):
            assert line[name] == theirs[name]
        for name in ("loss", "grad_norm", "policy/entropy"):
            np.testing.assert_allclose(line[name], theirs[name], rtol=1e-3, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(one.policy.params), jax.tree.leaves(other.policy.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("taken", [None, "gradients", "params"])
def test_what_an_update_has_taken_is_not_saved(tmp_path, taken):
    """A sum of nothing is made anew; parameters that are gone are in an older checkpoint."""
    config = tiny(tmp_path)
    state = TrainState({"w": jnp.ones(3)}, (), {"w": jnp.zeros(3)})
    checkpoints = Checkpoints(tmp_path / "checkpoints", config.checkpoint)
    checkpoints.save(state, TrainProgress(step=1))
    if taken is not None:
        getattr(state, taken)["w"].delete()
    save_finished(checkpoints, state, TrainProgress(step=2))
    checkpoints.close()
    assert max(saved_steps(checkpoints.path)) == (1 if taken == "params" else 2)
    waiting = TrainProgress(step=3, normalizer=8.0)  # gradients of some groups
    save_finished(checkpoints, state, waiting)
    checkpoints.close()
    assert max(saved_steps(checkpoints.path)) == {None: 3, "gradients": 2, "params": 1}[taken]


def damage(checkpoint):
    """Flips a bit of the numbers, which Orbax doesn't notice."""
    largest = max((checkpoint / "state").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_a_damaged_checkpoint_costs_its_steps(unstopped, tmp_path, monkeypatch, caplog, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(unstopped.folder, folder)
    damage(folder / "checkpoints" / "4")
    jaxreset(monkeypatch, "eval", folder / "config.yaml", f"run.dir={folder}", "--json")
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert f"{folder}/checkpoints/4 is damaged (other bits than were saved: " in caplog.text
    again = train(tiny(folder))
    assert repeatable(again.history) == repeatable(unstopped.history)
    assert_same_end(again, unstopped)
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["2", "4", "4.damaged"]

    for step in ("2", "4"):
        damage(folder / "checkpoints" / step)
    jaxreset(monkeypatch, "train", QUICKSTART, *TINY.split(), f"run.dir={folder}", code=1)
    assert f"{folder}/checkpoints/2 is damaged" in (shown := capsys.readouterr().err)
    assert "bring one back from a backup, or start anew with another run.dir" in shown
    assert RunFolder(tiny(folder)).history() == again.history  # nothing is cut


@pytest.fixture
def eight_devices(monkeypatch):
    every = jax.local_devices()
    assert len(every) == 8
    monkeypatch.setattr(jax, "devices", lambda *_: every)


def test_a_run_goes_on_on_another_mesh(tmp_path, eight_devices):
    """One device, then eight: sums are taken in another order, so the end is equal within rounding."""
    options = "objective=grpo", "train.min_signal_groups=0", "mesh.data=1"
    with pytest.MonkeyPatch.context() as patch:
        one = jax.local_devices()[:1]
        patch.setattr(jax, "devices", lambda *_: one)
        whole = train(tiny(tmp_path / "whole", *options))
        train(tiny(tmp_path / "moved", *options, "train.steps=2"))
    mesh = "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"
    moved = train(tiny(tmp_path / "moved", *options, *mesh))
    assert len(jax.tree.leaves(moved.policy.params)[0].sharding.device_set) == 8
    assert_equal_within_rounding(moved, whole, after=2)


def test_a_finished_run_started_again_changes_nothing(unstopped, tmp_path):
    shutil.copytree(unstopped.folder, tmp_path / "copy")
    again = train(tiny(tmp_path / "copy"))
    assert again.history == unstopped.history
    assert_same_end(again, unstopped)


OBJECTIVES = {
    "grpo": ["objective=grpo"],
    "rrpo": ["objective=rrpo"],
    "rrpo-paper": ["objective=rrpo", "method=paper"],
    "srpo-paper-2x4": ["objective=srpo", "method=paper", "reset.layout=2x4"],
    "ladder": ["objective=ladder", "reset.when=any_failure"],
    "ladder-inline": [
        "objective=ladder",
        "reset.when=any_failure",
        "reset.localizer.mode=inline",
        "reset.localizer.max_question_tokens=4",
    ],
    "rrpo-regularized": [
        "objective=rrpo",
        "loss.clip=0.2",
        "loss.ratio_to=trainer",
        "loss.importance_cap=2",
        "loss.kl=0.1",
        "loss.entropy_bonus=0.01",
        "loss.overlong=mask",
        "loss.overlong_penalty=0.5",
        "train.epochs=2",
        "train.minibatch_prompts=2",
    ],
    "srpo-scored-not-held": [
        "objective=srpo",
        "reset.localizer.mode=score",
        "sampling.hold_cache=never",
    ],
}


@pytest.mark.parametrize("overrides", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_nothing_compiles_after_the_first_step(overrides, tmp_path):
    history = train(
        tiny(tmp_path, *overrides, "train.steps=3", "train.min_signal_groups=0")
    ).history
    check_shapes_and_logps(history)
    drawn = history[1]["groups/drawn"]
    assert drawn > 4 if "objective=grpo" not in overrides else drawn == 4


def test_nothing_compiles_after_the_first_step_of_srpo(unstopped):
    check_shapes_and_logps(unstopped.history)


def test_nothing_compiles_later_where_rows_change_lanes(tmp_path, monkeypatch):
    """Responses of several windows: lanes become fewer, and rows go by pages."""
    for name, least in {"MIN_WINDOW": 8, "MIN_LANES": 4}.items():
        monkeypatch.setattr(schedule, name, least)
    ran, run = Counter(), programs.run

    def counted(function, *args, **static):
        ran[function.__name__] += 1
        return run(function, *args, **static)

    monkeypatch.setattr(programs, "run", counted)
    config = tiny(tmp_path, "train.steps=2", "train.min_signal_groups=0")
    check_shapes_and_logps(train(config).history)
    assert ran.keys() >= {"lift", "lay", "fork"}


def check_shapes_and_logps(history):
    assert len({line["compiles"] for line in history}) == 1
    for line in history[1:]:
        assert line["logp_gap"] < 1e-4
        assert line["groups/with_signal"] > 0


def test_trackers_that_fail_do_not_stop_a_run(unstopped, tmp_path, monkeypatch, caplog):
    seen = []

    def log(record, step):
        seen.append(step)
        if step == 1:
            raise ConnectionError("no route to host")

    wandb = SimpleNamespace(init=lambda **_: SimpleNamespace(log=log, finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # not installed
    with caplog.at_level(logging.WARNING):
        config = tiny(tmp_path, "run.tensorboard=true", "run.wandb_project=p", "train.steps=2")
        history = train(config).history
    assert repeatable(history)[:2] == repeatable(unstopped.history)[:2]
    assert seen == [0, 1]
    assert "run.tensorboard is switched off: ModuleNotFoundError" in caplog.text
    assert "run.wandb_project is switched off: ConnectionError: no route to host" in caplog.text


def test_the_oldest_rollouts_make_room(tmp_path):
    folder = RunFolder(tiny(tmp_path, "run.rollouts_mb=0.01"))
    folder.check_writable()
    for step in range(1, 6):
        folder.save_trees(step, [{"text": "x" * 4000}])
    assert list(rollouts(tmp_path)) == ["step_000004.jsonl", "step_000005.jsonl"]
    off = RunFolder(tiny(tmp_path / "off", "run.rollouts_mb=0"))
    off.check_writable()
    off.save_trees(1, [{"text": "x"}])
    assert rollouts(tmp_path / "off") == {}


def jaxreset(monkeypatch, *arguments, code=0):
    monkeypatch.setattr(sys, "argv", ["jaxreset", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code


def test_eval_repeats_the_accuracy_of_the_last_step(unstopped, monkeypatch, capsys):
    jaxreset(monkeypatch, "eval", unstopped.folder / "config.yaml", "--json")
    result = json.loads(capsys.readouterr().out)
    last = unstopped.history[-1]
    sets = result.pop("sets")
    assert result == {k: v for k, v in last.items() if k.startswith("eval/") or k == "step"}
    assert {"step": 4} | {f"eval/{k}": v for k, v in sets["test"].items()} == result
    jaxreset(monkeypatch, "eval", unstopped.folder / "config.yaml", "eval.temperature=0.5")
    assert "step 4, 16 held-out problems" in capsys.readouterr().out


def test_export_writes_a_folder_that_loads(unstopped, tmp_path, monkeypatch, capsys):
    config = unstopped.folder / "config.yaml"
    jaxreset(monkeypatch, "export", config, tmp_path / "model")
    assert "step 4 exported to" in capsys.readouterr().out
    loaded = load_policy(tmp_path / "model")
    assert_same_params(loaded.params, unstopped.policy.params)
    assert loaded.eos_ids == unstopped.policy.eos_ids
    text = "a3b8\n1:a3=3\n\\boxed{1}?\n"
    assert loaded.tokenizer.encode(text) == unstopped.policy.tokenizer.encode(text)
    # and the exported policy is a start for another run
    jaxreset(monkeypatch, "eval", config, f"run.dir={tmp_path}/new", f"model.path={tmp_path}/model")
    assert "step 0, 16 held-out problems" in capsys.readouterr().out
