r"""Questions to be answered by yes or no, in `\boxed{}`.

A record has `question` and `answer`: true or false, or yes, no, true or false as text (StrategyQA). Its
`solution`, else its `facts`, else its `decomposition`, text or a list of texts, is the reference
solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreset.tasks.base import Problem
from jaxreset.tasks.boxed import BoxedTask
from jaxreset.tasks.fields import brief, text_of

_MEANING = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_EXPECTED = "true or false, or the text yes, no, true or false"
_SOLUTIONS = ("solution", "facts", "decomposition")


class BooleanTask(BoxedTask):
    r"""A `BoxedTask` whose answer is yes or no; true and false are understood, too."""

    name = "boolean"
    templates = ("solve_boolean.txt", "solve_boolean_chat.txt")

    def read_record(self, record: Mapping[str, Any]) -> Problem:
        """A record as a problem, see the module's docstring; raises `ValueError`."""
        question = text_of(record, "question", "the question's text")
        return Problem("", question, _answer(record), _solution(record))

    def meaning(self, problem: Problem, answer: str) -> str | None:
        """Yes or no, however `answer` says it."""
        return _meaning(answer)


def _answer(record: Mapping[str, Any]) -> str:
    value = record.get("answer")
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    meaning = _meaning(text_of(record, "answer", _EXPECTED))
    if meaning is None:
        raise ValueError(f"field 'answer' is {brief(value)}; expected {_EXPECTED}")
    return meaning


def _meaning(text: str) -> str | None:
    return _MEANING.get(text.strip().rstrip(".!").rstrip().casefold())


def _solution(record: Mapping[str, Any]) -> str:
    for field in _SOLUTIONS:
        value = record.get(field)
        lines = [value] if isinstance(value, str) else value
        if not lines:
            continue
        if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"field {field!r} is {brief(value)}; expected text or a list of texts")
        return "\n".join(lines)
    return ""
