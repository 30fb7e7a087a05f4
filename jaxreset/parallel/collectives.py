"""What a compiled program sends between devices, read from its text.

Counts say little: a loop's body stands in the text once, and one gather may hold a number or all weights.
So each collective is told by its result's bytes, and by the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
SCATTER = (
    "all-reduce-scatter"  # a TPU's reduce-scatter: a computation of this name, with an all-reduce
)
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*-> (?P<result>.*) \{")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>\S+) = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\("
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|async_computation|true_computation|false_computation)=%?([\w.\-]+)"
)
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"%(\S+) = [su]32\[\].* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%\S+, %([\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      shapes: of its result's arrays, on one device.
      bytes: of them.
      times: how often it runs: the trips of the loops around it, as far as they are known.
      looping: it is inside a loop that goes on until its data ends it; `times` is for one turn.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    looping: bool


class _Computation(NamedTuple):
    result: str  # type
    lines: list[str]


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, those of each loop's body once.

    Args:
      text: of `jax.stages.Compiled.as_text()`; after partitioning, so shapes are those of one device.
    """
    entry, computations = _computations(text)
    found: list[Collective] = []
    channels = set()
    seen = set()
    waiting = [(entry, 1, False)]
    while waiting:
        here = waiting.pop()
        name, times, looping = here
        if here in seen or name not in computations:
            continue
        seen.add(here)
        for line in computations[name].lines:
            if not (match := _INSTRUCTION.match(line)):
                continue
            op, result = match["op"], match["type"]
            if op == "while":
                trips = _trips(line, computations)
                body = re.findall(r"\bbody=%?([\w.\-]+)", line)
                waiting += [(b, times * (trips or 1), looping or not trips) for b in body]
                continue
            waiting += [(called, times, looping) for called in _called(line)]
            if (kind := op.removesuffix("-start")) not in KINDS:
                continue
            # A TPU spreads one over several fusions, between which others run.
            if (channel := _CHANNEL.search(line)) and channel[1] in channels:
                continue
            channels.add(channel[1] if channel else None)
            if name.startswith(SCATTER):
                kind, result = "reduce-scatter", computations[name].result
            arrays = _arrays(result)
            if op.endswith("-start") and kind != "all-reduce":  # (operands, results, contexts)
                arrays = [a for a in arrays if a[0] or a[1] > 4]
                arrays = arrays[len(arrays) // 2 :]
            shapes, sizes = zip(*arrays, strict=True) if arrays else ((), ())
            found.append(Collective(kind, shapes, sum(sizes), times, looping))
    return found


def _computations(text: str) -> tuple[str, dict[str, _Computation]]:
    """The entry's name, and all computations."""
    entry, name, found = "", "", dict[str, _Computation]()
    for line in text.splitlines():
        if line.startswith(" "):
            if name:
                found[name].lines.append(line)
        elif match := _COMPUTATION.match(line):
            name = match["name"]
            found[name] = _Computation(match["result"], [])
            entry = name if match["entry"] else entry
    return entry, found


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for listed in _LISTED.findall(line):
        yield from (name.strip().lstrip("%") for name in listed.split(","))


def _trips(line: str, computations: dict[str, _Computation]) -> int | None:
    """How often a loop's body runs, where that is known: said, or counted up to a constant."""
    if said := _TRIPS.search(line):
        return int(said[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    lines = computations[condition[1]].lines if condition else []
    bounds = {b[1]: int(b[2]) for b in map(_BOUND.search, lines) if b}
    for below in filter(None, map(_BELOW.search, lines)):
        if below[1] in bounds:
            return bounds[below[1]]
    return None


def _arrays(text: str) -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes of a type's arrays."""
    arrays = []
    for dtype, dims in _ARRAY.findall(text):
        shape = tuple(int(n) for n in dims.split(",") if n)
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        arrays.append((shape, math.prod(shape) * bits // 8))
    return arrays
