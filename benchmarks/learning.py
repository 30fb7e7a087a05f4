"""What runs learned: a table of held-out accuracy before and after, and their curves in one picture.

    python benchmarks/learning.py runs/grpo runs/srpo runs/ladder --curve FILE.svg

The runs are those of `jaxreset train` with the same problems, sizes and machine, each named by its folder,
up to its last evaluation. The table is printed, in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import measured_on
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxreset.reporting.curve import mark_accuracy
from jaxreset.run.folder import read_metrics

PACKAGES = ("jax", "flax", "optax", "transformers")

Run = tuple[str, list[dict[str, Any]], list[dict[str, Any]]]  # name, metrics, its evaluations


def read_run(folder: Path) -> Run:
    """A run up to its last evaluation; raises `ValueError` where there are fewer than two."""
    history = read_metrics(folder / "metrics.jsonl")
    evaluated = [line for line in history if line.get("eval/accuracy") is not None]
    if len(evaluated) < 2:
        raise ValueError(f"{folder}: it was evaluated {len(evaluated)} times; expected 2 or more")
    return (
        folder.name,
        [line for line in history if line["step"] <= evaluated[-1]["step"]],
        evaluated,
    )


def table(runs: list[Run]) -> str:
    """A row for each run, in Markdown, and what this is run on."""
    lines = [
        "| run | steps | minutes | tokens | sampled accuracy (95%) | greedy accuracy | gained |",
        "|---|--:|--:|--:|---|---|--:|",
    ]
    for name, history, (first, *_, last) in runs:
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
    problems = runs[0][2][-1]["eval/problems"]
    lines += ["", f"{problems:.0f} held-out problems; {measured_on(PACKAGES)}."]
    return "\n".join(lines) + "\n"


def _interval(line: dict[str, Any]) -> str:
    low, high = line["eval/accuracy_low"], line["eval/accuracy_high"]
    return f"{line['eval/accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def draw(runs: list[Run], path: Path) -> None:
    """Training reward of each step, thin, and held-out accuracy with its interval."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (name, history, evaluated) in enumerate(runs):
        color = f"C{number}"
        trained = [line for line in history if line.get("reward/mean") is not None]
        steps = [line["step"] for line in trained]
        rewards = [line["reward/mean"] for line in trained]
        axis.plot(steps, rewards, color=color, linewidth=1, alpha=0.5)
        # A little apart, so that no interval hides another.
        places = [line["step"] + 0.15 * number for line in evaluated]
        mark_accuracy(axis, places, evaluated, color=color, linestyle="none", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("share solved")
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
    title = "held out, sampled; thin: training reward"
    axis.legend(loc="upper left", fontsize="small", title=title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--curve", type=Path, help="write the picture there, as SVG or PNG")
    args = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in args.runs]
    except ValueError as error:
        parser.error(str(error))
    print(table(runs))
    if args.curve:
        draw(runs, args.curve)


if __name__ == "__main__":
    main()
