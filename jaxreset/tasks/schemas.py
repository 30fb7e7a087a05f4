"""Schemas: what the fields of a record are called, and where its final answer stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxreset.tasks.answers import final_answer, is_gradable, plain_number
from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import UngradableError, brief, text_of

_IN_ANSWER = "the final answer: '#### 72' as the last line, or \\boxed{72}"
_IN_SOLUTION = "the final answer in its last \\boxed{...}"
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def read_problem(record: Mapping[str, Any]) -> Problem:
    """A record whose answer mathematics can compare, as a `Problem` that has no id yet.

    Raises:
        UngradableError: nothing could equal its answer.
        ValueError: anything else wrong with it; names the field and what was expected.
    """
    asked = "question" if record.get("question") is not None else "problem"
    question = text_of(record, asked, "the problem's text (in field 'question' or 'problem')")
    solved = record.get("answer") is None and record.get("solution") is not None
    field, expected = ("solution", _IN_SOLUTION) if solved else ("answer", _IN_ANSWER)
    written = text_of(record, field, expected)
    if isinstance(record[field], str) and not is_gradable(written):
        raise UngradableError(
            f"field {field!r} is {brief(written)}, which no answer equals; expected {expected}"
        )
    answer = final_answer(_CALCULATOR_MARK.sub("", written))
    # A NuminaMath answer is final as it stands; GSM8K's is a solution, unless it is just a number.
    is_final = asked == "problem" or plain_number(written) is not None
    if answer is None and is_final and not solved:
        answer = written.strip()
    if not answer:
        raise ValueError(
            f"no final answer in field {field!r}, {brief(written)}; expected {expected}"
        )
    if not is_gradable(answer):
        raise UngradableError(
            f"field {field!r} ends in {brief(answer)}, which no answer equals; expected {expected}"
        )
    shown = record.get("solution") or (written if asked == "question" else "")
    solution = _CALCULATOR_MARK.sub("", shown) if isinstance(shown, str) else ""
    return Problem("", question, answer, solution)
