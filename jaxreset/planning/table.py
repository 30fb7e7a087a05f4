"""A plan on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from jaxreset.disk import size_text
from jaxreset.planning.footprint import Phase
from jaxreset.planning.plans import Report


def show(report: Report, console: Console) -> None:
    """Prints it: memory by phase, programs, what they send, and what to change where it doesn't fit."""
    r = report
    mesh = " × ".join(f"{axis} {size}" for axis, size in r.mesh.items()) or "one device"
    console.print(
        f"{r.devices} × {r.kind} ({r.topology}), {mesh}; {size_text(r.memory)} on each; "
        f"{r.parameters:,} parameters",
        highlight=False,
    )
    console.print(memory_table(r.phases))
    console.print(_programs(report))
    console.print(
        f"compiling all {sum(r.kinds.values())} takes about {r.compile_seconds / 60:.1f} minutes here, one "
        "after another; a run compiles as many at a time as there are cores, and once for all its starts",
        highlight=False,
    )
    if any(program.traffic != () for program in r.programs):
        console.print(_traffic(report))
    work = ", ".join(f"{name} {count:.2e}" for name, count in r.flops.items())
    console.print(f"FLOPs of a step at its limits, on all devices: {work}", highlight=False)
    for name, parts in r.cuts.items():
        console.print(
            f"{name}: fewer groups than data shards, so each is cut in {parts} parts, all of which prefill"
            " and keep its prefix; resets of it are prefilled too",
            highlight=False,
        )
    for program in r.programs:
        if program.refused:
            console.print(f"{program.name}: {program.refused}", highlight=False, markup=False)
    _verdict(report, console)


def memory_table(phases: Mapping[str, Phase]) -> Table:
    """What a device holds in each phase, part by part."""
    table = Table(title="bytes on a device")
    table.add_column("held")
    names = dict.fromkeys(part for phase in phases.values() for part in phase.parts)
    for phase in phases:
        table.add_column(phase, justify="right")
    for part in names:
        sizes = [phase.parts.get(part) for phase in phases.values()]
        table.add_row(part, *("" if size is None else size_text(size) for size in sizes))
    totals = [size_text(phase.total) for phase in phases.values()]
    table.add_row("total", *totals, style="bold")
    return table


def _programs(report: Report) -> Table:
    table = Table(title="programs")
    columns = "program", "sizes", "arguments", "result", "temporary", "compiled in", "of its kind"
    for column in columns:
        table.add_column(column, justify="left" if column == "program" else "right")
    for p in report.programs:
        sizes = [size_text(x) for x in (p.arguments, p.result, p.temporary)]
        compiling = f"{p.seconds:.0f} s", str(report.kinds[p.name])
        table.add_row(p.name, " × ".join(map(str, p.sizes)), *sizes, *compiling)
    return table


def _traffic(report: Report) -> Table:
    table = Table(title="collectives: results on a device, in a run of the program or for a token")
    for column in ("program", "for", "kind", "count", "bytes", "largest", "of shape"):
        table.add_column(column, justify="right" if column in ("count", "bytes") else "left")
    for program in report.programs:
        if program.traffic is None:
            table.add_row(program.name, "", "this jax can't read the compiled text")
        for t in program.traffic or ():
            each = "a token" if t.looping and program.name == "decode" else "a run"
            shape = "[" + ", ".join(map(str, t.shape)) + "]"
            numbers = f"{t.times:,}", size_text(t.bytes), size_text(t.largest)
            table.add_row(program.name, each, t.kind, *numbers, shape)
    return table


def _verdict(report: Report, console: Console) -> None:
    for name, phase in report.phases.items():
        state = f"{size_text(-phase.over)} left"
        if phase.over > 0:
            state = f"[bold red]{size_text(phase.over)} too much[/]"
        console.print(f"{name}: {size_text(phase.total)} of {size_text(report.memory)}, {state}")
    console.print("[bold green]it fits[/]" if report.fits else "[bold red]it does not fit[/]")
    for advice in report.advice:
        saves = "only compiling tells how much it saves"
        if advice.saves is not None:
            enough = ", which is enough" if advice.enough else ""
            saves = f"saves about {size_text(advice.saves)}{enough}"
        console.print(f"  {advice.phase}: {advice.change}  {saves}", highlight=False)
    if (most := report.largest) is not None:
        console.print(
            f"most rows at once: sampling.slots={most.slots}, {most.rows_per_shard} on a data shard, "
            f"filled by train.prompts_per_step={most.prompts}; {size_text(most.free)} left",
            highlight=False,
        )
