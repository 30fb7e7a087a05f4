r"""Mathematics: word problems and competition problems whose final answer can be compared.

Its prompts are template files, see `templates`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from jaxreset.tasks.answers import final_answer, prepare_verifier, same_answer, unboxed
from jaxreset.tasks.base import Item, Problem, Scores, Task
from jaxreset.tasks.localization import ask_for_step
from jaxreset.tasks.templates import fill, spoken, template
from jaxreset.tasks.workers import RewardWorkers

_SOLVE_FIELDS = ("problem",)
_LOCALIZE_FIELDS = ("problem", "steps", "count")
_INLINE_FIELDS = ("count",)
_HASHES = re.compile(r"####[^\n]*\s*\Z")  # GSM8K's last line


class MathTask(Task):
    r"""A `Task` whose steps are lines, unless told otherwise, and whose answer stands in `\boxed{}`.

    A reward is 1.0 (the problem's answer) or 0.0, so an attempt below 0.5 has failed. The task
    can't tell the true first wrong step.

    Args:
        solve_prompt: a text with `{problem}` in it, or a file with one, to use instead of the shipped
            `solve_chat.txt`, a user's message, and `solve.txt`, raw text.
        localize_prompt: the same instead of `localize.txt`; must contain `{problem}`, `{steps}` and
            `{count}`.
        inline_prompt: the same instead of `localize_inline.txt`; must contain `{count}`.
        processes: how many reward workers compare answers.
        cpu_seconds: CPU time that one comparison may take, else it scores 0.

    Raises:
        FileNotFoundError: naming a template that isn't there.
        ValueError: naming a template and the placeholders it lacks.
    """

    name = "math"
    delimiter = "\n"
    answer_marker = r"\boxed{"

    def __init__(
        self,
        *,
        solve_prompt: str | Path | None = None,
        localize_prompt: str | Path | None = None,
        inline_prompt: str | Path | None = None,
        processes: int = 2,
        cpu_seconds: float = 5.0,
    ):
        self._raw, self._chat = (
            template("solve_prompt", solve_prompt, ours, _SOLVE_FIELDS)
            for ours in ("solve.txt", "solve_chat.txt")
        )
        self._localize = template(
            "localize_prompt", localize_prompt, "localize.txt", _LOCALIZE_FIELDS
        )
        self._inline = template(
            "inline_prompt", inline_prompt, "localize_inline.txt", _INLINE_FIELDS
        )
        self._workers = RewardWorkers(
            score_answer, processes=processes, cpu_seconds=cpu_seconds, prepare=prepare_verifier
        )

    def prompt(self, problem: Problem) -> str:
        """The text that the policy continues, one step at a time."""
        return self._filled(self._raw, problem)

    def message(self, problem: Problem) -> str:
        """The user's message that the policy answers, where there is a chat template."""
        return self._filled(self._chat, problem)

    def _filled(self, text: str, problem: Problem) -> str:
        return fill(text, {"problem": problem.question, "delimiter": spoken(self.delimiter)})

    def localization(self, problem: Problem, steps: Sequence[str]) -> str:
        r"""The question which of `steps` is the first wrong one, to be answered by one `\boxed{N}`.

        Args:
            problem: the problem; its answer is not shown.
            steps: the failed response's steps, with or without the delimiter that ends them; at
                least one.

        Raises:
            ValueError: without a step.
        """
        return ask_for_step(self._localize, problem, steps, self.delimiter)

    def inline_localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The same question behind the failed response, which shows problem and steps already."""
        return fill(self._inline, {"count": str(len(steps)), "delimiter": spoken(self.delimiter)})

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs; see `RewardWorkers.score` for its errors."""
        # A delimiter right behind an unboxed answer is no part of it.
        return self._workers.score([(p, text.replace(self.delimiter, "\n")) for p, text in items])

    def reference(self, problem: Problem) -> list[str] | None:
        r"""The steps of the data's solution, their boxes opened, and one with the boxed answer alone.

        None where the data has no more than the answer, or no box can hold it. A step with the answer
        marker in it is left out: there a response would end.
        """
        answer = " ".join(problem.answer.split())
        text = unboxed(_HASHES.sub("", problem.solution))
        steps = super().reference(dataclasses.replace(problem, solution=text)) or []
        steps = [step for step in steps if self.answer_marker not in step]
        last = rf"\boxed{{{answer}}}"
        if not steps or steps == [problem.answer.strip()] or final_answer(last) != answer:
            return None
        return [*steps, last if self.answer_marker in last else f"{self.answer_marker} {last}"]

    def close(self) -> None:
        """Ends the reward workers; a later `score` starts them again."""
        self._workers.close()


def score_answer(problem: Problem, response: str) -> float:
    """The reward of one response, 1.0 or 0.0. Runs in a reward worker: its time is unbounded."""
    return float(same_answer(response, problem.answer))
