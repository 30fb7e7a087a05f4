"""The command line: help, the dry run, a traced run, and what a run that breaks leaves behind."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from model_helpers import assert_same_params, random_policy
from orbax.checkpoint import v1 as ocp
from typer.testing import CliRunner

from jaxreset import cli, config_file
from jaxreset.config_file import load_config
from jaxreset.errors import RunError
from jaxreset.learning.learner import TrainProgress
from jaxreset.learning.optimizer import make_optimizer
from jaxreset.learning.update import init_state
from jaxreset.models.adapters import trained
from jaxreset.models.block import DecoderConfig
from jaxreset.models.policy import load_policy
from jaxreset.planning.footprint import here
from jaxreset.run import loop
from jaxreset.run.checkpoints import Checkpoints
from jaxreset.run.compiles import compiles
from jaxreset.run.experiment import Experiment
from jaxreset.run.folder import RunFolder
from jaxreset.tasks.base import Scores
from jaxreset.tasks.chain import ChainTask

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TINY = """
    reset.localizer.max_tokens=5 reset.localizer.max_question_tokens=112
    sampling.max_prompt_tokens=18 sampling.max_response_tokens=24
    sampling.max_step_tokens=8 warm_start.steps=0
    train.steps=3 train.prompts_per_step=2 train.microbatch_tokens=500 train.min_signal_groups=0
    data.eval_size=4 eval.batch=4 eval.every_steps=null checkpoint.every_steps=1
"""


def even_length(task, items):
    return Scores(np.array([len(text) % 2 == 0 for _, text in items], np.float64), ())


@pytest.fixture(scope="module", autouse=True)
def scripted(compiled_in_haste):
    """Rewards as in test_run, on one device."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(ChainTask, "score", even_length)
        yield


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A folder with a tiny policy for the chain task."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    sizes = DecoderConfig(
        vocab=45, layers=2, width=32, heads=2, kv_heads=2, head_dim=16, mlp=48, qk_norm=True
    )
    random_policy(sizes, tokenizer).export(folder)
    return folder


@pytest.fixture
def jaxreset(model, monkeypatch, capsys):
    """Runs `jaxreset COMMAND quickstart.yaml …` with tiny settings; returns what it prints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(command, *overrides, output=(), code=0):
        settings = [*TINY.split(), f"model.path={model}", *overrides]
        monkeypatch.setattr(sys, "argv", ["jaxreset", command, str(QUICKSTART), *output, *settings])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert ended.value.code == code, shown.err
        return shown.out + shown.err

    return run


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["CONFIG", "KEY=VALUE", "--dry-run"]),
        ("eval", ["CONFIG", "KEY=VALUE", "--json", "--save"]),
        ("export", ["CONFIG", "OUTPUT", "KEY=VALUE", "--adapters", "--dtype", "--coordinator"]),
        ("plan", ["CONFIG", "KEY=VALUE", "--topology", "--json", "--largest"]),
    ],
)
def test_help_lists_typed_arguments(command, arguments):
    result = CliRunner(env={"COLUMNS": "120"}).invoke(cli.app, [command, "--help"])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert result.exit_code == 0
    for argument in arguments:
        assert argument.lower() in shown.lower()
    assert re.search(r"config\W+path\W+YAML file; see configs/", shown, re.IGNORECASE)
    assert command in CliRunner().invoke(cli.app, ["--help"]).output


def test_a_dry_run_prints_shapes_and_memory_and_does_nothing(jaxreset, model, tmp_path):
    here(load_config(QUICKSTART))  # counting an optimizer's state compiles a one-line program
    before = compiles()
    shown = jaxreset("train", "--dry-run", f"run.dir={tmp_path}/run")
    assert compiles() == before
    assert list(tmp_path.iterdir()) == []
    assert "aggregation: sequence" in shown  # resolved
    assert f"dir: {tmp_path}/run" in shown
    # (groups, rows, prefix, suffix) of each program, and keys and values in 4 bytes:
    # 2 x 2 layers x 2 heads x 16 numbers x groups x (prefix + rows x suffix) slots
    for row in (
        "sample 2 4 18 24 114.0 KiB",
        "resume 2 4 42 24 138.0 KiB",
        "localize 2 1 112 5 117.0 KiB",
        "evaluate 4 1 18 24 84.0 KiB",
        "update bins lanes 3 4 41 24 411 tokens",
        "update bins lanes 1 4 41 24 137 tokens",
    ):
        assert re.search(r"\W+".join(row.split()), shown), row
    parameters = sum(x.size for x in jax.tree.leaves(load_policy(model).params))
    assert re.search(rf"parameters +{parameters:,} \(float32\)", shown)
    assert re.search(r"most at once +\d+\.\d MiB of \d+\.\d GiB, while \w+: .* left", shown)
    assert "100,000 to train on, 4 held out, 0 dropped" in shown


def test_a_run_shows_its_table_and_traces_the_chosen_step(model, tmp_path, monkeypatch):
    """In a process of its own: where the TPU's compiler has been loaded, the profiler crashes."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    settings = [*TINY.split(), f"model.path={model}", f"run.dir={tmp_path}", "objective=grpo"]
    chosen = "run.profile_steps=[2]", "train.steps=2"
    command = [sys.executable, "-m", "jaxreset", "train", str(QUICKSTART), *settings, *chosen]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "training 2/2  reward 0." in shown
    assert re.search(r"tokens/s", shown)
    assert "accuracy on held-out problems" in shown
    assert str(tmp_path / "learning_curve.png") in shown
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_run_that_breaks_leaves_what_it_computed(jaxreset, tmp_path, monkeypatch):
    calls = []

    def broken(task, items):
        calls.append(len(items))
        if len(calls) == 5:  # two evaluations, then a call for each step
            raise ValueError("the verifier is broken")
        return even_length(task, items)

    monkeypatch.setattr(ChainTask, "score", broken)
    with pytest.raises(ValueError, match="the verifier is broken"):  # with its traceback
        jaxreset("train", "objective=grpo", f"run.dir={tmp_path}")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert sorted(f.stem for f in (tmp_path / "rollouts").iterdir()) == [
        "step_000001",
        "step_000002",
    ]
    jaxreset("train", "objective=grpo", f"run.dir={tmp_path}")
    again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert again[:3] == lines
    assert again[3]["step"] == 3


