"""Which problems a run has: a hash of what they say, so that a run goes on with the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreset.tasks.base import Problem

DIGITS = 16


class Portion(NamedTuple):
    """Problems of one file that are trained on, or held out.

    Attributes:
        key: of the config that names them.
        path: where they were read.
        problems: how many.
        fingerprint: of what they say, in their order; not of how the file writes it.
        weight: among the files that are trained on; None: held out, or all there is.
        records: how many were read for them.
    """

    key: str
    path: str
    problems: int
    fingerprint: str
    weight: float | None = None
    records: int | None = None


def fingerprint(problems: Iterable[Problem]) -> str:
    """Of all that is asked, compared and shown; ids, which name the file, are no part of it."""
    hashed = hashlib.sha256()
    for p in problems:
        content = (p.question, p.answer, p.solution, p.context, p.extra)
        hashed.update(json.dumps(_plain(content), sort_keys=True).encode() + b"\n")
    return hashed.hexdigest()[:DIGITS]


def hashed_values(values: Mapping[str, Any]) -> str:
    """A fingerprint of parameters."""
    return hashlib.sha256(json.dumps(_plain(values), sort_keys=True).encode()).hexdigest()[:DIGITS]


def differences(
    before: Sequence[Portion],
    now: Sequence[Portion],
    *,
    words: tuple[str, str] = ("there", "now"),
) -> list[str]:
    """What is another in `now`, one text for each portion; empty: it is the same data."""
    old, new = ({p.key: p for p in portions} for portions in (before, now))
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        one, other = _said(old.get(key)), _said(new.get(key))
        if one != other:
            found.append(f"{key}: {one} {words[0]}, {other} {words[1]}")
    return found


def _said(portion: Portion | None) -> str:
    if portion is None:
        return "nothing"
    weight = "" if portion.weight is None else f", weight {portion.weight:g}"
    return f"{portion.problems:,} problems ({portion.fingerprint}{weight})"


def _plain(value: Any) -> Any:
    """A value as JSON writes it, the same in every process."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(inside) for inside in value), key=repr)
    kind = type(value)
    # What has no text of its own shows where it lies in memory.
    own = kind.__repr__ is not object.__repr__
    return [kind.__qualname__, repr(value)] if own else kind.__qualname__
