"""Bytes of keys and values that a device holds while a step is sampled."""

from __future__ import annotations

from collections.abc import Iterator

from jaxreset.parallel import data_shards
from jaxreset.sampling.places import cut_over
from jaxreset.sampling.programs import CPU_SLOTS, cache_bytes
from jaxreset.sampling.rounds import Shape
from jaxreset.sampling.sampler import HELD_SHARE
from jaxreset.sampling.schedule import LaneShape, lane_shapes
from jaxreset.training.ahead import Subject, device_bytes_of, own_store, prefix_store
from jaxreset.training.setup import Plan


def asked(subject: Subject, plan: Plan) -> Shape | None:
    """The round in which the localiser answers, where it generates."""
    return None if subject.config.reset.localizer.mode == "score" else plan.localize


def rounds(subject: Subject, plan: Plan) -> dict[Shape, str]:
    """The rounds of a step and of an evaluation, by their shapes."""
    named = dict.fromkeys(plan.base, "sample")
    named |= {child: "resume" for _, child in plan.forks}
    if (answers := asked(subject, plan)) is not None:
        named.setdefault(answers, "localize")
    named.setdefault(plan.evaluate, "evaluate")
    return named


def laid_out(subject: Subject, shape: Shape) -> Shape:
    """A round's sizes as it is drawn: every shard has equally many groups, or parts of one."""
    return cut_over(shape, data_shards(subject.mesh))


def cuts(subject: Subject, plan: Plan) -> dict[str, int]:
    """Into how many parts the groups of a round are cut, of those whose are: each has the whole prefix."""
    parts = {
        name: shape.rows // laid_out(subject, shape).rows
        for shape, name in rounds(subject, plan).items()
    }
    return {name: count for name, count in parts.items() if count > 1}


def widest_lanes(subject: Subject, shape: Shape) -> LaneShape:
    """Of the lanes that a round is decoded in, those that hold most."""
    return max(_lanes(subject, shape), key=slots_of)


def slots_of(lanes: LaneShape) -> int:
    """That lanes attend to in all."""
    return lanes.groups * (lanes.prefix + lanes.rows * lanes.window)


def held(subject: Subject, plan: Plan, memory: int) -> list[Shape]:
    """Rounds that keep their caches for resets, as `sampling.Sampler` decides it."""
    parents = [
        parent
        for parent in dict.fromkeys(parent for parent, _ in plan.forks)
        if laid_out(subject, parent).rows == parent.rows  # cut ones aren't held
    ]
    setting = subject.config.sampling.hold_cache
    if setting != "auto":
        return parents if setting == "always" else []
    devices = 1 if subject.mesh is None else subject.mesh.size
    most = HELD_SHARE * devices * memory
    return [shape for shape in parents if cache_bytes(subject.model, shape) <= most]


def most_bytes(subject: Subject, plan: Plan, memory: int) -> int:
    """Bytes on a device when the rounds that are held and the one that is drawn take most."""
    return max(_moments(subject, plan, held(subject, plan, memory)))


def _moments(subject: Subject, plan: Plan, kept: list[Shape]) -> Iterator[int]:
    """Bytes while each round is drawn."""
    before = 0
    for shape in plan.base:
        yield before + drawing_bytes(subject, shape, hold=shape in kept)
        before += _round_bytes(subject, shape) if shape in kept else 0
    if (answers := asked(subject, plan)) is not None:
        yield before + drawing_bytes(subject, answers, hold=False)
    for child in dict.fromkeys(child for _, child in plan.forks):
        drawn = drawing_bytes(subject, child, hold=child in kept)
        # A later rung goes back into the one before it.
        yield before + drawn + (_round_bytes(subject, child) if child in kept else 0)
    yield drawing_bytes(subject, plan.evaluate, hold=False)


def drawing_bytes(subject: Subject, shape: Shape, *, hold: bool) -> int:
    """Bytes while a round is drawn: its prefixes, its rows on pages, and the lanes beside them."""
    lanes = _lanes(subject, shape)
    n, k, p, s = laid_out(subject, shape)
    if lanes[0][:2] != (n, k):
        # Rows that wait in the middle have filled half a window at most.
        paged = _round_bytes(subject, Shape(n, k, p, s if hold else -(-s // 2)))
        return paged + _lane_bytes(subject, widest_lanes(subject, shape))
    # All rows in their places: while these are widened the narrower ones are there too, and when most
    # have ended there are fewer lanes beside them.
    fewer = [_lane_bytes(subject, other) for other in lanes if other[:2] != (n, k)]
    window = max((x.window for x in lanes if x.window < s), default=0)
    width = max((x.prefix for x in lanes if x.prefix < p), default=0)
    narrower = _lane_bytes(subject, LaneShape(n, k, window, width))
    return _round_bytes(subject, shape) + max([narrower, *fewer])


def _lanes(subject: Subject, shape: Shape) -> list[LaneShape]:
    slots = subject.config.sampling.slots
    if slots is None and subject.on_cpu:
        slots = CPU_SLOTS
    shards = data_shards(subject.mesh)
    return lane_shapes(*laid_out(subject, shape), slots=slots, shards=shards)


def _round_bytes(subject: Subject, shape: Shape) -> int:
    n, k, p, s = laid_out(subject, shape)
    return device_bytes_of(prefix_store(subject, n, p), own_store(subject, n, k, s))


def _lane_bytes(subject: Subject, lanes: LaneShape) -> int:
    return device_bytes_of(
        prefix_store(subject, lanes.groups, lanes.prefix), own_store(subject, *lanes.own)
    )
