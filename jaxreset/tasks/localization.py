"""The question which step of a failed response is the first wrong one, and how its answer is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxreset.tasks.templates import fill, spoken

if TYPE_CHECKING:  # a task asks by this module
    from jaxreset.tasks.base import Problem


def ask_for_step(template: str, problem: Problem, steps: Sequence[str], delimiter: str) -> str:
    """A localisation question in a template with `{problem}`, `{steps}` and `{count}`.

    Raises:
        ValueError: without a step.
    """
    if not steps:
        raise ValueError(f"problem {problem.id!r}: steps is empty; expected at least one")
    numbered = (
        f"Step {number}: {step.strip().removesuffix(delimiter.strip()).strip() or '(empty)'}"
        for number, step in enumerate(steps, start=1)
    )
    values = {
        "problem": problem.question,
        "steps": "\n\n".join(numbered),
        "count": str(len(steps)),
    }
    return fill(template, values | {"delimiter": spoken(delimiter)})


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
