"""Which rounds hold keys and values while a step is sampled, and what they take together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jaxreset.config import Config
from jaxreset.planning.shapes import RunShapes
from jaxreset.sampling.memory import RoundMemory
from jaxreset.sampling.rounds import Shape


def asked(config: Config, shapes: RunShapes) -> Shape | None:
    """The round in which the localiser answers, where it generates."""
    return None if config.reset.localizer.mode == "score" else shapes.localize


def rounds(config: Config, shapes: RunShapes) -> dict[Shape, str]:
    """The rounds of a step and of an evaluation, by their shapes."""
    named = dict.fromkeys(shapes.base, "sample")
    named |= {child: "resume" for _, child in shapes.forks}
    if (answers := asked(config, shapes)) is not None:
        named.setdefault(answers, "localize")
    named.setdefault(shapes.evaluate, "evaluate")
    return named


def cuts(memory: RoundMemory, config: Config, shapes: RunShapes) -> dict[str, int]:
    """Into how many parts the groups of a round are cut, of those whose are: each has the whole prefix."""
    parts = {
        name: shape.rows // memory.part(shape).rows
        for shape, name in rounds(config, shapes).items()
    }
    return {name: count for name, count in parts.items() if count > 1}


def held(memory: RoundMemory, shapes: RunShapes) -> list[Shape]:
    """Rounds that keep their caches for resets."""
    parents = dict.fromkeys(parent for parent, _ in shapes.forks)
    return [parent for parent in parents if memory.holds(parent)]


def most_bytes(memory: RoundMemory, config: Config, shapes: RunShapes) -> int:
    """Bytes on a device when the rounds that are held and the one that is drawn take most."""
    return max(_moments(memory, config, shapes))


def _moments(memory: RoundMemory, config: Config, shapes: RunShapes) -> Iterator[int]:
    """Bytes while each round is drawn; what it goes back to is let go when its prefixes are gathered."""
    before = 0
    for shape in shapes.base:
        yield before + memory.drawing_bytes(shape)
        before += memory.held_bytes(shape) if memory.holds(shape) else 0
    answers, asks = asked(config, shapes), replace(memory, hold_cache="never")
    for parent, child in shapes.forks:
        held = memory.held_bytes(parent) if memory.holds(parent) else 0
        before = held if parent == child else before
        if answers is not None:
            yield before + asks.drawing_bytes(answers)
        yield before + memory.prefix_bytes(child)  # while they are gathered
        before -= held
        yield before + memory.drawing_bytes(child)
    yield memory.drawing_bytes(shapes.evaluate)
