"""Fields of a record: texts, and numbers written out as they were meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

LONGEST_NUMBER = 1000  # digits before the point, or behind it


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
            kind = UngradableError if field in ("answer", "solution") else ValueError
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