def test_a_run_without_finite_gradients_ends_with_one_message(jaxreset, monkeypatch):
    def diverging(config, display):
        raise RunError("5 gradients in a row weren't finite [see rollouts/]")

    monkeypatch.setattr(loop, "train", diverging)
    shown = jaxreset("train", code=1)
    assert shown == "error: 5 gradients in a row weren't finite [see rollouts/]\n"


def test_ctrl_c_before_a_run_waits_for_the_imports(jaxreset, monkeypatch, tmp_path):
    parse, parsed = config_file.parse_config, []

    def interrupted(values):
        os.kill(os.getpid(), signal.SIGINT)
        parsed.append(parse(values))
        return parsed[0]

    other = threading.Event()  # a signal goes to any thread that doesn't block it
    threading.Thread(target=other.wait, daemon=True).start()
    monkeypatch.setattr(config_file, "parse_config", interrupted)
    shown = jaxreset("train", f"run.dir={tmp_path}/run", code=130)
    assert shown == "ended by Ctrl-C; the same command starts again\n"
    other.set()
    assert parsed
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_to_evaluate_or_export_without_a_run(jaxreset, tmp_path):
    nowhere = (f"run.dir={tmp_path}/none", "model.path=null")
    assert "holds no checkpoint, and model.path is null; train first" in jaxreset(
        "eval", *nowhere, code=2
    )


def finished(folder, *overrides):
    """A run folder with a checkpoint of step 3, all trained parameters changed by a thousandth."""
    config = load_config(QUICKSTART, [*TINY.split(), f"run.dir={folder}", *overrides])
    experiment = Experiment(config)
    params, frozen = trained(experiment.adapted(experiment.start_policy).params)
    state = init_state(params, make_optimizer(config.optimizer.make(config.train.steps)))
    learnt = jax.tree.map(lambda x: x * 1.001 + 1e-5, state.params)
    run = RunFolder(config)
    run.check_writable()
    run.claim()
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    checkpoints.save(state._replace(params=learnt), TrainProgress(step=3, version=5))
    checkpoints.close()
    return nnx.merge_state(learnt, frozen)


def bytes_of(arrays):
    return sum(x.nbytes for x in jax.tree.leaves(arrays))


