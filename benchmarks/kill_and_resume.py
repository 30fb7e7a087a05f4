"""Kills a run again and again, starts it with the same command, and compares it with one never killed.

    python benchmarks/kill_and_resume.py [--series KINDS ...] [--steps N] [--seed N] [KEY=VALUE ...]

A series is a run that is interrupted once for each letter: `k` is SIGKILL, `t` is SIGTERM, `i` is SIGINT,
which Ctrl-C sends. By default there are three: ten kills, five of SIGTERM, ten of Ctrl-C. Each
interruption waits for a part of the run (sampling, verifying, updating, the writing of a checkpoint;
every fifth comes at any moment, starting and warm start included) and then for a random time more. All
runs must end with the same parameters, optimizer state and gradients, bit for bit, and with the same
metrics and rollouts, but for `time/*`, `seconds` and `compiles`; after SIGTERM and Ctrl-C the last step
in the metrics must be saved. The exit code is 1 where it isn't so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreset.errors import INTERRUPTED, PREEMPTED

ROOT = Path(__file__).parent.parent
CONFIG = """
    model.fresh.layers=2 model.fresh.width=32 model.fresh.heads=2 model.fresh.kv_heads=2
    model.fresh.mlp=64 task.min_terms=2 task.max_terms=3 task.modulus=3 data.chain_size=1000
    sampling.temperature=0.6 sampling.max_prompt_tokens=18 sampling.max_response_tokens=32
    sampling.max_step_tokens=8 reset.localizer.max_tokens=8 reset.localizer.max_question_tokens=80
    warm_start.steps=100 warm_start.batch=16 train.prompts_per_step=4 train.microbatch_tokens=1500
    data.eval_size=16 eval.batch=16 eval.every_steps=3 checkpoint.every_steps=2
