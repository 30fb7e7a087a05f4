r"""Programming problems, as in LiveCodeBench: a response's program is run on tests.

Programs hold line breaks and blank lines, so steps end with `</thought>` instead, in raw text (as in the
paper) and in a chat. The answer marker is what the fence behind a program writes and the one before it
doesn't: "```" and a line break, for that one goes on with `python`. So a response is over with the step in
which its program has ended, and a program longer than a step's tokens goes on in the next step. A marker at
the program's begin would cut it there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxreset.tasks.base import Item, Problem, Scores
from jaxreset.tasks.programs import records
from jaxreset.tasks.programs.filters import syscall_filter
from jaxreset.tasks.programs.running import ProgramLimits, count_passed, start_launcher
from jaxreset.tasks.programs.verdicts import is_program, last_program
from jaxreset.tasks.templated import TemplatedTask
from jaxreset.tasks.workers import RewardWorkers

# A worker's own time, beside its programs: reading tests, comparing what is printed, starting anew.
_JUDGING_CPU_SECONDS, _JUDGING_WALL_SECONDS = 30.0, 60.0
_LEAST_MEMORY = 2**27


class CodeTask(TemplatedTask):
    """A `TemplatedTask` whose reward is the share of tests that a response's program passes.

    The program is the last fenced block of Python. It runs in a confined process, without files, network
    or other processes, with the standard library alone, and under the limits below. One that meets a limit
    of time fails the tests that are left. What tests expect never comes near it.

    Args:
        processes: how many programs run at once.
        cpu_seconds: CPU time that a program may take for one test; on the clock, four times as much.
        wall_seconds: time on the clock for all tests of a program; default 20 times `cpu_seconds`.
        memory_bytes: address space of a program.
        solve_prompt, localize_prompt, inline_prompt: see `TemplatedTask`.

    Raises:
        FileNotFoundError, ValueError: as `TemplatedTask`; a setting out of range, or a machine that can't
            confine programs.
    """

    name = "code"
    delimiter = "</thought>"
    answer_marker = "```\n"
    failed_below = 1.0
    templates = ("solve_code.txt", "solve_code_chat.txt")

    def __init__(
        self,
        *,
        solve_prompt: str | Path | None = None,
        localize_prompt: str | Path | None = None,
        inline_prompt: str | Path | None = None,
        processes: int = 2,
        cpu_seconds: float = 5.0,
        wall_seconds: float | None = None,
        memory_bytes: int = 2 * 2**30,
    ):
        syscall_filter()  # refuses where there is none
        super().__init__(
            solve_prompt=solve_prompt,
            localize_prompt=localize_prompt,
            inline_prompt=inline_prompt,
        )
        limits = ProgramLimits(
            _positive("cpu_seconds", cpu_seconds),
            _positive("wall_seconds", 20 * cpu_seconds if wall_seconds is None else wall_seconds),
            int(_positive("memory_bytes", memory_bytes)),
        )
        if memory_bytes < _LEAST_MEMORY:
            raise ValueError(
                f"memory_bytes={memory_bytes}: expected at least {_LEAST_MEMORY}, half of which the "
                "interpreter takes"
            )
        self._workers = RewardWorkers(
            functools.partial(score_program, limits),
            processes=processes,
            cpu_seconds=_JUDGING_CPU_SECONDS,
            wall_seconds=limits.wall_seconds + _JUDGING_WALL_SECONDS,
            prepare=functools.partial(start_launcher, limits),
        )

    def read_record(self, record: Mapping[str, Any]) -> Problem:
        """A programming problem; the forms, and what is refused: `programs.records.read_record`."""
        return records.read_record(record)

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs; see `RewardWorkers.score` for its errors."""
        return self._workers.score([(problem, self._plain(text)) for problem, text in items])

    def answer(self, problem: Problem, response: str) -> str | None:
        """The program of a response; None: it has none."""
        return last_program(self._plain(response))

    def reference(self, problem: Problem) -> list[str] | None:
        """The text before the solution's program, by steps or paragraphs, and the program in a block.

        None where there is no program: a solution without a block is one if it is Python.
        """
        before, fence, _ = problem.solution.partition("```")
        program = last_program(self._plain(problem.solution))
        if not fence and is_program(problem.solution):
            before, program = "", f"{problem.solution.strip()}\n"
        if program is None:
            return None
        separator = self.delimiter if self.delimiter in before else "\n\n"
        steps = [step.strip() for step in before.split(separator)]
        return [*(step for step in steps if step), f"```python\n{program}```\n"]

    def _plain(self, response: str) -> str:
        """Without delimiters, which would hide the fence that they stand behind."""
        return response.replace(self.delimiter, "\n") if self.delimiter.strip() else response

    def close(self) -> None:
        """Ends the workers and what they run; a later `score` starts them again."""
        self._workers.close()


def _positive(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive, finite number")
    return value


def score_program(limits: ProgramLimits, problem: Problem, response: str) -> float:
    """The share of tests that a response's program passes. Runs in a reward worker."""
    program = last_program(response)
    if program is None:
        return 0.0
    cases = records.unpacked(problem.extra["tests"])
    return count_passed(limits, program, cases, problem.extra["function"]) / len(cases)
