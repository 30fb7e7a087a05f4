"""Reward workers: verifiers in processes of their own, under a deadline that the kernel keeps.

A verifier fed with model output meets expressions such as 9^9^9^9, which hold the interpreter lock
inside C code where neither a thread nor a Python signal handler can end them. So each item runs in
a worker process under two interval timers whose signals have their default action, which is to
kill: `ITIMER_PROF` bounds CPU time, so that the verdict doesn't depend on how busy the machine is;
`ITIMER_REAL` is a generous backstop for an item that merely sleeps. The parent sees the pipe close,
scores the item 0, names it in a warning, and starts another worker.

A verifier that fails on an item, by an exception or by the end of its process, costs that item its
reward and nothing else: whether it fails on so many that it is broken is for the run to judge.

Workers are fresh interpreters that import the verifier's module and nothing else: not JAX, and not
the main script (`multiprocessing` would run it again in each). POSIX only.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from jaxreset.errors import RunError
from jaxreset.tasks.base import Item, Problem, Scores, reward_of

ScoreOne = Callable[[Problem, str], float]

logger = logging.getLogger(__name__)

# What a worker has to say; the last two are what the parent makes of a closed pipe.
_READY, _SCORED, _OUT_OF_MEMORY, _RAISED = "ready", "scored", "out of memory", "raised"
_TIMED_OUT, _DIED = "timed out", "died"

LONGEST_REASON = 4000  # characters kept of a traceback
# These come to the whole process group and are meant for the parent, which ends its workers.
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM)

_BOOT = "import sys; fd, *sys.path[:] = sys.argv[1:]; from {} import {}; {}(int(fd))"


class ItemLimits(NamedTuple):
    """What one item may take; the bytes are of address space beyond the idle worker's."""

    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int | None


class RewardWorkers:
    """Scores items in worker processes, in input order, whatever an item does to its worker.

    An item whose deadline fires, or that runs out of memory, scores 0 and is reported in
    `Scores.timeouts`. One for which `score_one` raises, or returns no finite number, scores 0 and is
    reported in `Scores.errors`. A worker that dies of anything else is replaced and its item tried
    once more, as somebody else may have ended it; the second time it is such an error too.
    Processes start at the first `score` and end with `close`, with the `with` block, or with this
    process, even if killed. Not thread-safe: one `score` at a time.

    Args:
        score_one: `(problem, response) -> reward`, a function at the top level of an importable
            module (it is sent by name). It must leave SIGPROF and SIGALRM alone.
        processes: how many workers.
        cpu_seconds: CPU time one item may take.
        wall_seconds: wall-clock time one item may take; default 60 times `cpu_seconds`.
        memory_bytes: address space one worker may take beyond what it has when idle (Linux; None:
            unlimited).
        prepare: called once in each worker before its first item, outside the deadlines (imports,
            tables).

    Raises:
        ValueError: for a setting out of range, or a `score_one` or `prepare` that can't be sent by
            name.
    """

    def __init__(
        self,
        score_one: ScoreOne,
        *,
        processes: int = 2,
        cpu_seconds: float = 5.0,
        wall_seconds: float | None = None,
        memory_bytes: int | None = 4 * 2**30,
        prepare: Callable[[], None] | None = None,
    ):
        if wall_seconds is None:
            wall_seconds = 60.0 * cpu_seconds
        self._limits = ItemLimits(cpu_seconds, wall_seconds, memory_bytes)
        for name, value in {"processes": processes, **self._limits._asdict()}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: expected a positive, finite number")
        try:
            self._functions = pickle.dumps((score_one, prepare))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"score_one={score_one!r}, prepare={prepare!r}: expected functions at the top "
                f"level of a module that worker processes can import ({error})"
            ) from error
        self._processes = processes
        self._workers: list[_Worker] = []
        # Runs at the end of this process too; it must not hold a reference to self.
        weakref.finalize(self, _end_all, self._workers)

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response) pairs.

        Returns:
            `Scores`: float64 [len(items)] in the order of `items`, the indexes whose deadline
            fired, and those on which `score_one` failed.

        Raises:
            RunError: a worker can't start. All workers are ended first, and start anew at the
                next call.
        """
        try:
            return self._score(items)
        except BaseException:
            self.close()  # busy workers would answer for these items in the next call
            raise

    def close(self) -> None:
        """Ends the workers. A later `score` starts new ones."""
        _end_all(self._workers)

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, items: Sequence[Item]) -> Scores:
        rewards = np.zeros(len(items), np.float64)
        timeouts: list[int] = []
        errors: dict[int, str] = {}
        retried: set[int] = set()
        waiting = deque(range(len(items)))
        while waiting or any(worker.index is not None for worker in self._workers):
            self._hand_out(waiting, items)
            for worker in _with_news(self._workers):
                outcome, detail = worker.receive()
                index, worker.index = worker.index, None
                if outcome == _READY:
                    continue
                if index is not None and outcome == _SCORED:
                    rewards[index] = detail
                    continue
                if index is not None and outcome == _RAISED:
                    errors[index] = detail
                    continue
                self._remove(worker)
                if index is None:
                    if outcome == _DIED and worker.ready:
                        continue  # ended from outside, between two calls
                    raise RunError(f"reward worker {outcome} while starting: {detail}")
                case = _name(index, items[index])
                if outcome in (_TIMED_OUT, _OUT_OF_MEMORY):
                    timeouts.append(index)
                    logger.warning("reward worker %s (%s), scored 0: %s", outcome, detail, case)
                elif index not in retried:
                    retried.add(index)
                    waiting.appendleft(index)
                    logger.warning("reward worker %s (%s), retrying: %s", outcome, detail, case)
                else:
                    errors[index] = f"the verifier's process {outcome}: {detail}"
        failed = sorted(errors)
        reasons = tuple(errors[index] for index in failed)
        return Scores(rewards, tuple(sorted(timeouts)), tuple(failed), reasons)

    def _hand_out(self, waiting: deque[int], items: Sequence[Item]) -> None:
        """Starts as many workers as have something to do, and gives each idle one the next item."""
        busy = sum(worker.index is not None for worker in self._workers)
        while len(self._workers) < min(self._processes, busy + len(waiting)):
            self._workers.append(_Worker(self._functions, self._limits))
        for worker in self._workers:
            if waiting and worker.ready and worker.index is None:
                index = waiting.popleft()
                worker.give(index, items[index])

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()


def start_process(
    serving: Callable[[int], None], environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """A fresh interpreter that calls `serving(fd)`, and this end of the pipe `fd`.

    Args:
        serving: a function at the top level of an importable module; it calls `ignore_interrupts`,
            and returns when the other end closes.
        environment: variables added to this process's.
    """
    pipe, theirs = Pipe()
    with theirs:
        fd = theirs.fileno()
        path = [entry or os.getcwd() for entry in sys.path]
        name = serving.__name__
        # The process starts with them blocked, until it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOT.format(serving.__module__, name, name),
                    str(fd),
                    *path,
                ],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process, pipe


def ignore_interrupts() -> None:
    """What comes to the whole process group is the parent's to answer."""
    for interrupt in _FOR_THE_PARENT:
        signal.signal(interrupt, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)


