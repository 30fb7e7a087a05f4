"""Drawing a round in several threads, each of which runs programs over some of its groups.

XLA splits single operations over the cores of a CPU. Those of a decoding step are so small that the
cores mostly wait for one another; two halves of a round side by side take half the time. On an
accelerator programs run one after the other, so one thread is all there is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")

# What a `with` statement sets for its own thread only.
THREAD_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "jax_enable_x64": jax.enable_x64,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_device": jax.default_device,
}
LARGE_WEIGHTS = 256 * 2**20  # bytes: operations over larger ones keep all cores busy


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def deal(count: int, threads: int) -> list[range]:
    """`count` groups in at most `threads` runs of almost equal length, none of them empty.

    >>> deal(5, 2)
    [range(0, 3), range(3, 5)]
    >>> deal(1, 2)
    [range(0, 1)]
    """
    ends = [-(-count * (i + 1) // threads) for i in range(threads)]
    starts = [0, *ends[:-1]]
    return [range(a, b) for a, b in zip(starts, ends, strict=True) if b > a]


def run_side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Results of the tasks, each run in a thread of its own; the first error is raised when all ended."""
    if len(tasks) == 1:
        return [tasks[0]()]
    values = {name: getattr(jax.config, name) for name in THREAD_SETTINGS}

    def run(task: Callable[[], Result]) -> Result:
        with contextlib.ExitStack() as settings:
            for name, value in values.items():
                settings.enter_context(THREAD_SETTINGS[name](value))
            return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))
