"""The report of a run: one HTML file with its curve, its numbers and a few of its reset trees."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxreset.json_text import loads

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }
th { border-bottom: 1px solid #999; } img { max-width: 100%; }
pre { background: #f4f4f4; padding: .5rem; overflow-x: auto; white-space: pre-wrap; margin: .2rem 0; }
.right { border-left: .3rem solid #2a9d4a; } .wrong { border-left: .3rem solid #c8372d; }
.alarm { border: .2rem solid #c8372d; padding: .3rem .8rem; margin: .5rem 0; }
.kept { color: #777; } .group { margin: 0 0 1rem 1.5rem; }
"""

COLUMNS = {
    "step": "step",
    "eval/accuracy": "sampled accuracy",
    "eval/greedy_accuracy": "greedy accuracy",
    "reward/mean": "reward",
    "reset/corrected": "resets corrected",
    "reset/blame_right": "blame right",
    "groups/signal_share": "groups with signal",
    "logp_gap": "logp gap",
}


def write_report(
    folder: Path,
    history: Sequence[dict[str, Any]],
    curve: Path,
    *,
    trees: int = 3,
    failed_below: float = 0.5,
) -> Path:
    """Writes `report.html` into a run's folder.

    Args:
      folder: the run's; its config and latest rollouts are quoted.
      history: metrics, one object a step.
      curve: the learning curve's PNG, which is embedded.
      trees: how many reset trees of the latest step to show, those with resets first.
      failed_below: a reward under it is shown as a failure.

    Returns:
      The file's path.
    """
    image = base64.b64encode(curve.read_bytes()).decode()
    config = (folder / "config.yaml").read_text()
    shown = [line for line in history if line.get("eval/accuracy") is not None]
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>{escape(folder.name)}</title>",
        f"<style>{STYLE}</style><h1>{escape(folder.name)}</h1>",
        *[_alarm(alarm) for alarm in _lines(folder / "alarms.jsonl")],
        f"<img alt='learning curve' src='data:image/png;base64,{image}'>",
        "<h2>Evaluations</h2>",
        _table(shown),
        "<h2>Reset trees of the latest step</h2>",
        *[_tree(tree, failed_below) for tree in _latest_trees(folder, trees)],
        f"<h2>Config</h2><pre>{escape(config)}</pre>",
    ]
    path = folder / "report.html"
    path.write_text("\n".join(parts))
    return path


def _table(lines: Sequence[dict[str, Any]]) -> str:
    used = {key: title for key, title in COLUMNS.items() if any(key in line for line in lines)}
    head = "".join(f"<th>{title}" for title in used.values())
    rows = ("".join(f"<td>{_number(line.get(key))}" for key in used) for line in lines)
    return f"<table><tr>{head}{''.join(f'<tr>{row}' for row in rows)}</table>"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _lines(file: Path) -> list[dict[str, Any]]:
    """A JSONL file's objects; none where there is no file."""
    return [loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _alarm(alarm: dict[str, Any]) -> str:
    shown = "" if alarm["response"] is None else f"<pre>{escape(alarm['response'])}</pre>"
    text = f"<b>step {alarm['step']}: {escape(alarm['kind'])}.</b> {escape(alarm['text'])}"
    return f"<div class='alarm'>{text}{shown}</div>"


def _latest_trees(folder: Path, count: int) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    if not files:
        return []

    def without_reset(tree: dict[str, Any]) -> bool:
        return all(group["reset_step"] is None for group in tree["groups"])

    return sorted(_lines(files[-1]), key=without_reset)[:count]


def _tree(tree: dict[str, Any], failed_below: float) -> str:
    parts = [f"<h3>{escape(tree['problem'])}</h3><pre>{escape(tree['question'])}</pre>"]
    for group in tree["groups"]:
        title = "from the prompt"
        if group["reset_step"] is not None:
            title = f"reset before step {group['reset_step']}"
        kept = group["kept"]
        parts.append(f"<div class='group'><b>{title}</b>")
        for row in group["rows"]:
            reward = row["reward"]  # None: it wasn't finite
            kind = "wrong" if reward is None or reward < failed_below else "right"
            drawn = escape(row["text"].removeprefix(kept))
            text = f"<span class='kept'>{escape(kept)}</span>{drawn}"
            parts.append(f"<pre class='{kind}'>{text}</pre>")
        parts.append("</div>")
    return "".join(parts)
