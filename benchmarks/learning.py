"""What runs learned: a table of held-out accuracy before and after, and their curves in one picture.

    python benchmarks/learning.py runs/grpo runs/srpo runs/ladder --curve FILE.svg

The runs are those of `jaxreset train` with the same problems, sizes and machine; each row is named by the
run's objective and its seed. The table is printed, in Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxreset.run.folder import read_metrics

PACKAGES = ("jax", "flax", "optax", "transformers")


def name_of(folder: Path) -> str:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return f"{config['objective']}, seed {config['seed']}"


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each run, in Markdown, and what they ran on."""
    lines = [
        "| run | steps | minutes | tokens | sampled accuracy (95%) | greedy accuracy | gained |",
        "|---|--:|--:|--:|---|---|--:|",
    ]
    for name, history in runs.items():
        first, *_, last = (line for line in history if "eval/accuracy" in line)
        history = [line for line in history if line["step"] <= last["step"]]
        seconds = sum(line.get("seconds", 0) for line in history)
        tokens = sum(line.get("tokens_sampled", 0) for line in history)
        cells = [
            f"`{name}`",
            f"{last['step']}",
            f"{seconds / 60:.0f}",
            f"{tokens:,.0f}",
            f"{_interval(first)} → **{_interval(last)}**",
            f"{first['eval/greedy_accuracy']:.1%} → {last['eval/greedy_accuracy']:.1%}",
            f"{100 * (last['eval/accuracy'] - first['eval/accuracy']):+.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines += [
        "",
        f"{last['eval/problems']:.0f} held-out problems; {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}.",
    ]
    return "\n".join(lines) + "\n"


def _interval(line: dict[str, Any]) -> str:
    low, high = line["eval/accuracy_low"], line["eval/accuracy_high"]
    return f"{line['eval/accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training reward of each step, thin, and held-out accuracy with its interval."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (name, history) in enumerate(runs.items()):
        color = f"C{number}"
        trained = [line for line in history if line.get("reward/mean") is not None]
        axis.plot(
            [line["step"] for line in trained],
            [line["reward/mean"] for line in trained],
            color=color,
            linewidth=1,
            alpha=0.5,
        )
        evaluated = [line for line in history if line.get("eval/accuracy") is not None]
        mean = [line["eval/accuracy"] for line in evaluated]
        below = [m - line["eval/accuracy_low"] for m, line in zip(mean, evaluated, strict=True)]
        above = [line["eval/accuracy_high"] - m for m, line in zip(mean, evaluated, strict=True)]
        # A little apart, so that no interval hides another.
        places = [line["step"] + 0.15 * number for line in evaluated]
        axis.errorbar(
            places, mean, yerr=[below, above], fmt="o", color=color, capsize=3, label=name
        )
    axis.set_xlabel("step")
    axis.set_ylabel("share solved")
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
    axis.legend(
        loc="upper left", fontsize="small", title="held out, sampled; thin: training reward"
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--curve", type=Path, help="write the picture there, as SVG or PNG")
    args = parser.parse_args()
    runs = {name_of(folder): read_metrics(folder / "metrics.jsonl") for folder in args.runs}
    print(table(runs))
    if args.curve:
        draw(runs, args.curve)


if __name__ == "__main__":
    main()
