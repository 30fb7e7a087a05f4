"""What a run would do: its config, its compiled shapes, its memory. No program of it is compiled."""

from __future__ import annotations

from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxreset.config import Config
from jaxreset.config_file import dump_config
from jaxreset.models.adapters import trained
from jaxreset.models.precision import widened
from jaxreset.sampling.programs import cache_bytes
from jaxreset.training.setup import make_experiment


def describe(config: Config, console: Console) -> None:
    """Prints the resolved config, every shape that would be compiled, and what takes memory.

    Raises:
      ConfigError: as a run would.
    """
    experiment = make_experiment(config)
    plan, policy = experiment.plan, experiment.adapted(experiment.policy)
    model = policy.config
    console.print(dump_config(config), highlight=False)
    table = Table(title="compiled shapes")
    for column in ("program", "groups", "rows", "prefix tokens", "suffix tokens", "cache or batch"):
        table.add_column(column, justify="left" if column == "program" else "right")
    children = dict.fromkeys(child for _, child in plan.forks)
    sampled = [("sample", s) for s in plan.base] + [("resume", s) for s in children]
    if plan.localize is not None:
        sampled.append(("localize", plan.localize))
    sampled.append(("evaluate", plan.evaluate))
    caches = {}
    for name, shape in sampled:
        caches[name] = cache_bytes(model, shape)
        table.add_row(name, *map(str, shape), size_text(caches[name]))
    for pack in plan.pack:
        tokens = pack.bins * (pack.prefix + pack.lanes * pack.slots)
        table.add_row("update (bins, lanes)", *map(str, pack), f"{tokens:,} tokens")
    console.print(table)

    changing, frozen = trained(policy.params)
    state = jax.tree.leaves(jax.eval_shape(widened, changing))
    learnt, kept = sum(p.size * p.dtype.itemsize for p in state), _bytes(frozen)
    console.print(f"parameters            {size_text(_bytes(policy.params))} ({model.dtype})")
    console.print(f"  frozen in training  {size_text(kept)}")
    console.print(f"  trained             {size_text(learnt)} ({sum(p.size for p in state):,})")
    console.print(f"optimizer, gradients  {size_text(3 * learnt)}")
    held = sum(size for name, size in caches.items() if name != "evaluate")
    console.print(f"caches of a step      {size_text(held)} at most, all rounds held")
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
    experiment.task.close()


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def size_text(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
