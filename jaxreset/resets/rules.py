"""Reset rules: before which step of a failed rollout to go back.

A rule is a function of failed rollouts that returns one step h (1-based) for each: the reset keeps
steps 1 to h - 1. To add a rule, write such a function and add it to `RULES`. A rule that wants to
ask the policy calls `ask`, which puts the localisation question for each failure and returns the
answers; it needs no sampler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxreset.tasks.base import Problem, Task


@dataclass(frozen=True)
class Failure:
    """A failed rollout of at least one step, as a reset rule sees it.

    Attributes:
      task: that the problem is of.
      problem: what was to be solved.
      steps: the texts of its steps, kept ones first, delimiters stripped.
      seed: names this rollout's random numbers: (seed, step, phase, prompt, row).
    """

    task: Task
    problem: Problem
    steps: list[str]
    seed: tuple[int, ...]

    def rng(self) -> np.random.Generator:
        """A generator of its own, independent of the batch."""
        return np.random.default_rng(self.seed)


Ask = Callable[[Sequence[Failure]], list[str]]
ResetRule = Callable[[Sequence[Failure], Ask], list[int]]


def random_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """Uniform over the rollout's steps (RRPO, arXiv 2605.25507)."""
    return [int(f.rng().integers(1, len(f.steps), endpoint=True)) for f in failures]


def early_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """Uniform over the first half of the steps, rounded up: the control for "earlier is easier"."""
    return [int(f.rng().integers(1, (len(f.steps) + 1) // 2, endpoint=True)) for f in failures]


def blamed_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """The step that the policy itself names as its first wrong one (SRPO, arXiv 2605.25507)."""
    answers = ask(failures)
    return [parse_answer(a, len(f.steps)).step for a, f in zip(answers, failures, strict=True)]


def oracle_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """The true first wrong step, as the task says it.

    Raises:
      ValueError: the task can't tell.
    """
    steps = [f.task.first_wrong_step(f.problem, f.steps) for f in failures]
    for failure, step in zip(failures, steps, strict=True):
        if step is None:
            raise ValueError(
                f"reset.rule=oracle: the task {failure.task.name!r} can't tell the first wrong step; "
                "use a task that can (chain), or another rule"
            )
    return [step for step in steps if step is not None]


def no_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """Keeps nothing: the control that only draws again and normalises apart ("fresh")."""
    return [1] * len(failures)


RuleName = Literal["random", "self", "early", "oracle", "fresh"]

RULES: dict[RuleName, ResetRule] = {
    "random": random_step,
    "self": blamed_step,
    "early": early_step,
    "oracle": oracle_step,
    "fresh": no_step,
}


class Answer(NamedTuple):
    """A parsed localisation: the step, and how it was found."""

    step: int
    source: Literal["boxed", "mention", "default"]


def parse_answer(text: str, steps: int) -> Answer:
    """Reads a localisation (arXiv 2605.25507, appendix D).

    The last `\\boxed{...}` if it holds an integer from 1 to `steps`; else the last "Step N" if in that
    range; else step 1.

    >>> parse_answer("Step 2 is fine. \\\\boxed{3}", 4)
    Answer(step=3, source='boxed')
    """
    _, box, inside = text.rpartition("\\boxed{")
    boxed = re.match(r"\s*(\d+)\s*\}", inside) if box else None
    if boxed and (step := _step_in_range(boxed[1], steps)):
        return Answer(step, "boxed")
    mentions = re.findall(r"\bstep\s+(\d+)", text, re.IGNORECASE)
    if mentions and (step := _step_in_range(mentions[-1], steps)):
        return Answer(step, "mention")
    return Answer(1, "default")


def _step_in_range(digits: str, steps: int) -> int | None:
    """The step, or None outside 1 to `steps`; never converts more digits than `steps` has."""
    digits = digits.lstrip("0")
    if not digits or len(digits) > len(str(steps)) or int(digits) > steps:
        return None
    return int(digits)
