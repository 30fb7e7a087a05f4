"""What a run would do: its config, its compiled shapes, its memory. No program of it is compiled."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jaxreset.config import Config
from jaxreset.config_file import dump_config
from jaxreset.disk import size_text
from jaxreset.planning.footprint import estimated, here, phases
from jaxreset.planning.table import memory_table
from jaxreset.run.experiment import Experiment


def describe(config: Config, console: Console) -> None:
    """Prints the resolved config, every shape that would be compiled, and what takes memory.

    Raises:
      ConfigError: as a run would.
    """
    experiment = Experiment(config)
    shapes, sampler = experiment.shapes, experiment.sampler
    memory = sampler.memory(experiment.start_policy)
    console.print(dump_config(config), highlight=False)
    table = Table(title="compiled shapes")
    for column in ("program", "groups", "rows", "prefix tokens", "suffix tokens", "cache or batch"):
        table.add_column(column, justify="left" if column == "program" else "right")
    children = dict.fromkeys(child for _, child in shapes.forks)
    sampled = [("sample", s) for s in shapes.base] + [("resume", s) for s in children]
    if shapes.localize is not None:
        sampled.append(("localize", shapes.localize))
    sampled.append(("evaluate", shapes.evaluate))
    for name, shape in sampled:
        table.add_row(name, *map(str, shape), size_text(memory.held_bytes(shape)))
    for pack in shapes.pack:
        tokens = pack.bins * (pack.prefix + pack.lanes * pack.slots)
        table.add_row("update (bins, lanes)", *map(str, pack), f"{tokens:,} tokens")
    console.print(table)

    case = here(config)
    held = phases(case, estimated(case))
    console.print(memory_table(held))
    console.print(f"parameters            {case.subject.parameters:,} ({case.subject.model.dtype})")
    name, most = max(held.items(), key=lambda item: item[1].total)
    verdict = f"{size_text(-most.over)} left"
    if most.over > 0:
        verdict = f"[bold red]{size_text(most.over)} too much[/]"
    there = size_text(case.slice.memory)
    console.print(
        f"most at once          {size_text(most.total)} of {there}, while {name}: {verdict}; estimated"
    )
    train, test = len(experiment.problems.train), len(experiment.problems.test)
    console.print(
        f"problems              {train:,} to train on, {test:,} held out, "
        f"{experiment.overlong.dropped} dropped (longest prompt {experiment.overlong.longest} tokens)"
    )
    if experiment.problems.ungradable:
        console.print(
            f"  ungradable          {experiment.problems.ungradable:,} more left out: their answers "
            "(proof, not found, NaN) can't be compared"
        )
    if config.warm_start.steps:
        found, dropped = len(experiment.lessons.found), experiment.lessons.dropped
        counted = f"{found:,} to learn from, {dropped} dropped" if found else "drawn by the task"
        console.print(f"demonstrations        {counted}")
    experiment.close()
