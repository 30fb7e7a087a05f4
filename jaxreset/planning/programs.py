"""What a compiler says of a program: bytes, collectives, seconds, or its refusal."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.stages import Compiled

from jaxreset.parallel.collectives import Collective, collectives
from jaxreset.parallel.topology import is_refusal, refusal
from jaxreset.planning.ahead import Call, device_bytes_of

Say = Callable[[str], None]


class Traffic(NamedTuple):
    """Collectives of one kind in a program.

    Attributes:
      kind: of `collectives.KINDS`.
      looping: of the decoding loop, so for each token; else of one run of the program.
      times, bytes: how many, and of their results, with the trips of the layers' loops.
      largest, shape: bytes and shape of the largest result.
    """

    kind: str
    looping: bool
    times: int
    bytes: int
    largest: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A compiled program; bytes are on one device.

    Attributes:
      name, sizes: which, and of what sizes.
      seconds: that compiling took.
      arguments, result, temporary: bytes; the result without what takes an argument's place.
      refused: the compiler's words, where it refused it for its memory: then the last are unknown, and
        `temporary` is what the compiler says that it needs in all.
      traffic: what it sends between devices; None where the compiler's text can't be read.
    """

    name: str
    sizes: tuple[int, ...]
    seconds: float
    arguments: int = 0
    result: int = 0
    temporary: int = 0
    refused: str | None = None
    traffic: tuple[Traffic, ...] | None = ()


def compile_program(name: str, sizes: tuple[int, ...], call: Call, say: Say) -> Program:
    """The program's numbers, or the compiler's refusal."""
    say(f"compiling {name} {tuple(sizes) or ''}".rstrip())
    start, arguments = time.perf_counter(), device_bytes_of(call.args)
    try:
        program = call.lower().compile()
    except Exception as error:
        if not is_refusal(error):
            raise
        needs = refusal(error)[0] or 0
        return Program(
            name,
            tuple(sizes),
            time.perf_counter() - start,
            arguments=arguments,
            temporary=max(needs - arguments, 0),
            refused=str(error).splitlines()[0],
        )
    seconds = time.perf_counter() - start
    return Program(name, tuple(sizes), seconds, *_memory(program), traffic=_traffic(program))


def _memory(program: Compiled) -> tuple[int, int, int]:
    """Arguments, results that take no argument's place, temporaries."""
    m = program.memory_analysis()
    assert m is not None  # CPU and TPU have one
    result = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes, max(result, 0), m.temp_size_in_bytes


def _traffic(program: Compiled) -> tuple[Traffic, ...] | None:
    found: defaultdict[tuple[str, bool], list[Collective]] = defaultdict(list)
    try:
        text = program.as_text() or ""
    except jax.errors.JaxRuntimeError:  # of a compiler newer than jax, some instructions
        return None
    for one in collectives(text):
        found[one.kind, one.looping].append(one)
    traffic = []
    for (kind, looping), all_of in sorted(found.items()):
        largest = max(all_of, key=lambda one: one.bytes)
        traffic.append(
            Traffic(
                kind,
                looping,
                sum(one.times for one in all_of),
                sum(one.times * one.bytes for one in all_of),
                largest.bytes,
                largest.shapes[0] if largest.shapes else (),
            )
        )
    return tuple(traffic)
