"""Progress on the terminal: reward, accuracy, tokens a second and time left; a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxreset.reporting.alarms import Alarm
from jaxreset.reporting.evaluation import other_sets, with_interval


class Display:
    """A progress line; on a terminal it is redrawn, elsewhere a line is printed now and then.

    Args:
      console: where to; default standard output.
      quiet: show nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name, self._total = "", 0
        self._accuracy = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def changed(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Says with which other keys a run goes on."""
        for key, (before, now) in changes.items():
            self.console.print(f"going on with {key}={now}, so far {before}", markup=False)

    def phase(self, name: str, total: int | None, *, done: int = 0) -> None:
        """Begins a phase of `total` steps, of which `done` are done."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._name, self._total = name, total or 0
        self._task = self._progress.add_task(name, total=total, completed=done, text="")
        if not self.console.is_terminal:
            self.console.print(f"{name} …")

    def warm_start_step(self, step: int, loss: float) -> None:
        """Shows a supervised step."""
        self._show(step, f"loss {loss:.3f}", every=max(self._total // 5, 1))

    def step(self, record: dict[str, Any]) -> None:
        """Shows a training step from its metrics."""
        if "eval/accuracy" in record:
            self._accuracy = f"accuracy {record['eval/accuracy']:.1%}"
        parts = [self._accuracy]
        if "reward/mean" in record:
            parts = [
                f"reward {record['reward/mean']:.3f}",
                self._accuracy,
                f"answered {record['response/answered']:.0%} in {record['response/steps']:.1f} steps",
                f"{record['time/tokens_per_second']:,.0f} tokens/s",
            ]
        self._show(record["step"], "  ".join(parts), every=max(self._total // 10, 1))

    def alarm(self, alarm: Alarm) -> None:
        """Shows what is wrong, in a frame that isn't overlooked."""
        parts = [f"[bold]{escape(alarm.text)}[/]"]
        if alarm.response is not None:
            parts.append(f"A response of that step:\n[dim]{escape(alarm.response)}[/]")
        title = f"[bold red]step {alarm.step}: {alarm.kind}[/]"
        self.console.print(Panel("\n\n".join(parts), title=title, border_style="bold red"))

    def _show(self, step: int, text: str, *, every: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step, text=text)
        if not self.console.is_terminal and (step % every == 0 or step == self._total):
            self.console.print(f"{self._name} {step}/{self._total}  {text}")

    def summary(
        self,
        history: Sequence[dict[str, Any]],
        folder: Path,
        curve: Path,
        *,
        before: Sequence[dict[str, Any]] = (),
    ) -> None:
        """The table at the end of a run, and where its files are; `before`: what was measured before a
        warm start."""
        table = Table(title=f"{folder.name}: accuracy on held-out problems (95% interval)")
        others = other_sets(history)
        for column in ("step", "sampled", "greedy", *others, "tokens sampled", "minutes"):
            table.add_column(escape(column), justify="right")
        tokens = seconds = 0.0
        for line in [*before, *history]:
            tokens += line.get("tokens_sampled", 0)
            seconds += line.get("seconds", 0)
            if line.get("eval/accuracy") is not None:
                table.add_row(
                    "before warm start" if line in before else str(line["step"]),
                    with_interval(line, "eval/accuracy"),
                    f"{line['eval/greedy_accuracy']:.1%}",
                    *(with_interval(line, f"eval/{name}/accuracy") for name in others),
                    f"{tokens:,.0f}",
                    f"{seconds / 60:.1f}",
                )
        self.console.print(table)
        trained = [line for line in history if "optimizer_steps" in line]
        if trained and not any(line["optimizer_steps"] for line in trained):
            self.console.print(
                f"[bold red]nothing was learnt:[/] no optimizer step in {len(trained)} steps, the policy "
                "is the one that training started from",
                soft_wrap=True,
            )
        if history and (reason := history[-1].get("stopped")) is not None:
            text = f"stopped early after step {history[-1]['step']}: {escape(str(reason))}"
            self.console.print(text, soft_wrap=True)
        self.console.print(f"learning curve: {curve}", soft_wrap=True)
        self.console.print(f"run folder:     {folder}", soft_wrap=True)
