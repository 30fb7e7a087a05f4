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
from jaxreset.run.preview import show_prompt
from jaxreset.tasks.base import Task
from jaxreset.tasks.chain import ChainTask


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
    show_prompt(experiment, experiment.prompts(1)[0], console)
    console.rule()

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
    _show_problems(experiment, console)
    if (rate := base_rate(config, experiment.task)) is not None:
        console.print(rate)
    experiment.close()


def _show_problems(experiment: Experiment, console: Console) -> None:
    """How many there are, and how many of the records of each file."""
    problems, overlong = experiment.problems, experiment.overlong
    held_out = sum(map(len, problems.test.values()))
    console.print(
        f"problems              {len(problems.train):,} to train on, {held_out:,} held out, "
        f"{overlong.dropped} dropped (longest prompt {overlong.longest} tokens)"
    )
    for portion in problems.portions:
        if portion.key == "task":
            continue
        read = "" if portion.records is None else f" of {portion.records:,} records read"
        weight = "" if portion.weight is None else f", weight {portion.weight:g}"
        console.print(f"  {portion.key:<19} {portion.problems:,}{read}{weight}: {portion.path}")
    if problems.ungradable:
        console.print(
            f"  ungradable          {problems.ungradable:,} more left out: their answers "
            "(proof, not found, NaN) can't be compared"
        )
    if problems.repeated:
        console.print(
            f"  repeated            {problems.repeated:,} held-out problems are trained on, too"
        )
    if experiment.config.warm_start.steps:
        found, dropped = len(experiment.lessons.found), experiment.lessons.dropped
        counted = f"{found:,} to learn from, {dropped} dropped" if found else "drawn by the task"
        console.print(f"demonstrations        {counted}")


def base_rate(config: Config, task: Task) -> str | None:
    """What a warm start on the embedded task will come to; None: that can't be told."""
    start = config.warm_start
    if (
        type(task) is not ChainTask
        or not start.steps
        or start.path
        or config.task.reward is not None
    ):
        return None
    rates = [task.predicted_accuracy(greedy=greedy) for greedy in (False, True)]
    sampled, greedy = (f"{rate:.0%}" if rate >= 0.01 else f"{rate:.1g}" for rate in rates)
    return (
        f"base rate             about {sampled} sampled at temperature 1, {greedy} greedily, after a warm "
        f"start that imitates exactly (predicted from task.mistakes={task.mistakes} and "
        f"task.misread={task.misread})"
    )
