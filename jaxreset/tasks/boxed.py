r"""Tasks whose answer is one of a few, written in `\boxed{}`: read in linear time, so without workers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxreset.tasks.answers import last_boxed, unboxed
from jaxreset.tasks.base import Item, Problem, Scores, Task
from jaxreset.tasks.templated import TemplatedTask

# What may stand around an answer and is no part of it: a font, math mode, braces.
_WRAPPED = re.compile(
    r"(?:\\(?:text|textbf|textrm|textit|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|operatorname)\s*)?"
    r"\{(?P<braces>.*)\}|\${1,2}(?P<dollars>[^$]*)\${1,2}|\\\((?P<parens>.*)\\\)",
    re.DOTALL,
)
_LAYERS = 4  # of that; what is wrapped deeper is no answer that anybody means


class BoxedTask(TemplatedTask):
    r"""A `Task` whose steps are lines, unless told otherwise, and whose answer stands in the last box.

    A reward is 1.0 (the problem's answer) or 0.0. The task can't tell the true first wrong step.
    """

    delimiter = "\n"
    answer_marker = r"\boxed{"

    def meaning(self, problem: Problem, answer: str) -> str | None:
        """What the contents of a box say, as the problem's answer would say it, in time linear in their
        length; None: nothing that could be the answer."""
        raise NotImplementedError

    def answer(self, problem: Problem, response: str) -> str | None:
        """What the last box of a response says; see `Task.answer`."""
        box = last_boxed(response.replace(self.delimiter, "\n"))
        return None if box is None else self.meaning(problem, unwrapped(box))

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs, in their order."""
        right = [self.answer(problem, text) == problem.answer for problem, text in items]
        return Scores(np.array(right, np.float64), ())

    def reference(self, problem: Problem) -> list[str] | None:
        """The steps of the reference solution, and the boxed answer as the last."""
        return boxed_reference(self, problem, problem.solution)


def boxed_reference(task: Task, problem: Problem, solution: str) -> list[str] | None:
    r"""The steps of a solution, their boxes opened, and one with the problem's answer in `\boxed{}` alone.

    A step with the answer marker in it is left out: there a response would end. None where there is no
    more than the answer, or no box can hold it.
    """
    answer = " ".join(problem.answer.split())
    steps = Task.reference(task, dataclasses.replace(problem, solution=unboxed(solution))) or []
    steps = [step for step in steps if task.answer_marker not in step]
    last = rf"\boxed{{{answer}}}"
    if not steps or steps == [problem.answer.strip()] or last_boxed(last) != answer:
        return None
    return [*steps, last if task.answer_marker in last else f"{task.answer_marker} {last}"]


def unwrapped(answer: str) -> str:
    r"""An answer without fonts, dollars and braces around it; linear in its length.

    >>> unwrapped(r"$\text{ (B) }$")
    '(B)'
    """
    answer = answer.strip()
    for _ in range(_LAYERS):
        found = _WRAPPED.fullmatch(answer)
        if found is None:
            break
        answer = next(inside for inside in found.groups() if inside is not None).strip()
    return answer
