"""The command `sft`: a warm start alone, what it leaves in its folder, and what goes on from there."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from model_helpers import assert_same_params, random_policy
from test_real_input import byte_pairs, made_up, ours

from jaxreset import cli, open_run
from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError
from jaxreset.models.adapters import trained
from jaxreset.models.block import DecoderConfig
from jaxreset.models.policy import load_policy
from jaxreset.run import experiment as experiments
from jaxreset.run.loop import train
from jaxreset.tasks.base import Scores
from jaxreset.tasks.chain import ChainTask

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = """
    objective=grpo sampling.max_prompt_tokens=18 sampling.max_response_tokens=48
    sampling.max_step_tokens=12 warm_start.steps=4 warm_start.batch=4 warm_start.learning_rate=1e-2
    train.steps=2 train.prompts_per_step=2 train.microbatch_tokens=300 train.min_signal_groups=0
    data.eval_size=4 eval.batch=4 eval.every_steps=null checkpoint.every_steps=1
"""


@pytest.fixture(scope="module", autouse=True)
def scripted(compiled_in_haste):
    """Rewards that give groups a gradient, on one device."""
    one = jax.devices()[:1]

    def even_length(task, items):
        return Scores(np.array([len(text) % 2 == 0 for _, text in items], np.float64), ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(ChainTask, "score", even_length)
        yield


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A folder with a tiny policy for the chain task."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    sizes = DecoderConfig(
        vocab=len(tokenizer), layers=1, width=32, heads=2, kv_heads=2, head_dim=16, mlp=48
    )
    random_policy(sizes, tokenizer).export(folder)
    return folder


@pytest.fixture
def jaxreset(monkeypatch, capsys):
    """Runs a command; returns what it prints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(command, *arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["jaxreset", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert ended.value.code == code, shown.err
        return shown.out + shown.err

    return run


def lines_of(file):
    return [json.loads(line) for line in file.open()]


WAYS = {
    "all parameters": [],
    "adapters kept near": ["model.lora.rank=4", "loss.kl=0.1"],
    "fresh, with adapters kept near": [
        "model.path=null", "model.fresh.layers=1", "model.fresh.width=32", "model.fresh.mlp=48",
        "model.lora.rank=4", "loss.kl=0.1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_train_goes_on_from_a_warm_start_as_if_it_had_made_it(jaxreset, model, tmp_path, way):
    settings = [*TINY.split(), f"model.path={model}", *WAYS[way]]
    config = CONFIGS / "quickstart.yaml"
    folder = tmp_path / "sft"
    shown = jaxreset("sft", config, *settings, f"run.dir={folder}")
    assert "warm start 4/4  loss" in shown
    assert "before warm start" in shown
    supervised, metrics = lines_of(folder / "warm_start.jsonl"), lines_of(folder / "metrics.jsonl")
    assert supervised[0]["step"] == 0
    assert supervised[0]["eval/problems"] == metrics[0]["eval/problems"] == 4
    assert [line["step"] for line in supervised[1:]] == ([4] if "fresh" in way else [1, 2, 3, 4])
    assert [line["step"] for line in metrics] == [0]
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["0"]
    assert (folder / "report.html").is_file()
    learnt = open_run(folder).policy()

    if way == "all parameters":  # what finished runs are good for
        again = jaxreset("sft", config, *settings, f"run.dir={folder}")  # which only reads it
        assert "warm start 4/4" not in again
        assert lines_of(folder / "metrics.jsonl") == metrics
        shown = jaxreset("eval", config, *settings, f"run.dir={folder}", "--json")
        assert json.loads(shown.splitlines()[-1])["eval/accuracy"] == metrics[0]["eval/accuracy"]
        jaxreset("export", config, tmp_path / "out", *settings, f"run.dir={folder}")
        assert_same_params(load_policy(tmp_path / "out").params, learnt.params)
    if way == "adapters kept near":
        assert_same_params(trained(learnt.params)[1], load_policy(model).params)

    jaxreset("train", config, *settings, f"run.dir={folder}")
    jaxreset("train", config, *settings, f"run.dir={tmp_path / 'whole'}")
    whole = open_run(tmp_path / "whole")
    assert open_run(folder).steps[-1] == whole.steps[-1] == 2
    assert_same_params(open_run(folder).policy().params, whole.policy().params)
    assert lines_of(tmp_path / "whole" / "warm_start.jsonl") == supervised[1:]
    assert not (folder / "changes.jsonl").exists()


def test_a_killed_warm_start_starts_anew(jaxreset, model, tmp_path, monkeypatch):
    settings = [*TINY.split(), f"model.path={model}", f"run.dir={tmp_path}"]
    learn = experiments.warm_start

    def killed(*args, on_step, **kwargs):
        def note(record):
            on_step(record)
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

        learn(*args, on_step=note, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "warm_start", killed)
        jaxreset("sft", CONFIGS / "quickstart.yaml", *settings, code=130)
    seen = lines_of(tmp_path / "warm_start.jsonl")
    assert [line["step"] for line in seen] == [0, 1, 2]
    assert not list((tmp_path / "checkpoints").glob("*"))
    jaxreset("sft", CONFIGS / "quickstart.yaml", *settings)
    lines = lines_of(tmp_path / "warm_start.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[:3] == seen


def test_there_is_nothing_to_do_without_a_warm_start(jaxreset, tmp_path):
    shown = jaxreset(
        "sft", CONFIGS / "quickstart.yaml", "warm_start.steps=0", f"run.dir={tmp_path}/run", code=2
    )
    assert "warm_start.steps=0: there are no supervised steps to take; name how many" in shown
    assert not list(tmp_path.iterdir())


MATH = """
    sampling.max_prompt_tokens=800 sampling.max_response_tokens=120 sampling.max_step_tokens=16
    sampling.max_steps=6 objective=grpo train.prompts_per_step=4 task.processes=1 data.eval_size=4
    eval.batch=4 warm_start.steps=6 warm_start.batch=4 warm_start.learning_rate=1e-2
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with a chat template, word problems with solutions, and chats."""
    folder, records = tmp_path_factory.mktemp("ours"), made_up(24)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    ours(folder / "model", byte_pairs([r["question"] + r["answer"] for r in records]))
    chats = [
        {
            "messages": [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": r["answer"].replace("####", "So")},
            ]
        }
        for r in records
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chats))
    return folder


def math_config(files, folder, *overrides):
    paths = f"model.path={files}/model", f"data.path={files}/train.jsonl", f"run.dir={folder}"
    return load_config(CONFIGS / "gsm8k.yaml", [*MATH.split(), *paths, *overrides])


@pytest.mark.parametrize("path", ["null", "chats.jsonl"])
def test_a_checkpoint_learns_solutions_and_chats(files, tmp_path, path):
    where = path if path == "null" else files / path
    config = math_config(files, tmp_path, f"warm_start.path={where}")
    train(config, only_warm_start=True)
    losses = [line["loss"] for line in lines_of(tmp_path / "warm_start.jsonl")[1:]]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    assert open_run(tmp_path).config.warm_start == config.warm_start
    [first] = lines_of(tmp_path / "metrics.jsonl")
    assert first["eval/verifier_errors"] == 0


def test_nothing_to_learn_from_is_refused_before_anything_is_written(files, tmp_path):
    chats = lines_of(files / "chats.jsonl")
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"problem": "1+1", "answer": "2"}) + "\n" for _ in range(9)))
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(chats[0]) + "\n" + json.dumps({"messages": []}) + "\n")
    for overrides, words in (
        (
            (f"data.path={bare}",),
            "none of 8 problems has a solution to learn from; name a file of de",
        ),
        ((f"warm_start.path={cut}",), f"warm_start.path: {cut}, line 2: field 'messages' is"),
        (
            (f"warm_start.path={tmp_path}/none.jsonl",),
            "warm_start.path: .*none.jsonl: no such file",
        ),
        (
            (f"warm_start.path={files}/chats.jsonl", "sampling.max_response_tokens=16"),
            "warm_start.path: none of 24 demonstrations fits sampling.max_prompt_tokens=800 and",
        ),
    ):
        config = math_config(files, tmp_path / "run", *overrides)
        with pytest.raises(ConfigError, match=words):
            train(config)
        assert not (tmp_path / "run" / "config.yaml").exists()
