"""Fields of a record: texts, and numbers written out as they were meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

LONGEST_NUMBER = 1000  # digits before the point, or behind it
# Fields with what a response is compared with: NaN there is an answer that is missing.
_GOLDS = ("answer", "solution", "expected_answer", "ground_truth", "completion")


class UngradableError(ValueError):
    """A record whose answer can't be compared with anything."""


def text_of(record: Mapping[str, Any], field: str, expected: str) -> str:
    """The text of a field; numbers are accepted as they would be written.

    Raises:
        UngradableError: for NaN and infinity.
        ValueError: for anything else that is no text and no number.
    """
    value = record.get(field)
    if value is None:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(f"missing field {field!r}; expected {expected}; fields found: {found}")
    if (number := written_out(value)) is not None:
        if not number:
            leaf = field.rpartition(".")[2].lower()
            kind = UngradableError if leaf in _GOLDS else ValueError
            raise kind(f"field {field!r} is {brief(value)}; expected {expected}")
        value = number
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} is {brief(value)}; expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        odd = value[error.start]
        raise ValueError(
            f"field {field!r} holds half a character, \\u{ord(odd):04x}, at position "
            f"{error.start} (a surrogate without its other half); expected Unicode text"
        ) from error
    return value


def field_at(record: Mapping[str, Any], path: str, otherwise: Any = None) -> Any:
    """The field that a dotted path leads to, through objects inside objects; or `otherwise`.

    >>> field_at({"reward": {"target": "4"}}, "reward.target"), field_at({}, "reward.target", "none")
    ('4', 'none')
    """
    if path in record:  # a name may hold a dot itself
        return record[path]
    name, dot, rest = path.partition(".")
    inner = record.get(name)
    return field_at(inner, rest, otherwise) if dot and isinstance(inner, Mapping) else otherwise


def names_of(record: Mapping[str, Any]) -> str:
    """The paths of a record's fields, as a message shows them.

    >>> names_of({"question": "?", "reward": {"target": "4"}})
    'question, reward.target'
    """
    return ", ".join(sorted(_paths(record))) or "none"


def _paths(record: Mapping[str, Any]) -> list[str]:
    paths = []
    for name, value in record.items():
        inside = _paths(value) if isinstance(value, Mapping) else []
        paths += [f"{name}.{path}" for path in inside] or [str(name)]
    return paths


def written_out(value: object) -> str | None:
    """A number in plain digits, "" where it has none (NaN), or None for what is no number.

    Of a binary float the shortest decimal that is rounded to it in its own precision. A double that
    is a float32 to the last bit, 0.10000000149011612, was one: 0.1.
    """
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return ""
        # str rounds to the scalar's own type, and numpy's float64 is a float.
        value = Decimal(str(float(value) if isinstance(value, np.float64) else value))
    if not isinstance(value, Decimal):
        return None
    if not value.is_finite() or not -LONGEST_NUMBER < value.adjusted() < LONGEST_NUMBER:
        return ""
    double = float(value)
    single = np.float32(double) if abs(double) < np.finfo(np.float32).max else np.float32(0)
    # Exact expansions are kept: 2^-15 is a float32, too, and means what it says.
    is_single = float(single) == double and double % 1 != 0 and Decimal(double) != value
    if is_single and len(value.as_tuple().digits) > 10:
        value = Decimal(str(single))
    return f"{value:f}"


def brief(value: object) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:38]} … {shown[-38:]}"
