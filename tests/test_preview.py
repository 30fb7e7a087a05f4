"""What `jaxreset prompt` shows is what a run asks, draws and judges."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from model_helpers import byte_tokenizer, random_policy
from rich.console import Console

from jaxreset.config_file import load_config
from jaxreset.models.block import DecoderConfig
from jaxreset.run.experiment import Experiment
from jaxreset.run.preview import preview

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = """
    model.fresh.layers=1 model.fresh.width=16 model.fresh.heads=2 model.fresh.kv_heads=1 model.fresh.mlp=16
    train.prompts_per_step=8 eval.batch=8 warm_start.steps=0 sampling.max_response_tokens=24
"""


def shown(config, **options):
    console = Console(width=200, record=True, file=io.StringIO())
    preview(config, console, **options)
    return console.export_text()


@pytest.mark.usefixtures("compiled_in_haste")
def test_the_response_is_the_first_that_the_run_draws(tmp_path):
    config = load_config(
        CONFIGS / "quickstart.yaml", [*SMALL.split(), "objective=grpo", f"run.dir={tmp_path}/none"]
    )
    text = shown(config, count=1)
    with Experiment(config) as experiment:
        prompts = experiment.prompts()
        collected = experiment.collect(prompts)
    tree = collected.trees[0]
    first = tree["groups"][0]["rows"][0]
    assert f"problem {tree['problem']}: {len(prompts[0].tokens)} tokens" in text
    assert tree["question"] in text
    tokens = re.search(r"response of the policy that training starts from: (\d+) tokens", text)
    assert int(tokens[1]) == first["tokens"]
    steps = re.findall(r"^ +\d+  (.*)$", text, re.MULTILINE)
    drawn = "".join(steps).replace("<eos>", "")
    assert drawn.startswith(repr(first["text"])[1:-1].strip().split("\\n")[0])
    assert f"reward {first['reward']:g}" in text


@pytest.mark.usefixtures("compiled_in_haste")
def test_a_chat_is_shown_with_its_special_tokens_and_its_borders(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    sizes = DecoderConfig(vocab=320, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, mlp=16)
    random_policy(sizes, tokenizer).export(tmp_path / "model")
    config = load_config(
        CONFIGS / "smollm2_sums.yaml",
        [
            f"model.path={tmp_path}/model", f"run.dir={tmp_path}/none", "objective=srpo",
            "sampling.max_prompt_tokens=400", "sampling.max_response_tokens=24", "task.stop=[zzz]",
            "reset.localizer.max_question_tokens=3000", "train.prompts_per_step=8", "eval.batch=8",
        ],
    )  # fmt: skip
    text = shown(config)
    assert text.count("asked in the chat template") == 2
    assert "<user>What is 7 + 8 + 6?" in text
    assert "<assistant>7 + 8 = 15" in text
    assert re.search(r"begins with  \d+ '", text)
    assert "a step ends with '\\n', the last step holds '\\\\boxed{'" in text
    assert text.count("reward 0 (failed), answer marker '\\\\boxed{' NOT found, the answer is") == 2
    assert "tokens of at most reset.localizer.max_question_tokens=3000" in text
    assert "Name the step in which the error originates" in text
    without = shown(config, sample=False, count=3)
    assert without.count("asked in the chat template") == 3
    assert "response of" not in without
