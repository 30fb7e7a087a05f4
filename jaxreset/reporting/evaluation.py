"""An evaluation as a table: one row a held-out set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Metrics = Mapping[str, Any]


def show(step: int, sets: Mapping[str, Metrics], console: Console) -> None:
    """Prints the metrics of each set, which are named as `run.evaluate.measure` does."""
    problems = sum(metrics["problems"] for metrics in sets.values())
    some = f" in {len(sets)} sets" if len(sets) > 1 else ""
    console.print(f"step {step}, {problems:.0f} held-out problems{some}", highlight=False)
    several = [
        name
        for name in next(iter(sets.values()))
        if name.startswith(("pass@", "majority@"))
        and not name.endswith(("_low", "_high"))
        and name != "pass@1"  # that is the accuracy
    ]
    table = Table(title="accuracy of sampled (95% interval) and of greedy responses")
    table.add_column("set")
    for title in ("problems", "sampled", "greedy", *several, "tokens", "cut", "answered"):
        table.add_column(title, justify="right")
    for name, metrics in sets.items():
        table.add_row(
            escape(name),
            f"{metrics['problems']:.0f}",
            with_interval(metrics, "accuracy"),
            f"{metrics['greedy_accuracy']:.1%}",
            *(f"{metrics[other]:.1%}" for other in several),
            f"{metrics['response_tokens']:,.0f}",
            f"{metrics['cut']:.1%}",
            f"{metrics['answered']:.1%}",
        )
    console.print(table)


def other_sets(history: Sequence[Metrics]) -> list[str]:
    """The names of the held-out sets of a run besides the main one."""
    keys = dict.fromkeys(key for line in history for key in line)
    return [
        key.removeprefix("eval/").removesuffix("/accuracy")
        for key in keys
        if key.startswith("eval/") and key.endswith("/accuracy") and key.count("/") > 1
    ]


def with_interval(metrics: Metrics, name: str) -> str:
    """A share and its 95% interval, as a table's cell; nothing where there is none."""
    if metrics.get(name) is None:
        return ""
    low, high = (metrics[f"{name}{end}"] for end in ("_low", "_high"))
    return escape(f"{metrics[name]:.1%} [{low:.1%}, {high:.1%}]")
