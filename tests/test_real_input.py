"""A checkpoint folder and word problems in GSM8K's format, from the config file to an exported folder.

The checkpoint is of Qwen2.5's architecture with random weights, made by us and, where PyTorch is at
hand, by transformers; its byte-level tokenizer is trained on the problems. Where the real GSM8K lies
beside the repository, the problems are its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from model_helpers import assert_same_params, random_policy
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError
from jaxreset.models.adapters import trained
from jaxreset.models.block import DecoderConfig
from jaxreset.models.policy import load_policy
from jaxreset.run.dry_run import describe
from jaxreset.run.finished import export_run
from jaxreset.run.loop import train
from jaxreset.tasks.base import Scores
from jaxreset.tasks.math import MathTask

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "gsm8k.yaml"
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
TINY = """
    sampling.max_prompt_tokens=800 sampling.max_response_tokens=48
    sampling.max_step_tokens=16 sampling.max_steps=6
    reset.localizer.max_tokens=8 reset.localizer.max_question_tokens=900
    train.steps=3 train.prompts_per_step=4 train.min_signal_groups=0
    optimizer.warmup_steps=0 optimizer.learning_rate=1e-3 task.processes=1
    data.eval_size=4 eval.batch=4 eval.every_steps=null checkpoint.every_steps=2
"""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made_up(count):
    """Word problems with their solutions, written as GSM8K writes them."""
    rng = np.random.default_rng(0)
    records = []
    for name in rng.choice(["Ann", "Ben", "Chloé", "Dov"], count):
        days, each = map(int, rng.integers(2, 40, 2))
        records.append(
            {
                "question": f"{name} reads {each} pages a day. How many pages in {days} days?",
                "answer": f"In {days} days {name} reads {days} x {each} = "
                f"<<{days}*{each}={days * each}>>{days * each} pages.\n#### {days * each}",
            }
        )
    return records


def byte_pairs(texts):
    """A tokenizer of a thousand byte pairs, with Qwen2.5's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def ours(folder, tokenizer):
    sizes = DecoderConfig(
        vocab=1024, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, mlp=128,
        qkv_bias=True, tie_embeddings=True,
    )  # fmt: skip
    random_policy(sizes, tokenizer).export(folder)


