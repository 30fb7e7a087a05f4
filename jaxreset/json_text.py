"""JSON that every reader takes: what a float can hold and JSON can't is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, with null in place of NaN and the infinities.

    >>> dumps({"loss": math.nan, "norms": [1.0, math.inf]})
    '{"loss": null, "norms": [1.0, null]}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """`json.loads`; NaN and the infinities, which files of older versions hold, are read as None."""
    return json.loads(text, parse_constant=lambda _: None)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return value
