"""Which rounds hold keys and values while a step is sampled, and what they take together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jaxreset.config import Config
from jaxreset.run.experiment import Plan
from jaxreset.sampling.memory import RoundMemory
from jaxreset.sampling.rounds import Shape


def asked(config: Config, plan: Plan) -> Shape | None:
    """The round in which the localiser answers, where it generates."""
    return None if config.reset.localizer.mode == "score" else plan.localize


def rounds(config: Config, plan: Plan) -> dict[Shape, str]:
    """The rounds of a step and of an evaluation, by their shapes."""
    named = dict.fromkeys(plan.base, "sample")
    named |= {child: "resume" for _, child in plan.forks}
    if (answers := asked(config, plan)) is not None:
        named.setdefault(answers, "localize")
    named.setdefault(plan.evaluate, "evaluate")
    return named


def cuts(memory: RoundMemory, config: Config, plan: Plan) -> dict[str, int]:
    """Into how many parts the groups of a round are cut, of those whose are: each has the whole prefix."""
    parts = {
        name: shape.rows // memory.part(shape).rows for shape, name in rounds(config, plan).items()
    }
    return {name: count for name, count in parts.items() if count > 1}


def held(memory: RoundMemory, plan: Plan) -> list[Shape]:
    """Rounds that keep their caches for resets."""
    parents = dict.fromkeys(parent for parent, _ in plan.forks)
    return [parent for parent in parents if memory.holds(parent)]


def most_bytes(memory: RoundMemory, config: Config, plan: Plan) -> int:
    """Bytes on a device when the rounds that are held and the one that is drawn take most."""
    return max(_moments(memory, config, plan))


def _moments(memory: RoundMemory, config: Config, plan: Plan) -> Iterator[int]:
    """Bytes while each round is drawn; what it goes back to is let go when its prefixes are gathered."""
    before = 0
    for shape in plan.base:
        yield before + memory.drawing_bytes(shape)
        before += memory.held_bytes(shape) if memory.holds(shape) else 0
    answers, asks = asked(config, plan), replace(memory, hold_cache="never")
    for parent, child in plan.forks:
        held = memory.held_bytes(parent) if memory.holds(parent) else 0
        before = held if parent == child else before
        if answers is not None:
            yield before + asks.drawing_bytes(answers)
        yield before + memory.prefix_bytes(child)  # while they are gathered
        before -= held
        yield before + memory.drawing_bytes(child)
    yield memory.drawing_bytes(plan.evaluate)
