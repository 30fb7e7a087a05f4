"""The learning curve of a run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curve(history: Sequence[dict[str, Any]], path: Path, *, title: str = "") -> Path:
    """Draws training reward and held-out accuracy against the step and against tokens sampled.

    Args:
      history: metrics, one object a step, as in `metrics.jsonl`.
      path: of the PNG to write.

    Returns:
      `path`.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    tokens, total = {}, 0.0
    for line in history:
        total += line.get("tokens_sampled", 0)
        tokens[line["step"]] = total / 1e6
    # What wasn't finite is None.
    trained = [line for line in history if line.get("reward/mean") is not None]
    evaluated = [line for line in history if line.get("eval/accuracy") is not None]
    for axis, place in ((left, lambda s: s), (right, tokens.__getitem__)):
        axis.plot(
            [place(line["step"]) for line in trained],
            [line["reward/mean"] for line in trained],
            color="0.6",
            linewidth=1,
            label="reward of base rollouts",
        )
        places = [place(line["step"]) for line in evaluated]
        label = "held-out accuracy, sampled (95%)"
        mark_accuracy(axis, places, evaluated, color="tab:blue", label=label)
        greedy = [line["eval/greedy_accuracy"] for line in evaluated]
        axis.plot(places, greedy, "--", color="tab:green", marker=".", label="greedy")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    left.set_xlabel("step")
    right.set_xlabel("tokens sampled (millions)")
    left.set_ylabel("share solved")
    left.set_title(title)
    right.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def mark_accuracy(
    axis: Axes, places: Sequence[float], evaluated: Sequence[dict[str, Any]], **style: Any
) -> None:
    """Sampled accuracy of evaluations, with its 95% interval, at `places` on the axis."""
    mean = [line["eval/accuracy"] for line in evaluated]
    below = [m - line["eval/accuracy_low"] for m, line in zip(mean, evaluated, strict=True)]
    above = [line["eval/accuracy_high"] - m for m, line in zip(mean, evaluated, strict=True)]
    axis.errorbar(places, mean, yerr=[below, above], marker="o", capsize=3, **style)