"""
# The signal of each letter, and the exit code of a run that it ends in order.
SIGNALS = {
    "k": (signal.SIGKILL, None),
    "t": (signal.SIGTERM, PREEMPTED),
    "i": (signal.SIGINT, INTERRUPTED),
}
EXEMPT = ("time/", "seconds", "compiles")  # of the metrics: they are the clock's
WRITING = "writing a checkpoint"
PARTS = ("sampling", "verifying", "updating", WRITING, "any moment")
VERIFYING_SECONDS = 0.02  # a chain is checked too fast to be hit
START_SECONDS = 10.0  # importing, compiling or reading programs, restoring
MOST_SECONDS = {"sampling": 0.05, "verifying": VERIFYING_SECONDS, "updating": 0.05, WRITING: 0.08}


class Interruption(NamedTuple):
    """A signal: which, what the run was doing then, and its exit code."""

    signal: str
    part: str
    step: int  # the last in its metrics
    writing: bool  # a checkpoint was half-written
    code: int


def watched(part_file: Path, arguments: Sequence[str]) -> None:
    """Runs `jaxreset` and says in a file which part of it is running."""
    from jaxreset import cli
    from jaxreset.learning.learner import Learner
    from jaxreset.run import experiment, loop
    from jaxreset.sampling.sampler import Sampler
    from jaxreset.tasks.chain import ChainTask

    file = os.open(part_file, os.O_WRONLY)
    parts = ["starting"]  # the innermost is the last

    def say() -> None:
        os.pwrite(file, parts[-1].ljust(20).encode(), 0)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        parts.append(name)
        say()
        try:
            yield
        finally:
            parts.pop()
            say()

    def wrap(owner: Any, method: str, name: str, seconds: float = 0.0) -> None:
        wrapped: Callable[..., Any] = getattr(owner, method)

        def called(*args: Any, **kwargs: Any) -> Any:
            with part(name):
                time.sleep(seconds)
                return wrapped(*args, **kwargs)

        setattr(owner, method, called)

    say()
    wrap(Sampler, "sample", "sampling")
    wrap(Sampler, "resume", "sampling")
    wrap(ChainTask, "score", "verifying", VERIFYING_SECONDS)
    wrap(Learner, "learn", "updating")
    wrap(experiment, "warm_start", "warm start")
    wrap(loop, "_loop", "between")
    sys.argv = ["jaxreset", *arguments]
    cli.main()


class Run:
    """A run in its folder, started as often as it takes."""

    def __init__(self, folder: Path, steps: int, overrides: Sequence[str]):
        self.folder = folder
        self.part_file = folder.with_suffix(".part")
        self.log = folder.with_suffix(".log")
        self.command = ["train", str(ROOT / "configs" / "quickstart.yaml"), *CONFIG.split()]
        self.command += [f"train.steps={steps}", *overrides, f"run.dir={folder}"]
        self.command += [f"run.compile_cache={folder.parent / 'programs'}"]

    def start(self) -> subprocess.Popen[bytes]:
        self.part_file.write_text("starting")
        here = [sys.executable, __file__, "--watched", str(self.part_file), *self.command]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self.log.open("ab") as log:
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
            return subprocess.Popen(here, stdout=log, stderr=log, env=environment)

    def finish(self) -> None:
        """Runs to the end."""
        if self.start().wait():
            raise SystemExit(f"the run failed:\n{self.tail()}")

    def part(self) -> str:
        return self.part_file.read_text().strip()

    def step(self) -> int:
        """The last step in the metrics."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else -1

    def writing(self) -> bool:
        """Whether a checkpoint is half-written."""
        return any(self.folder.glob("checkpoints/*tmp*"))

    def interrupt(self, kind: str, part: str, step: int, rng: random.Random) -> Interruption:
        """Starts the run, and sends the signal once it has done `step` steps and is at that part."""
        running, end = self.start(), time.monotonic() + rng.uniform(0, START_SECONDS)
        while running.poll() is None:
            if part == "any moment":
                reached = time.monotonic() > end or self.step() > step + 1
            else:
                at = self.writing() if part == WRITING else self.part() == part
                reached = at and self.step() >= step
            if reached:
                break
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, MOST_SECONDS.get(part, 0.0)))
        if running.poll() is not None:
            raise SystemExit(f"the run ended before its signal:\n{self.tail()}")
        found = self.part(), self.step(), self.writing()
        number, orderly = SIGNALS[kind]
        running.send_signal(number)
        code = running.wait()
        if (
            orderly is None
        ):  # it went on until the signal came: what is there now is what it did last
            found = self.part(), self.step(), self.writing()
        elif code not in (orderly, -number):  # the latter before it could handle it
            raise SystemExit(f"exit code {code} after {number.name}:\n{self.tail()}")
        elif code == orderly and self.saved() != self.step():
            raise SystemExit(f"step {self.saved()} is saved, of {self.step()}:\n{self.tail()}")
        return Interruption(number.name, *found, code)

    def saved(self) -> int:
        """The last step that is saved."""
        names = (f.name for f in self.folder.glob("checkpoints/*"))
        return max((int(name) for name in names if name.isdecimal()), default=-1)

    def tail(self) -> str:
        """The end of what the run printed."""
        return self.log.read_text()[-3000:]


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs; nothing should."""
    found = []
    ours, theirs = (_metrics(folder) for folder in (one, other))
    if ours != theirs:
        steps = [a.get("step") for a, b in zip(ours, theirs, strict=False) if a != b]
        found.append(f"metrics of steps {steps}, {len(ours)} and {len(theirs)} lines")
    ours, theirs = (_files(folder / "rollouts") for folder in (one, other))
    found += [f"rollouts/{n}" for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
    ours, theirs = (_checkpoint(folder) for folder in (one, other))
    found += [f"checkpoint: {n}" for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
    return found


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in x.items() if not k.startswith(EXEMPT)} for x in lines]


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _checkpoint(folder: Path) -> dict[str, bytes]:
    """All arrays of the last checkpoint, and its progress."""
    import jax
    from orbax.checkpoint import v1 as ocp

    last = max((folder / "checkpoints").iterdir(), key=lambda f: int(f.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is laid out as it was saved: it is to be
        loaded = ocp.load_checkpointables(last)
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def series(name: str, kinds: str, whole: Run, make: Callable[[str], Run], seed: int) -> list[str]:
    """Interrupts a run once for each of `kinds`, lets it end; returns how it differs from `whole`."""
    run, rng = make(name), random.Random(f"{seed}, {name}")
    for n, kind in enumerate(kinds):
        # Later ones come later, so that the run gets somewhere.
        step = n * (whole.step() - 1) // len(kinds)
        seen = run.interrupt(kind, PARTS[n % len(PARTS)], step, rng)
        print(
            f"  {seen.signal} while {seen.part}, after step {seen.step}"
            f"{', a checkpoint half-written' * seen.writing} (exit code {seen.code})",
            flush=True,
        )
    run.finish()
    return differences(whole.folder, run.folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--series", nargs="+", default=["k" * 10, "t" * 5, "i" * 10])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    place = Path(tempfile.mkdtemp(prefix="kill_and_resume_"))

    def make(name: str) -> Run:
        return Run(place / name, options.steps, options.overrides)

    whole, begin, failed = make("whole"), time.monotonic(), False
    whole.finish()
    updates = sum(line.get("optimizer_steps", 0) for line in _metrics(whole.folder))
    print(f"never interrupted: {time.monotonic() - begin:.0f} s, {updates:.0f} optimizer steps")
    for n, kinds in enumerate(options.series):
        wrong = series(f"series_{n}", kinds, whole, make, options.seed)
        failed |= bool(wrong)
        print(f"{kinds}: {'; '.join(wrong) or 'the same bits, metrics and rollouts'}", flush=True)
    if failed:
        print(f"the runs are in {place}")
    else:
        shutil.rmtree(place)
    return int(failed)


if __name__ == "__main__":
    if "--watched" in sys.argv[1:2]:
        watched(Path(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(main())