def test_a_run_is_evaluated_and_exported_without_its_optimizer(
    jaxreset, model, tmp_path, monkeypatch
):
    """Of what training keeps beside parameters, no more is ever there than the largest of these."""
    learnt = finished(tmp_path / "run", f"model.path={model}")
    gc.collect()
    before, peaks = jax.live_arrays(), []
    size, largest = bytes_of(learnt), max(map(bytes_of, jax.tree.leaves(learnt)))
    load = ocp.load_checkpointables

    def look():
        others = {id(x) for x in before}
        peaks.append(bytes_of([x for x in jax.live_arrays() if id(x) not in others]))

    def spy(*args):
        loaded = load(*args)
        look()
        return loaded

    def evaluations(experiment, policy, step, see):
        look()
        assert (step, policy.version) == (3, 5)
        assert_same_params(policy.params, learnt)
        return {f"eval/{name}": 0.0 for name in ("accuracy", "accuracy_low", "accuracy_high", "cut",
                                                 "greedy_accuracy", "problems", "answered",
                                                 "response_tokens")}  # fmt: skip

    monkeypatch.setattr(ocp, "load_checkpointables", spy)
    monkeypatch.setattr(Experiment, "evaluate", evaluations)
    jaxreset("eval", f"run.dir={tmp_path}/run")
    jaxreset("export", f"run.dir={tmp_path}/run", output=[f"{tmp_path}/out"])
    assert len(peaks) > 4
    assert size <= max(peaks) <= size + largest + 10_000  # and what the sampler knows of tokens
    assert_same_params(load_policy(tmp_path / "out").params, learnt)


@pytest.mark.parametrize("lora", [(), ("model.lora.rank=4",)], ids=["whole", "lora"])
def test_an_export_that_rounds_says_what_is_lost(jaxreset, model, tmp_path, caplog, lora):
    run = f"run.dir={tmp_path}/run", f"model.path={model}", "model.dtype=bfloat16", *lora
    learnt = finished(tmp_path / "run", *run[1:])
    with caplog.at_level(logging.WARNING):
        jaxreset("export", *run, output=[f"{tmp_path}/narrow"])
    [share] = re.findall(r"rounding to bfloat16 is an error of (\d+)% of the size", caplog.text)
    assert 5 < int(share) < 120
    assert "export --dtype float32 keeps all of it" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        jaxreset("export", *run, output=[f"{tmp_path}/wide", "--dtype", "float32"])
    assert caplog.text == ""
    wide = load_policy(tmp_path / "wide")
    if lora:
        assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    else:
        assert_same_params(wide.params, learnt)
    assert load_policy(tmp_path / "narrow").params["embed"][...].dtype == np.float32
    assert "--dtype int8: expected one of float32, bfloat16, float16" in jaxreset(
        "export", *run, output=[f"{tmp_path}/no", "--dtype", "int8"], code=2
    )
    if lora:
        adapters = [f"{tmp_path}/no", "--adapters", "--dtype", "float32"]
        assert "adapters are written as they are" in jaxreset(
            "export", *run, output=adapters, code=2
        )


def test_export_takes_the_flags_of_several_processes(jaxreset, tmp_path):
    output = [f"{tmp_path}/out", "--process", "0"]
    assert "--coordinator, --processes missing" in jaxreset("export", output=output, code=2)


def test_a_full_disk_is_one_message(jaxreset, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    shown = jaxreset("export", f"run.dir={tmp_path}/none", output=[f"{tmp_path}/out"], code=1)
    assert shown.startswith(f"error: the export can't be written to {tmp_path}/out: No space left")
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())

    def full(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{tmp_path}/run/metrics.jsonl")

    monkeypatch.setattr(loop, "Experiment", full)
    shown = jaxreset("train", f"run.dir={tmp_path}/run", code=1)
    assert (
        f"can't be written to {tmp_path}/run/metrics.jsonl: No space left on device (5.0 B" in shown
    )
    assert shown.count("\n") == 1


def test_half_a_file_is_not_left_on_a_full_disk(tmp_path, monkeypatch):
    config = load_config(QUICKSTART, [f"run.dir={tmp_path}"])
    folder = RunFolder(config)
    folder.claim()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space"):
        folder.claim()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert load_config(tmp_path / "config.yaml", []) == config


def test_export_does_not_overwrite(jaxreset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    shown = jaxreset("export", f"run.dir={tmp_path}/none", output=[f"{tmp_path}/mine"], code=2)
    assert (
        shown == f"error: {tmp_path}/mine exists and is not an empty folder; choose another name\n"
    )
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
