r"""Programming problems, as in LiveCodeBench: a response's program is run on tests.

Programs hold line breaks and blank lines, so steps end with `</thought>` instead, in raw text (as in the
paper) and in a chat. The answer marker is what the fence behind a program writes and the one before it
doesn't: "```" and a line break, for that one goes on with `python`. So a response is over with the step in
which its program has ended, and a program longer than a step's tokens goes on in the next step. A marker at
the program's begin would cut it there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxreset.tasks.base import Item, Problem, Scores, Task
from jaxreset.tasks.localization import ask_for_step
from jaxreset.tasks.programs import records
from jaxreset.tasks.programs.filters import syscall_filter
from jaxreset.tasks.programs.running import ProgramLimits, count_passed, start_launcher
from jaxreset.tasks.programs.verdicts import last_program
from jaxreset.tasks.templates import fill, spoken, template
from jaxreset.tasks.workers import RewardWorkers

# A worker's own time, beside its programs: reading tests, comparing what is printed, starting anew.
_JUDGING_CPU_SECONDS, _JUDGING_WALL_SECONDS = 30.0, 60.0
_LEAST_MEMORY = 2**27


class CodeTask(Task):
    """A `Task` whose reward is the share of tests that a response's program passes.

    The program is the last fenced block of Python. It runs in a confined process, without files, network
    or other processes, with the standard library alone, and under the limits below. One that meets a limit
    of time fails the tests that are left. What tests expect never comes near it.

    Args:
        solve_prompt: a text with `{problem}` in it, or a file with one, to use instead of the shipped
            `code_solve_chat.txt`, a user's message, and `code_solve.txt`, raw text.
        localize_prompt, inline_prompt: as `MathTask`'s.
        processes: how many programs run at once.
        cpu_seconds: CPU time that a program may take for one test; on the clock, four times as much.
        wall_seconds: time on the clock for all tests of a program; default 20 times `cpu_seconds`.
        memory_bytes: address space of a program.

    Raises:
        FileNotFoundError: naming a template that isn't there.
        ValueError: naming a template and the placeholders it lacks, a setting out of range, or a machine
            that can't confine programs.
    """

    name = "code"
    delimiter = "</thought>"
    answer_marker = "```\n"
    failed_below = 1.0

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
        self._raw, self._chat = (
            template("solve_prompt", solve_prompt, ours, ("problem",))
            for ours in ("code_solve.txt", "code_solve_chat.txt")
        )
        places = ("problem", "steps", "count")
        self._localize = template("localize_prompt", localize_prompt, "localize.txt", places)
        self._inline = template("inline_prompt", inline_prompt, "localize_inline.txt", ("count",))
        if wall_seconds is None:
            wall_seconds = 20.0 * cpu_seconds
        limits = ProgramLimits(cpu_seconds, wall_seconds, memory_bytes)
        for name, value in limits._asdict().items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected a positive, finite number")
        if memory_bytes < _LEAST_MEMORY:
            raise ValueError(
                f"memory_bytes={memory_bytes}: expected at least {_LEAST_MEMORY}, half of which the "
                "interpreter takes"
            )
        self._workers = RewardWorkers(
            functools.partial(score_program, limits),
            processes=processes,
            cpu_seconds=_JUDGING_CPU_SECONDS,
            wall_seconds=wall_seconds + _JUDGING_WALL_SECONDS,
            prepare=functools.partial(start_launcher, limits),
        )

    def prompt(self, problem: Problem) -> str:
        """The text that the policy continues, one step at a time."""
        return self._filled(self._raw, problem)

    def message(self, problem: Problem) -> str:
        """The user's message that the policy answers, where there is a chat template."""
        return self._filled(self._chat, problem)

    def _filled(self, text: str, problem: Problem) -> str:
        return fill(text, {"problem": problem.question, "delimiter": spoken(self.delimiter)})

    def read_record(self, record: Mapping[str, Any]) -> Problem:
        """A programming problem; the forms, and what is refused: `programs.records.read_record`."""
        return records.read_record(record)

    def localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The question which of `steps` is the first wrong one; as `MathTask`'s."""
        return ask_for_step(self._localize, problem, steps, self.delimiter)

    def inline_localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The same question behind the failed response, which shows problem and steps already."""
        return fill(self._inline, {"count": str(len(steps)), "delimiter": spoken(self.delimiter)})

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs; see `RewardWorkers.score` for its errors."""
        return self._workers.score([(problem, self._plain(text)) for problem, text in items])

    def _plain(self, response: str) -> str:
        """Without delimiters, which would hide the fence that they stand behind."""
        return response.replace(self.delimiter, "\n") if self.delimiter.strip() else response

    def answer(self, problem: Problem, response: str) -> str | None:
        """The program of a response; None: it has none."""
        return last_program(self._plain(response))

    def close(self) -> None:
        """Ends the workers and what they run; a later `score` starts them again."""
        self._workers.close()


def score_program(limits: ProgramLimits, problem: Problem, response: str) -> float:
    """The share of tests that a response's program passes. Runs in a reward worker."""
    program = last_program(response)
    if program is None:
        return 0.0
    cases = records.unpacked(problem.extra["tests"])
    return count_passed(limits, program, cases, problem.extra["function"]) / len(cases)
