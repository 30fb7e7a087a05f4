"""How long a run takes before its first rollout, and how many programs it compiles: cold, and once more.

    python benchmarks/start.py [--json FILE] [--table FILE] [--only grpo srpo ladder]

The shape is SmolLM2-135M's with random numbers: 30 layers, a vocabulary of 49,152, float32. Prompts have
128 tokens where there is room for 400, responses may have 256, steps 64, the localiser's questions 800 and
its answers 64; 8 prompts a step and 16 to evaluate. A start is a process of its own, as `jaxreset train` is
one: it imports, reads the checkpoint, compiles all that the run will need, and draws a token of each row.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402  (importing is measured too)
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from common import measured_on, write_checkpoint  # noqa: E402

from jaxreset.config_file import parse_config  # noqa: E402
from jaxreset.models.block import DecoderConfig  # noqa: E402
from jaxreset.run.compiles import compiles, kept_programs  # noqa: E402
from jaxreset.run.experiment import Experiment  # noqa: E402
from jaxreset.sampling.rounds import Stream  # noqa: E402

MODEL = DecoderConfig(
    vocab=49_152, layers=30, width=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, rope_theta=1e5
)
PROMPT = 128
OBJECTIVES = "grpo", "srpo", "ladder"
HEADER = """# The first rollout, measured

Written by `python benchmarks/start.py --table FILE`, which says what is started.

| run | first rollout, cold | programs | started again |
|---|--:|--:|--:|
"""


def settings(objective: str, model: Path, cache: Path) -> dict[str, Any]:
    """Of a run of the README's kind on a real model's shape."""
    values: dict[str, Any] = {
        "objective": objective,
        "task": {"name": "chain", "min_terms": 4, "max_terms": 6},
        "model": {"path": str(model)},
        "data": {"eval_size": 16, "chain_size": 64},
        "sampling": {
            "temperature": 0.7,
            "top_p": 0.95,
            "max_prompt_tokens": 400,
            "max_response_tokens": 256,
            "max_steps": 20,
            "max_step_tokens": 64,
        },
        "train": {"prompts_per_step": 8, "microbatch_tokens": 8192},
        "eval": {"batch": 16},
        "run": {"dir": str(model / "run"), "compile_cache": str(cache)},
    }
    if objective != "grpo":
        values["reset"] = {"localizer": {"max_tokens": 64, "max_question_tokens": 800}}
    return values


def start(objective: str, model: Path, cache: Path) -> dict[str, float]:
    """What this process takes until its first round is drawn."""
    config = parse_config(settings(objective, model, cache))
    with Experiment(config) as experiment, kept_programs(cache):
        ready = time.perf_counter()
        experiment.compile()
        compiled = time.perf_counter()
        count = config.train.prompts_per_step
        prompts = list(np.random.default_rng(0).integers(1, MODEL.vocab, (count, PROMPT)))
        rows = experiment.objective.base
        experiment.sampler.sample(
            experiment.policy, prompts, rows=rows, stream=Stream(0), max_new=1
        )
        drawn = time.perf_counter()
    return {
        "importing and reading": ready - BEGAN,
        "compiling": compiled - ready,
        "first rollout": drawn - BEGAN,
        "programs": compiles(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--table", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.once:
        objective, model, cache = args.once
        print(json.dumps(start(objective, Path(model), Path(cache))))
        return
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_checkpoint(model, MODEL, shards=1)
        for objective in args.only:
            command = [sys.executable, __file__, "--once", objective, str(model)]
            command.append(str(Path(folder) / objective))
            for name in (objective, f"{objective}, again"):
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                figures[name] = json.loads(done.stdout.splitlines()[-1])
                print(name, figures[name], flush=True)
    rows = []
    for objective in args.only:
        cold, again = figures[objective], figures[f"{objective}, again"]
        rows.append(
            f"| `{objective}` | {cold['first rollout']:.0f} s | {cold['programs']:.0f} "
            f"| {again['first rollout']:.0f} s |"
        )
    text = HEADER + "\n".join(rows) + f"\n\n{measured_on(('jax', 'flax'))}\n"
    print(text)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.table:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
