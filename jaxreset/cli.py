"""The command line: `jaxreset prompt | train | sft | eval | plan | export`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from jaxreset.errors import INTERRUPTED, ConfigError, PreemptedError, RunError
from jaxreset.json_text import dumps

ConfigPath = Annotated[Path, typer.Argument(help="YAML file; see configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=10 seed=1")
]

Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Of process 0. TPU pods, SLURM and Kubernetes need none of the three.",
    ),
]
Processes = Annotated[int | None, typer.Option(help="How many processes train together.")]
Process = Annotated[int | None, typer.Option(help="Which of them this is, from 0.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-train language models on multi-step reasoning by resets.",
)


@app.command()
def prompt(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 2,
    sample: Annotated[bool, typer.Option(help="Draw a response to each.")] = True,
) -> None:
    """Show prompts exactly as the policy sees them, a response to each, its steps, and its verdict."""
    with _uninterrupted():
        from jaxreset.config_file import load_config
        from jaxreset.run.preview import preview

        settings = load_config(config, overrides or [])
    preview(settings, Console(), count=count, sample=sample)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show config, shapes and memory, and stop.")
    ] = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
) -> None:
    """Train a policy; the same command goes on where a stopped run was.

    After SIGTERM, or Ctrl-C, the last finished step is saved, and the exit code is 75, or 130.
    """
    if not dry_run:
        _run(config, overrides, (coordinator, processes, process))
        return
    with _uninterrupted():
        from jaxreset.config_file import load_config

        settings = load_config(config, overrides or [])
        from jaxreset.run.dry_run import describe
    describe(settings, Console())


@app.command()
def sft(
    config: ConfigPath,
    overrides: Overrides = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
) -> None:
    """Learn from demonstrations alone: a config's warm start, with accuracy before and after it.

    `train` with the same config and overrides goes on from there.
    """
    _run(config, overrides, (coordinator, processes, process), only_warm_start=True)


def _run(
    config: Path,
    overrides: list[str] | None,
    processes: tuple[str | None, int | None, int | None],
    **how: bool,
) -> None:
    """A run of these processes, shown on the terminal."""
    from jaxreset.config_file import parse_config, read_values, run_dir
    from jaxreset.run.lock import refuse_in_use

    values = read_values(config, overrides or [])
    if (folder := run_dir(values)) is not None:
        # Before what takes seconds to import. A job's own lock isn't there before all of it has started.
        refuse_in_use(folder)
    with _uninterrupted():
        settings = parse_config(values)
        from jaxreset.parallel.processes import ending_together, is_leader, start
        from jaxreset.reporting.display import Display
    console = Console()
    start(*processes)
    with ending_together():
        with _uninterrupted():
            from jaxreset.run.loop import train as run
        run(settings, Display(console, quiet=not is_leader()), **how)


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="New JSONL file for the responses, one line a problem.")
    ] = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
) -> None:
    """Accuracy on held-out problems: of the run's latest checkpoint, or of model.path without a run.

    eval.samples=8 draws eight responses to each problem, for avg@8, pass@8 and majority@8.
    """
    with _uninterrupted():
        from jaxreset.config_file import load_config
        from jaxreset.parallel.processes import ending_together, is_leader, start

        settings = load_config(config, overrides or [])
    start(coordinator, processes, process)
    with ending_together():
        with _uninterrupted():
            from jaxreset.run.finished import evaluate_run
        found = evaluate_run(settings, save=save)
    if not is_leader():
        return
    if as_json:
        typer.echo(dumps({"step": found.step, **found.metrics, "sets": found.sets}))
        return
    from jaxreset.reporting.evaluation import show

    show(found.step, found.sets, Console())
    if save is not None:
        Console().print(f"responses: {save}", soft_wrap=True, markup=False)


@app.command()
def plan(
    config: ConfigPath,
    topology: Annotated[
        str, typer.Option(help="Devices to plan for, such as v5e:16x16, v6e:8x8 or cpu:8.")
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    largest: Annotated[
        bool, typer.Option("--largest", help="Also find the most rows that decode at once.")
    ] = False,
) -> None:
    """Compile a run's programs for devices that need not be there, and say whether it fits them."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever there is, it is left alone
    from jaxreset.config_file import load_config
    from jaxreset.planning.plans import plan as make_plan
    from jaxreset.planning.table import show

    settings = load_config(config, overrides or [])
    notes = Console(stderr=True, quiet=as_json)
    report = make_plan(settings, topology, largest=largest, say=notes.print)
    if as_json:
        typer.echo(dumps(report.as_json()))
        return
    show(report, Console())


@app.command()
def export(
    config: ConfigPath,
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    overrides: Overrides = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Write the LoRA adapters alone, for peft.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the tensors: float32 loses nothing of what was learnt, bfloat16, float16; "
            "default model.dtype."
        ),
    ] = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
) -> None:
    """Write the run's latest checkpoint as a Hugging Face folder; adapters are merged."""
    with _uninterrupted():
        from jaxreset.config_file import load_config
        from jaxreset.parallel.processes import ending_together, is_leader, start

        settings = load_config(config, overrides or [])
    start(coordinator, processes, process)
    with ending_together():
        with _uninterrupted():
            from jaxreset.run.finished import export_run
        try:
            step = export_run(settings, output, adapters=adapters, dtype=dtype)
        except FileExistsError as error:
            raise ConfigError(str(error)) from error
    if is_leader():
        Console().print(f"step {step} exported to {output}", soft_wrap=True)


def main() -> None:
    """Entry point: errors that a user can mend are one message, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except PreemptedError as error:
        _say(escape(str(error)))
        raise SystemExit(error.code) from None
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # Ctrl-C where no run was to be saved: typer has caught it
            _say(str(PreemptedError("Ctrl-C")))
        raise
    except (ConfigError, RunError) as error:
        # Escaped: a message may hold square brackets, and they aren't markup.
        _say(f"[bold red]error:[/] {escape(str(error))}")
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def _say(message: str) -> None:
    Console(stderr=True).print(message, highlight=False, soft_wrap=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits: an exception in the middle of importing JAX may crash Python.

    Blocking the signal wouldn't do: another thread would get it, and this one be interrupted all the same.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