class _Worker:
    """The parent's side of a worker: `ready` once it has started, `index` of the item it scores."""

    def __init__(self, functions: bytes, limits: ItemLimits):
        self.ready = False
        self.index: int | None = None
        self.limits = limits
        self.process, self.pipe = start_process(serve)
        self._send((functions, limits))

    def give(self, index: int, item: Item) -> None:
        self.index = index
        self._send(item)

    def receive(self) -> tuple[str, Any]:
        """The worker's next reply, or how it ended. Blocks until there is one."""
        try:
            outcome, detail = self.pipe.recv()
        except (EOFError, OSError):
            return self._epitaph()
        except Exception as error:  # the item wrote to the pipe
            return _DIED, f"its reply can't be read: {type(error).__name__}"
        self.ready = True
        return outcome, detail

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def _send(self, message: object) -> None:
        with suppress(OSError):  # a worker that is gone shows when its reply is read
            self.pipe.send(message)

    def _epitaph(self) -> tuple[str, str]:
        status = self.process.wait()
        if status == -signal.SIGPROF:
            return _TIMED_OUT, f"{self.limits.cpu_seconds:g} CPU-seconds"
        if status == -signal.SIGALRM:
            return _TIMED_OUT, f"{self.limits.wall_seconds:g} seconds"
        return _DIED, signal.Signals(-status).name if status < 0 else f"exit status {status}"


def serve(fd: int) -> None:
    """The worker: scores the items that arrive on the pipe `fd` until the other end closes."""
    ignore_interrupts()
    deadlines = (signal.SIGPROF, signal.SIGALRM)
    for deadline in deadlines:
        signal.signal(deadline, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, deadlines)
    pipe = Connection(fd)
    try:
        functions, limits = pipe.recv()
        score_one, prepare = pickle.loads(functions)
        if prepare is not None:
            prepare()
        _limit_memory(limits.memory_bytes)
    except BaseException:
        pipe.send((_RAISED, traceback.format_exc()))
        return
    pipe.send((_READY, None))
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            pipe.send(_score_under(limits, score_one, pipe.recv()))


def _score_under(limits: ItemLimits, score_one: ScoreOne, item: Item) -> tuple[str, float | str]:
    """Scores one item with the timers armed; the reply."""
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
    try:
        reward = reward_of(score_one(*item))
        if not math.isfinite(reward):
            raise ValueError(f"the verifier returned {reward}: expected a finite number")
    except MemoryError:
        return _OUT_OF_MEMORY, f"{limits.memory_bytes} bytes"
    except BaseException:  # a verifier's SystemExit is an error of the verifier's, too
        return _RAISED, _shortened(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _SCORED, reward


def _shortened(text: str) -> str:
    """Its beginning and its end, where it is very long."""
    half = LONGEST_REASON // 2
    return text if len(text) <= LONGEST_REASON else f"{text[:half]} … {text[-half:]}"


def _limit_memory(extra_bytes: int | None) -> None:
    """Caps the address space at what it is now plus `extra_bytes`: beyond is a MemoryError."""
    if extra_bytes is None or sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + int(extra_bytes)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _with_news(workers: Sequence[_Worker]) -> list[_Worker]:
    """The workers whose pipe can be read, at least one."""
    readable = set(map(id, wait([worker.pipe for worker in workers])))
    return [worker for worker in workers if id(worker.pipe) in readable]


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _name(index: int, item: Item) -> str:
    problem, response = item
    return f"item {index} (problem {problem.id!r}, response {response[:200]!r})"
