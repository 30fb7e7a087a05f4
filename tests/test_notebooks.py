"""Runs the notebooks from top to bottom, in this interpreter, and looks at what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MARK = "found: "


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the Python that runs the tests, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="this interpreter", language="python")


def run(name: str, monkeypatch: pytest.MonkeyPatch, **found: str) -> dict:
    """Executes a notebook, then evaluates the expressions `found` where it ended."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiled in half the time
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    values = ", ".join(f"{key!r}: {expression}" for key, expression in found.items())
    last = f"import json\nprint({MARK!r} + json.dumps({{{values}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    client.execute()
    printed = notebook.cells[-1].outputs[0].text
    return json.loads(printed.split(MARK)[1])


@pytest.mark.parametrize("name", ["01_quickstart.ipynb", "02_losses.ipynb", "03_one_step.ipynb"])
def test_stored_without_outputs(name: str) -> None:
    cells = nbformat.read(NOTEBOOKS / name, as_version=4).cells
    kept = [c.id for c in cells if c.cell_type == "code" and (c.outputs or c.execution_count)]
    assert not kept, f"clear the outputs of {name}: cells {kept}"


def test_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(
        "01_quickstart.ipynb",
        monkeypatch,
        curve="result.curve.stat().st_size",
        steps="[line['step'] for line in result.history]",
        rewards="rewards[group].tolist()",
        failed_reward="float(rewards[group, row])",
        blamed="blamed",
        truth="truth",
        right_before_truth="is_right(steps)[: truth - 1]",
        branches="[text(branches, 0, k) for k in range(4)]",
        kept="policy.decode(snapshot.tokens[len(prompts[group]) :])",
        success="{rule: float(s.mean()) for rule, s in success.items()}",
        shapes="[s.shape[1] for s in success.values()]",
    )
    assert found["steps"] == list(range(5))
    assert found["curve"] > 10_000  # a picture, not an empty file
    assert found["failed_reward"] == 0
    assert all(found["right_before_truth"])
    assert found["truth"] > 1
    assert found["kept"].count("\n") == found["blamed"] - 1
    assert len(found["branches"]) == 4
    assert all(branch.startswith(found["kept"]) for branch in found["branches"])
    assert found["shapes"] == [4] * 4
    # Right steps that are kept can no longer go wrong.
    assert found["success"]["oracle"] > found["success"]["random"]


def test_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(
        "02_losses.ipynb",
        monkeypatch,
        loss="float(loss)",
        summary="{name: {o.split(':')[0]: v.tolist() for o, v in by.items()} "
        "for name, by in summary.items()}",
        imported="[m for m in __import__('sys').modules if m.startswith('jaxreset')]",
    )
    assert {".".join(name.split(".")[:2]) for name in found["imported"]} == {
        "jaxreset",
        "jaxreset.losses",
    }
    assert found["loss"] == pytest.approx(0.5 * (0.6931 - 1.3863), abs=1e-3)  # by hand
    easy = [sum(v) / len(v) for v in found["summary"]["easy"].values()]
    assert max(easy) - min(easy) < 0.05
    hard = {o: sum(v) / len(v) for o, v in found["summary"]["hard"].items()}
    assert hard["SRPO"] > max(hard["GRPO"], hard["RRPO"]) + 0.1


def test_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(
        "03_one_step.ipynb",
        monkeypatch,
        groups="len(groups.groups)",
        resets="len(resets)",
        kept="[len(g.prefix) - len(prompts[g.prompt].tokens) for g in resets]",
        parts="[groups.metrics['reward/correct'], groups.metrics['reward/boxed']]",
        reward="groups.metrics['reward/mean']",
        means="[m.tolist() for row in values.means for m in row]",
        errors="[e.tolist() for row in values.errors for e in row]",
        steps="experiment.steps_done",
        moved="[float(g.groups[0].behavior_logps[0][0]) for g in (groups, again)]",
        accuracy="[before['eval/accuracy'], after['eval/accuracy']]",
    )
    assert found["groups"] == 16
    assert 0 < found["resets"] <= 8
    assert max(found["kept"]) > 0
    assert found["reward"] == pytest.approx(found["parts"][0] + 0.1 * found["parts"][1])
    assert all(0 <= m <= 1.1 for row in found["means"] for m in row)
    assert max(e for row in found["errors"] for e in row) > 0
    assert found["steps"] == 5
    assert found["moved"][0] != found["moved"][1]
    assert min(found["accuracy"]) > 0.45
