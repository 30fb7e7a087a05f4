"""What a run refuses, through the command line: one message, exit code 2, nothing compiled before.

Each message names the field or file, the value found, and what to do about it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest
from model_helpers import byte_tokenizer, edit_config, random_policy, word_tokenizer
from transformers import AutoTokenizer

from jaxreset import cli
from jaxreset.config_file import dump_config, load_config
from jaxreset.models.block import DecoderConfig
from jaxreset.models.policy import load_policy
from jaxreset.planning.footprint import here
from jaxreset.run.compiles import compiles
from jaxreset.tasks.chain import TOKENIZER

CONFIGS = Path(__file__).parent.parent / "configs"
PROBLEM = {"question": "What is ten and ten and ten?", "answer": "10+10+10=30\n#### 30"}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """A folder of inputs, most of them broken; the overrides below name them by relative paths."""
    folder = tmp_path_factory.mktemp("materials")
    good = json.dumps(PROBLEM)
    for name, text in {
        "quickstart.yaml": (CONFIGS / "quickstart.yaml").read_text(),
        "gsm8k.yaml": (CONFIGS / "gsm8k.yaml").read_text(),
        "broken.yaml": "train: {steps: 3",
        "list.yaml": "- train\n- eval\n",
        "good.jsonl": f"{good}\n" * 3,
        "one.jsonl": f"{good}\n",
        "malformed.jsonl": f"{good}\n{good}\n{good[:-5]}\n",
        "unanswered.jsonl": f'{good}\n{{"question": "What is ten?"}}\n',
        "unsolved.jsonl": f'{good}\n{{"question": "What is ten?", "answer": "I give up"}}\n',
        "answers.jsonl": '{"problem": "What is ten?", "answer": "10"}\n' * 3,
        "demos.jsonl": '{"prompt": "ten", "completion": "10"}\n{"prompt": "ten", "completion": 3.5e9999}\n',
        "listed.jsonl": "[1, 2]\n",
        "empty.jsonl": "\n",
        "choices.jsonl": json.dumps({"question": "?", "options": ["red", "blue"], "answer": "C"}),
        "problems.csv": "question,answer\n",
        "fake.parquet": "no parquet",
        "long.jsonl": f"{good}\n" + json.dumps(PROBLEM | {"question": "ten " * 900}) + "\n",
        "bare.txt": "Solve it.",
        "a-file": "",
        "config.yaml": "objective: grpo",
    }.items():
        (folder / name).write_text(text)

    tokenizer = byte_tokenizer()
    sizes = DecoderConfig(
        vocab=320, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, mlp=16,
        qkv_bias=True,
    )  # fmt: skip
    policy = random_policy(sizes, tokenizer)
    for name in ("model", "mute", "small", "qwen4"):
        policy.export(folder / name)
    (folder / "mute" / "tokenizer.json").unlink()
    edit_config(folder / "qwen4", model_type="qwen4", architectures=["Qwen4ForCausalLM"])
    word_tokenizer(330).save_pretrained(folder / "small")
    random_policy(sizes, word_tokenizer(60)).export(folder / "words")
    sums = dataclasses.replace(sizes, qkv_bias=False, qk_norm=True)
    random_policy(sums, AutoTokenizer.from_pretrained(TOKENIZER)).export(folder / "sums")
    # Placing parameters and counting an optimizer's state compile one-line programs: here, not below.
    for name in ("model", "sums"):
        load_policy(folder / name)
    here(load_config(CONFIGS / "quickstart.yaml"))

    (folder / "taken" / "checkpoints" / "0").mkdir(parents=True)
    quickstart = load_config(CONFIGS / "quickstart.yaml", ["seed=5"])
    (folder / "taken" / "config.yaml").write_text(dump_config(quickstart))
    return folder


@pytest.fixture
def refused(materials, monkeypatch, capsys):
    """Runs a command line in `materials` on one device; returns the message that it ends with."""
    one = jax.devices()[:1]
    monkeypatch.chdir(materials)
    monkeypatch.setattr(jax, "devices", lambda *_: one)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxreset", *arguments])
        before = compiles()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert compiles() == before
        output = capsys.readouterr()
        assert ended.value.code == 2, output.err
        assert output.out == ""
        assert output.err.startswith("error: ")
        return output.err

    return run


def chain(overrides, *words):
    return pytest.param(f"quickstart.yaml {overrides}", words, id=overrides)


def math(overrides, *words):
    given = {o.partition("=")[0] for o in overrides.split()}
    paths = [
        f"{k}={v}"
        for k, v in (("model.path", "./model"), ("data.path", "good.jsonl"))
        if k not in given
    ]
    return pytest.param(f"gsm8k.yaml {' '.join(paths)} {overrides}", words, id=overrides)


REFUSED = [
    # the config file
    pytest.param("missing.yaml", ("config missing.yaml", "no such file"), id="missing.yaml"),
    pytest.param("broken.yaml", ("config broken.yaml is not YAML", "line 1"), id="broken.yaml"),
    pytest.param("list.yaml", ("list.yaml", "expected sections", "got list"), id="list.yaml"),
    # its keys
    chain("trian.steps=3", "trian: unknown key", "'train'"),
    chain("train.step=3", "train.step: unknown key", "did you mean 'steps'?"),
    chain(
        "reset.localizer.n=3", "reset.localizer.n: unknown key", "known here: mode, temperature, "
    ),
    chain("train.steps", "override 'train.steps'", "expected key=value, such as train.steps=10"),
    chain("seed.steps=1", "seed", "valid integer", "got {'steps': 1}"),
    chain("objective.name=grpo", "objective is a value, not a section"),
    chain("train.steps=[1", "override 'train.steps=[1'", "not YAML"),
    # values
    chain("train.steps=many", "train.steps", "valid integer", "got 'many'"),
    chain("model.lora.rank=0", "model.lora.rank", "greater than 0", "got 0"),
    chain("model.lora.targets=[q,kv]", "model.lora.targets.1", "'q', 'k', 'v', 'o'", "got 'kv'"),
    chain("model.lora.targets=[]", "model.lora.targets", "at least 1 item", "got []"),
    chain("train.steps=-1", "train.steps", "greater than or equal to 0", "got -1"),
    chain("train.prompts_per_step=0", "train.prompts_per_step", "greater than 0", "got 0"),
    chain("optimizer.learning_rate=0", "optimizer.learning_rate", "greater than 0", "got 0"),
    chain("optimizer.learning_rate=-1e-4", "optimizer.learning_rate", "got -0.0001"),
    chain("optimizer.learning_rate=nan", "optimizer.learning_rate", "got nan"),
    chain("optimizer.learning_rate=inf", "optimizer.learning_rate", "finite", "got inf"),
    chain("sampling.temperature=0", "sampling.temperature", "greater than 0", "got 0"),
    chain("sampling.top_p=1.5", "sampling.top_p", "less than or equal to 1", "got 1.5"),
    chain("objective=ppo", "no objective is called 'ppo'", "There are grpo, rrpo, srpo, ladder"),
    chain("reset.layout=4*4", "reset.layout=4*4", "expected B+K", "such as 4+4"),
    chain("reset.layout=4+1", "reset.layout=4+1", "a group needs at least 2 rollouts"),
    chain("objective=grpo reset.layout=0+1", "reset.layout=0+1", "at least 2 rollouts"),
    chain("loss.clip=-0.2", "error: loss.clip: Input should be", "greater than 0", "got -0.2"),
    chain("seed=4294967296", "seed", "less than 4294967296", "got 4294967296"),
    chain("task.min_terms=9 task.max_terms=4", "min_terms 9 must not exceed max_terms 4"),
    chain("task.max_terms=27", "task.max_terms", "less than or equal to 26", "got 27"),
    chain("task.strict=often", "task.strict", "valid boolean", "got 'often'"),
    chain("task.misread=-1", "task.misread", "greater than or equal to 0", "got -1"),
    chain("task.misread=5 task.modulus=5", "task: misread 5 must be under modulus 5"),
    chain(
        "task.max_terms=26",
        "task.max_terms=26: 26 lines and the answer are 27 steps, but sampling.max_steps=20",
        "sampling.max_prompt_tokens=53 and sampling.max_response_tokens=142)",
    ),
    chain("model.fresh.width=128 model.fresh.heads=3", "model.fresh: width 128", "heads 3"),
    chain(
        "sampling.max_step_tokens=65 sampling.max_response_tokens=64",
        "sampling: max_step_tokens 65 exceeds max_response_tokens 64",
    ),
    # combinations
    chain(
        "train.prompts_per_step=32 train.minibatch_prompts=5",
        "train.prompts_per_step 32 is not divisible by train.minibatch_prompts 5",
    ),
    chain(
        "train.prompts_per_step=32 mesh.data=3",
        "train.prompts_per_step 32 is not divisible by mesh.data 3 × mesh.fsdp 1 = 3 shards",
    ),
    chain("train.epochs=2", "train.epochs=2 needs loss.clip, such as 0.2"),
    chain("loss.ratio_to=trainer", "loss.ratio_to=trainer needs loss.clip"),
    chain("mesh.data=4 eval.batch=30", "eval.batch 30 is not divisible by mesh.data 4"),
    chain(
        "mesh.tensor=3",
        "mesh.data 1 × mesh.fsdp 1 × mesh.tensor 3 = 3, but there are 1 devices",
        "change one",
    ),
    chain("objective=grpo reset.rule=random", "objective=grpo has no resets", "leave them out"),
    chain("reset.rungs=2", "reset.rungs=2", "use objective=ladder"),
    chain("objective=ladder method=paper", "method=paper", "use method=ours"),
    chain(
        "objective=ladder reset.layout=2x4",
        "layout=2x4",
        "use method=ours and a layout such as 4+4",
    ),
    chain("method=paper reset.when=all_failed", "reset.when=all_failed", "leave both out"),
    chain("loss.dual_clip=3", "loss.dual_clip=3", "needs loss.clip"),
    chain(
        "loss.clip=0.2 loss.importance_cap=2",
        "loss.importance_cap=2.0 with loss.clip=0.2 and loss.ratio_to=sampler",
        "set loss.ratio_to=trainer, or leave one of the two out",
    ),
    chain(
        "objective=grpo method=paper loss.importance_cap=2",
        "loss.importance_cap=2.0 with loss.clip=0.2 and loss.ratio_to=sampler",
    ),
    math("reset.rule=oracle", "reset.rule=oracle", "use chain, or another rule"),
    math(
        "warm_start.steps=5 data.path=answers.jsonl",
        "warm_start.steps=5: none of 2 problems has a solution",
        "name a file of demonstrations in warm_start.path, or set it to 0",
    ),
    math(
        "warm_start.steps=5 warm_start.path=none.jsonl", "warm_start.path: none.jsonl: no such file"
    ),
    math(
        "warm_start.steps=5 warm_start.path=demos.jsonl",
        "warm_start.path: demos.jsonl, line 2",
        "field 'completion' is",
    ),
    math(
        "warm_start.steps=5 sampling.max_response_tokens=3 sampling.max_step_tokens=3",
        "the problems' solutions: none of 2 demonstrations fits",
        "raise the limits",
    ),
    math(
        "warm_start.steps=5 warm_start.optimizer=muon",
        "warm_start.optimizer=muon with model.path",
        "or use adamw",
    ),
    math("data.path=null", "data.path is null", "name a file"),
    math("model.path=null", "model.path is null", "name a folder"),
    # prompts and their limit
    chain(
        "model.path=./sums sampling.max_prompt_tokens=3",
        "100 of 100 prompts exceed sampling.max_prompt_tokens=3; the first is train:0 with",
        "raise the limit\n",
    ),
    math(
        "data.path=long.jsonl data.overlong=refuse",
        "1 of 1 prompts exceed sampling.max_prompt_tokens=384",
        "long:2",
        "data.overlong=drop",
    ),
    math(
        "sampling.max_prompt_tokens=9",
        "all 2 prompts",
        "max_prompt_tokens=9 (the shortest has 111",
        "raise the limit",
    ),
    math("task.solve_prompt=none.txt", "solve_prompt: no such file: none.txt"),
    math("task.solve_prompt=bare.txt", "solve_prompt: bare.txt lacks {problem}", "put each"),
    # problems
    math("data.path=none.jsonl", "data.path", "none.jsonl", "no such file"),
    math("data.eval_path=none.jsonl", "data.eval_path", "none.jsonl", "no such file"),
    math("data.path=./model", "model", "is a folder", "expected a file"),
    math("data.path=problems.csv", "problems.csv", "'.csv'", "expected one of .jsonl, .parquet"),
    math("data.path=malformed.jsonl", "malformed.jsonl, line 3", "malformed JSON", "one object"),
    math("data.path=listed.jsonl", "listed.jsonl, line 1", "[1, 2]", "expected a JSON object"),
    math("data.path=unanswered.jsonl", "unanswered.jsonl, line 2", "missing field 'answer'"),
    math("data.path=unsolved.jsonl", "unsolved.jsonl, line 2", "I give up", "'#### 72'"),
    math(
        "task.name=choice data.path=choices.jsonl",
        "choices.jsonl, line 1: field 'answer' is 'C'; expected one of A, B, or an option's text",
    ),
    math("task.name=boolean", "good.jsonl, line 1: field 'answer' is", "expected true or false"),
    math("task.name=choice model.path=null", "task.name=choice needs a pretrained policy"),
    math("task.name=boolean data.path=null", "task.name=boolean needs problems: name a file"),
    math("data.path=empty.jsonl", "empty.jsonl", "expected at least one problem"),
    math(
        "task.name=code", "data.path: good.jsonl, line 1: missing field 'tests'", "{input, output}"
    ),
    math("data.path=one.jsonl", "one.jsonl holds 1 problem", "name data.eval_path"),
    math("data.path=./[/b].jsonl", "data.path: ./[/b].jsonl", "no such file"),
    math("data.path=fake.parquet", "fake.parquet", "not a Parquet file"),
    math("data.path=some-data-set", "some-data-set", "no such file", "jaxreset[datasets]"),
    # models
    math("model.path=./none", "model './none'", "no such folder"),
    math("model.path=./mute", "mute holds no tokenizer", "copy the model's there"),
    math("model.path=./small", "330 ids", "vocabulary 320", "another model's tokenizer?"),
    math("model.path=./qwen4", "qwen4/config.json", "'qwen4' is not supported", "Qwen2ForCausalLM"),
    math("model.path=./words", "delimiter", "'\\n\\n'"),
    # the run folder
    chain("run.dir=a-file/run", "run.dir", "a-file/run can't be written", "name another folder"),
    chain("run.dir=gs://bucket/run", "run: dir gs://bucket/run", "mount the bucket"),
    chain("run.dir=.", "run.dir", "a config.yaml that isn't a run's", "name another folder"),
    chain("run.dir=taken", "run.dir", "seed: 5 there, 0 asked", "name another run.dir"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_a_run_refuses(refused, arguments, words):
    # Most share one run folder: a config that was refused doesn't claim it.
    message = refused("train", *arguments.split())
    print(message)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "command", [["eval", "quickstart.yaml"], ["export", "quickstart.yaml", "exported"]]
)
def test_eval_and_export_refuse_another_policy_than_the_run_has(refused, command):
    message = refused(*command, "run.dir=taken", "model.fresh.layers=1")
    assert "taken holds another config's run (model.fresh.layers: 3 there, 1 asked)" in message


def test_a_refused_run_leaves_no_config_behind(refused, tmp_path):
    refused(
        "train", "gsm8k.yaml", "model.path=./none", "data.path=good.jsonl", f"run.dir={tmp_path}"
    )
    assert not (tmp_path / "config.yaml").exists()
