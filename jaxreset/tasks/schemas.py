r"""Schemas: what the fields of a record are called, and where its final answer stands.

A field whose value is null isn't there. The question is the first of these that is:

1. `question`, `Question`: text (GSM8K);
2. `problem`, `Problem`: text (MATH, NuminaMath, AIME, HMMT, OpenMathReasoning);
3. `prompt`: text, or messages of which the user's last is the question (verl, TRL).

The answer is the first of these, and how it is read depends on nothing but its name and the question's:

1. `answer`, `Answer`: beside `question` a solution that ends in `#### 72` or holds `\boxed{72}`, or a bare
   number; beside `problem` and `prompt` it is final as it stands, too;
2. `expected_answer`, `ground_truth`, `reward_model.ground_truth`: final as it stands;
3. `solution`, `Solution`: its last `\boxed{…}`, without which the record is left out, like a proof;
   beside `prompt` it may be one number or one `$formula$`;
4. `completion`: text, or messages of the assistant, read as a solution.

Where an answer is final as it stands, a `\boxed{…}` or a `####` in it is followed all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreset.tasks.answers import final_answer, is_gradable, plain_number
from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import UngradableError, brief, field_at, text_of

Turns = tuple[tuple[str, str], ...]

ROLES = ("system", "user", "assistant")
QUESTIONS = ("question", "Question", "problem", "Problem", "prompt")
_SOLUTIONS = ("solution", "Solution")
_FINAL = ("expected_answer", "ground_truth", "reward_model.ground_truth")
_ANSWERS = ("answer", "Answer", *_FINAL, *_SOLUTIONS, "completion")

_ASKED = "the problem's text (in field 'question', 'problem' or 'prompt')"
_IN_ANSWER = "the final answer: '#### 72' as the last line, or \\boxed{72}"
_IN_FINAL = "the final answer, such as 72"
_IN_SOLUTION = "the final answer in its last \\boxed{...}"
_IN_COMPLETION = "the solution as text, or as one message of the assistant"
_IN_MESSAGES = "a list of messages with 'role' and 'content', the last the user's"
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_FORMULA = re.compile(r"\s*(\$\$?)([^$]*[^$\s][^$]*)\1\s*")


def read_problem(record: Mapping[str, Any]) -> Problem:
    """A record whose answer mathematics can compare, as a `Problem` that has no id yet.

    Raises:
        UngradableError: nothing could equal its answer.
        ValueError: anything else wrong with it; names the field and what was expected.
    """
    asked, question, context = question_of(record)
    field = _first(record, _ANSWERS)
    if field is None:
        field = "reward_model.ground_truth" if "reward_model" in record else "answer"
    expected = _expected(field)
    written = _gold(record, field, expected)
    if isinstance(field_at(record, field), str) and not is_gradable(written):
        raise UngradableError(
            f"field {field!r} is {brief(written)}, which no answer equals; expected {expected}"
        )
    answer = final_answer(_CALCULATOR_MARK.sub("", written))
    if answer is None:
        answer = _as_it_stands(asked, field, written)
    if not answer:
        # A solution without one may be a proof, of which NuminaMath has many.
        kind = UngradableError if field in _SOLUTIONS else ValueError
        raise kind(f"no final answer in field {field!r}, {brief(written)}; expected {expected}")
    if not is_gradable(answer):
        raise UngradableError(
            f"field {field!r} ends in {brief(answer)}, which no answer equals; expected {expected}"
        )
    shown = next((record[f] for f in (*_SOLUTIONS, "generated_solution") if record.get(f)), None)
    solved = field == "completion" or (field.lower() == "answer" and asked.lower() != "problem")
    if shown is None and solved:
        shown = written
    solution = _CALCULATOR_MARK.sub("", shown) if isinstance(shown, str) else ""
    return Problem("", question, answer, solution, context)


def question_of(record: Mapping[str, Any]) -> tuple[str, str, Turns]:
    """The field that asks, its question, and the (role, content) turns before it.

    Raises:
        ValueError: there is none, or it isn't written as it should be; names the field.
    """
    asked = _first(record, QUESTIONS) or "problem"
    value = record.get(asked)
    if asked == "prompt" and not isinstance(value, str):
        *context, (_, question) = turns_of(value, asked, last="user", expected=_IN_MESSAGES)
        return asked, question, tuple(context)
    return asked, text_of(record, asked, _ASKED), ()


def turns_of(messages: Any, field: str, *, last: str, expected: str) -> Turns:
    """Chat messages as (role, content) turns.

    Args:
        messages: what stands in the record.
        field: where.
        last: the role that the last of them must have.
        expected: what a message says that should stand there.

    Raises:
        ValueError: no such messages; names the field.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"field {field!r} is {brief(messages)}; expected {expected}")
    turns = []
    for number, message in enumerate(messages):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"field {place!r} is {brief(message)}; expected a message")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(
                f"field '{place}.role' is {brief(role)}; expected one of {', '.join(ROLES)}"
            )
        named = {f"{place}.{name}": value for name, value in message.items()}
        turns.append((role, text_of(named, f"{place}.content", "the message's text")))
    if turns[-1][0] != last:
        raise ValueError(
            f"field '{field}[{len(turns) - 1}].role' is {turns[-1][0]!r}; expected {expected}"
        )
    return tuple(turns)


def _first(record: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """The first of the fields that the record has."""
    return next((field for field in fields if field_at(record, field) is not None), None)


def _expected(field: str) -> str:
    if field in _FINAL:
        return _IN_FINAL
    return _IN_SOLUTION if field in (*_SOLUTIONS, "completion") else _IN_ANSWER


def _gold(record: Mapping[str, Any], field: str, expected: str) -> str:
    """The text that holds the answer."""
    value = field_at(record, field)
    if value is None:
        return text_of(record, field, expected)  # it raises, and names the fields found
    if field == "completion" and not isinstance(value, str):
        return turns_of(value, field, last="assistant", expected=_IN_COMPLETION)[-1][1]
    return text_of({field: value}, field, expected)


def _as_it_stands(asked: str, field: str, written: str) -> str | None:
    """An answer without a mark, where it may be one."""
    number = plain_number(written) is not None
    if field in _FINAL or (field.lower() == "answer" and (number or asked.lower() != "question")):
        return written.strip()
    if field in _SOLUTIONS and asked == "prompt":
        formula = _FORMULA.fullmatch(written)
        return formula[2].strip() if formula else written.strip() if number else None
    return None
