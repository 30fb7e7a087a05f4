"""What the benchmarks share: the model's sizes, google-tunix in a process of its own, taking turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from jaxreset.models import huggingface
from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import config_json
from jaxreset.models.decoder import Decoder
from jaxreset.models.policy import Policy
from jaxreset.tasks.chain import TOKENIZER

TUNIX = "google-tunix==0.1.7"
HERE = Path(__file__).parent
SIZES = {"layers": 4, "width": 256, "heads": 8, "kv_heads": 4, "mlp": 768, "vocab": 512}
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

Contender = Callable[[int], float]  # a seed -> seconds


def new_policy(sizes: dict[str, int] = SIZES) -> Policy:
    """A policy with random weights and no tokenizer."""
    head_dim = sizes["width"] // sizes["heads"]
    config = DecoderConfig(**sizes, head_dim=head_dim, qkv_bias=True, rope_theta=1e6)
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    tokenizer: Any = None
    return Policy(graph, params, config, tokenizer, eos_ids=())


def write_checkpoint(folder: Path, config: DecoderConfig, *, shards: int) -> int:
    """A policy's folder with normal numbers in files of about equal size; returns how many numbers."""
    rng = np.random.default_rng(0)
    shapes = {
        name: tensor.shape
        for tensor in huggingface.tensor_table(config)
        for name in tensor.names(config.layers)
    }
    total = sum(map(np.prod, shapes.values()))
    placed: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    written = 0
    for name, shape in shapes.items():
        numbers = rng.standard_normal(shape, np.float32)
        shard[name] = (numbers * np.float32(0.02)).astype(jnp.bfloat16)
        done = sum(array.size for array in shard.values()) + written
        number = len(set(placed.values())) + 1
        if done * shards >= number * total:
            file = f"model-{number:05}-of-{shards:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            placed |= dict.fromkeys(shard, file)
            shard, written = {}, done
    huggingface.write_json(folder / huggingface.INDEX, {"weight_map": placed})
    huggingface.write_json(folder / huggingface.CONFIG, config_json(config))
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return int(total)


class Tunix:
    """google-tunix's sampler and its GRPO step, in a process and a virtual environment of its own."""

    def __init__(self) -> None:
        folder = HERE / ".tunix"
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", TUNIX], check=True)
        self._process = subprocess.Popen(
            [python, HERE / "tunix_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            text=True,
        )
        self.versions = self._answer()

    def draws(self, prompts: list[np.ndarray], new: int) -> Contender:
        """Draws `new` tokens after each prompt."""
        return self._contender("draw", prompts=_lists(prompts), new=new)

    def updates(self, prompts: list[np.ndarray], completions: list[np.ndarray]) -> Contender:
        """A GRPO train step on these rows."""
        return self._contender("update", prompts=_lists(prompts), completions=_lists(completions))

    def _contender(self, kind: str, **case: Any) -> Contender:
        def run(seed: int) -> float:
            asked = {"kind": kind, "seed": seed, "sizes": SIZES} | case
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            return self._answer()

        return run

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the tunix worker ended; its error is above")
        return json.loads(line)


def _lists(rows: list[np.ndarray]) -> list[list[int]]:
    return [[int(token) for token in row] for row in rows]


def take_turns(contenders: dict[str, Contender], repeats: int) -> dict[str, float]:
    """Median seconds of each; a first round, which compiles, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            taken = run(turn)
            if turn:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run_parts(
    description: str,
    header: str,
    parts: Mapping[str, Callable[[int], dict[str, float]]],
    packages: tuple[str, ...],
) -> None:
    """A benchmark's command line: measures its parts, prints a table of ratios, writes the files."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, help="add the ratios to this file")
    parser.add_argument("--table", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    args = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # large memory pages, for every contender
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | LARGE_PAGES)
    ratios = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for part in args.only:
        ratios |= parts[part](args.repeats)
        jax.clear_caches()  # a process can hold only so many compiled programs
        if args.json:
            args.json.write_text(json.dumps(ratios, indent=1) + "\n")
    text = header + table(ratios, args.repeats, packages)
    print(text)
    if args.table:
        args.table.write_text(text)


def table(ratios: Mapping[str, float], repeats: int, packages: tuple[str, ...]) -> str:
    """The ratios in Markdown, with what they were measured on."""
    lines = [
        "| measured | value |",
        "|---|--:|",
        *(f"| `{name}` | {value:.2f} |" for name, value in ratios.items()),
        "",
        f"Medians of {repeats} interleaved turns; {measured_on(packages)}, {TUNIX}.",
    ]
    return "\n".join(lines) + "\n"


def measured_on(packages: tuple[str, ...]) -> str:
    """The machine, Python, and the versions of packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = platform.processor() or platform.machine()
    return f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
