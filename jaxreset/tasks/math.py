r"""Mathematics: word problems and competition problems whose final answer can be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jaxreset.tasks.answers import final_answer, prepare_verifier, same_answer
from jaxreset.tasks.answers.normal import normal_form
from jaxreset.tasks.base import ANSWERED_WITHIN, Item, Problem, Scores
from jaxreset.tasks.boxed import boxed_reference
from jaxreset.tasks.templated import TemplatedTask
from jaxreset.tasks.workers import RewardWorkers

_HASHES = re.compile(r"####[^\n]*\s*\Z")  # GSM8K's last line


class MathTask(TemplatedTask):
    r"""A `Task` whose steps are lines, unless told otherwise, and whose answer stands in `\boxed{}`.

    A reward is 1.0 (the problem's answer) or 0.0, so an attempt below 0.5 has failed. The task
    can't tell the true first wrong step.

    Args:
        solve_prompt, localize_prompt, inline_prompt: see `TemplatedTask`, and for what it raises.
        processes: how many reward workers compare answers.
        cpu_seconds: CPU time that one comparison may take, else it scores 0.
    """

    name = "math"
    delimiter = "\n"
    answer_marker = r"\boxed{"
    templates = ("solve.txt", "solve_chat.txt")

    def __init__(
        self,
        *,
        solve_prompt: str | Path | None = None,
        localize_prompt: str | Path | None = None,
        inline_prompt: str | Path | None = None,
        processes: int = 2,
        cpu_seconds: float = 5.0,
    ):
        super().__init__(
            solve_prompt=solve_prompt, localize_prompt=localize_prompt, inline_prompt=inline_prompt
        )
        self._workers = RewardWorkers(
            score_answer, processes=processes, cpu_seconds=cpu_seconds, prepare=prepare_verifier
        )

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs; see `RewardWorkers.score` for its errors."""
        # A delimiter right behind an unboxed answer is no part of it.
        return self._workers.score([(p, text.replace(self.delimiter, "\n")) for p, text in items])

    def answer(self, problem: Problem, response: str) -> str | None:
        """The final answer in its normal form; see `Task.answer`."""
        found = final_answer(response[-ANSWERED_WITHIN:].replace(self.delimiter, "\n"))
        return normal_form(found) or None if found else None

    def reference(self, problem: Problem) -> list[str] | None:
        """The steps of the data's solution, and one with the boxed answer alone; see `boxed_reference`."""
        return boxed_reference(self, problem, _HASHES.sub("", problem.solution))

    def close(self) -> None:
        """Ends the reward workers; a later `score` starts them again."""
        self._workers.close()


def score_answer(problem: Problem, response: str) -> float:
    """The reward of one response, 1.0 or 0.0. Runs in a reward worker: its time is unbounded."""
    return float(same_answer(response, problem.answer))