def theirs(folder, tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1024, num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=True,
            initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Input(NamedTuple):
    """What a user has: a checkpoint folder and a file of problems."""

    model: Path
    data: Path


def prepare(folder, lines, make):
    data = folder / "train.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    make(folder / "model", byte_pairs([json.loads(line)["question"] for line in lines]))
    return Input(folder / "model", data)


@pytest.fixture(scope="module")
def made_up_input(tmp_path_factory):
    """Our folder, forty problems of our own."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in made_up(40)]
    return prepare(tmp_path_factory.mktemp("ours"), lines, ours)


@pytest.fixture(scope="module")
def real_input(tmp_path_factory):
    """A folder of transformers', and forty problems of GSM8K, or our own where it isn't there."""
    lines = [json.dumps(record) + "\n" for record in made_up(40)]
    if GSM8K.is_file():
        with GSM8K.open(encoding="utf-8") as file:
            lines = [next(file) for _ in range(40)]
    return prepare(tmp_path_factory.mktemp("theirs"), lines, theirs)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The verifier runs, and rewards are then scripted, so that groups carry a gradient."""
    one, verify = jax.devices()[:1], MathTask.score

    def even_length(task, items):
        scores = verify(task, items)
        assert not scores.timeouts
        return Scores(np.array([len(text) % 2 == 0 for _, text in items], np.float64), ())

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(MathTask, "score", even_length)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def config_of(files, folder, objective, *overrides):
    paths = [f"model.path={files.model}", f"data.path={files.data}", f"run.dir={folder}"]
    overrides = [*paths, f"objective={objective}", *overrides]
    return load_config(CONFIG, [*TINY.split(), *overrides])


def run(files, folder, objective, *overrides):
    return train(config_of(files, folder, objective, *overrides))


@pytest.mark.parametrize("objective", ["grpo", "rrpo", "srpo", "ladder"])
def test_three_steps_of_each_objective(made_up_input, tmp_path, objective):
    check_run(run(made_up_input, tmp_path, objective), made_up_input)


def test_a_dry_run_shows_how_many_golds_cannot_be_graded(made_up_input, tmp_path):
    data = tmp_path / "some.jsonl"
    answers = ("#### proof", "#### not found", float("nan"))
    lines = [json.dumps({"question": "Why?", "answer": answer}) + "\n" for answer in answers]
    data.write_text(
        made_up_input.data.read_text(encoding="utf-8") + "".join(lines), encoding="utf-8"
    )
    console = Console(record=True, width=200)
    describe(config_of(Input(made_up_input.model, data), tmp_path / "run", "grpo"), console)
    shown = console.export_text()
    assert "36 to train on, 4 held out, 0 dropped" in shown
    assert "3 more left out" in shown


def test_a_run_on_a_mixture_goes_on_with_the_same_problems_elsewhere(made_up_input, tmp_path):
    """Bitwise as one that was never stopped; with another problem it is refused by the file's name."""
    lines = made_up_input.data.read_text(encoding="utf-8").splitlines(keepends=True)
    easy, hard = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"
    easy.write_text("".join(lines[:30]), encoding="utf-8")
    hard.write_text("".join(lines[30:]), encoding="utf-8")

    def config(folder, steps, hard):
        files = f"data.path={{easy: {easy}, hard: {{path: {hard}, weight: 3}}}}"
        return config_of(made_up_input, folder, "grpo", files, f"train.steps={steps}")

    whole = train(config(tmp_path / "whole", 3, hard))
    train(config(tmp_path / "run", 2, hard))
    moved = tmp_path / "moved.json"
    records = [json.loads(line) for line in hard.open(encoding="utf-8")]
    moved.write_text(json.dumps(records), encoding="utf-8")
    again = train(config(tmp_path / "run", 3, moved))
    assert_same_params(again.policy.params, whole.policy.params)
    for line, other in zip(again.history, whole.history, strict=True):
        kept = [key for key in line if not key.startswith(("time/", "seconds", "compiles"))]
        assert [line[key] for key in kept if key in other] == [other[k] for k in kept if k in other]
    trees = {
        tree["index"]: tree["problem"]
        for file in (again.folder / "rollouts").iterdir()
        for tree in map(json.loads, file.open(encoding="utf-8"))
    }
    sources = [name.partition(":")[0] for _, name in sorted(trees.items())]
    assert sources.count("hard") == 9
    assert sources.count("easy") == 3
    moved.write_text(json.dumps(records[1:]), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"other problems \(data.path.hard: 9 problems \(\w+, weight 3\) "
    ):
        train(config(tmp_path / "run", 4, moved))


def test_a_folder_of_transformers_trains_and_exports_to_it_again(real_input, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    windows = (
        "sampling.max_response_tokens=64"  # enough for two of them, and for batches that shrink
    )
    result = run(real_input, tmp_path / "run", "srpo", windows)
    check_run(result, real_input)
    exported = result.policy.export(tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    text = json.loads(real_input.data.read_text(encoding="utf-8").splitlines()[0])["question"]
    tokens = np.array([tokenizer.encode(text)])
    assert tokens.tolist() == [result.policy.tokenizer.encode(text)]
    with torch.no_grad():
        expected = model(torch.asarray(tokens)).logits.numpy()
    np.testing.assert_allclose(result.policy.logits(tokens), expected, rtol=0, atol=1e-4)
    assert tokenizer.chat_template == CHAT


def test_adapters_of_a_folder_are_exported_with_its_name(made_up_input, tmp_path):
    config = config_of(made_up_input, tmp_path / "run", "grpo", "model.lora.rank=2")
    result = train(config)
    base = load_policy(made_up_input.model)
    assert_same_params(trained(result.policy.params)[1], base.params)
    assert export_run(config, tmp_path / "adapters", adapters=True) == 3
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(made_up_input.model)
    assert settings["lora_alpha"] == settings["r"] == 2
    whole = config_of(made_up_input, tmp_path / "other", "grpo")
    with pytest.raises(ConfigError, match=r"model\.lora\.rank is null"):
        export_run(whole, tmp_path / "none", adapters=True)


def check_run(result, files):
    """It trained, without compiling anew, and left checkpoints, rollouts and a policy."""
    lines = result.history
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert len({line["compiles"] for line in lines}) == 1
    for line in lines[1:]:
        assert line["logp_gap"] < 1e-4
        assert line["grad_norm"] > 0
        assert line["optimizer_steps"] == 1
    assert sorted(f.name for f in (result.folder / "checkpoints").iterdir()) == ["2", "3"]
    problems = {json.loads(text)["question"] for text in files.data.open(encoding="utf-8")}
    trees = [
        json.loads(text)
        for file in sorted((result.folder / "rollouts").iterdir())
        for text in file.open(encoding="utf-8")
    ]
    assert len(trees) == 12
    assert {tree["question"] for tree in trees} <= problems
    before = load_policy(files.model)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, result.policy.params)
    assert all(jax.tree.leaves(changed))
