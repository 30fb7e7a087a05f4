"""What to change where a run doesn't fit, and how many rows would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxreset.config import Config
from jaxreset.config_file import parse_config
from jaxreset.errors import ConfigError
from jaxreset.parallel import data_shards
from jaxreset.planning.footprint import Case, Phase, compile_decode, decode_sizes, make_case, phases
from jaxreset.planning.programs import Program, Say

RANK = 64  # of the adapters that are advised
# What more devices of the same kind would share.
SPLIT_FURTHER = "trained parameters", "frozen parameters", "optimizer", "gradients", "caches"


class Advice(NamedTuple):
    """A change of the config.

    Attributes:
      phase: that doesn't fit without it.
      change: `key=value` overrides.
      saves: bytes on a device, at least; None: only compiling tells.
      enough: whether the phase fits then, as far as that can be told.
    """

    phase: str
    change: str
    saves: int | None
    enough: bool


class Largest(NamedTuple):
    """Most rows that decode at once.

    Attributes:
      slots: on all devices: the largest `sampling.slots` that is of use.
      rows_per_shard: on one data shard.
      prompts: the least `train.prompts_per_step` that fills them.
      free: bytes left on a device.
    """

    slots: int
    rows_per_shard: int
    prompts: int
    free: int


def advise(
    case: Case, planned: Mapping[str, Phase], programs: Sequence[Program]
) -> Iterator[Advice]:
    """Changes that save memory in the phases that don't fit, those that save most first."""
    for name, phase in planned.items():
        if phase.over <= 0 and not _refused(name, programs):
            continue

        def of(
            changes: Mapping[str, Any], name: str = name, phase: Phase = phase
        ) -> tuple[Advice, Mapping[str, Any]]:
            saves = _saved(case, name, phase, programs, changes)
            text = " ".join(f"{key}={value}" for key, value in changes.items())
            return Advice(name, text, saves, saves is not None and saves >= phase.over), changes

        found = [advice for advice in map(of, _changes(case, name)) if advice[0].saves != 0]
        found.sort(key=lambda pair: -(pair[0].saves or 0))
        yield from (advice for advice, _ in found)
        if len(found) > 1 and not any(advice.enough for advice, _ in found):
            together: dict[str, Any] = {}
            for _, changes in found:
                if not changes.keys() & together.keys():
                    together |= changes
            yield of(together)[0]
        resident = sum(size for part, size in phase.parts.items() if part in SPLIT_FURTHER)
        if (room := case.slice.memory - phase.total + resident) > 0:
            devices = math.ceil(len(case.slice.devices) * resident / room)
            yield Advice(name, f"a slice of about {devices} devices", phase.over, True)


def _refused(name: str, programs: Sequence[Program]) -> bool:
    update = "accumulate", "apply"
    return any(p.refused and (p.name in update) == (name == "update") for p in programs)


def _changes(case: Case, phase: str) -> Iterator[dict[str, Any]]:
    """Overrides that may help a phase."""
    config, mesh = case.config, case.subject.mesh
    if phase == "sampling":
        if case.shapes.forks and config.sampling.hold_cache != "never":
            yield {"sampling.hold_cache": "never"}
        _, lanes = case.lanes
        rows, least = lanes.groups * lanes.rows, lanes.rows * data_shards(mesh)
        for slots in dict.fromkeys((max(rows // 2, least), least)):
            if slots < rows:
                yield {"sampling.slots": slots}
    elif phase == "update" and not config.train.remat:
        yield {"train.remat": "true"}
    if phase == "warm start" and config.warms_at_once:
        for batch in dict.fromkeys(max(config.warm_start.batch // n, 1) for n in (2, 8)):
            yield {"warm_start.batch": batch}
    if phase == "update" and case.pack.bins > data_shards(mesh):
        bin_slots = case.pack.prefix + case.pack.lanes * case.pack.slots
        yield {"train.microbatch_tokens": bin_slots * data_shards(mesh)}
    if config.model.lora.rank is None:
        yield {"model.lora.rank": RANK}
    if mesh is not None:
        data, fsdp, tensor = (mesh.shape[axis] for axis in mesh.axis_names)
        for sizes in (
            (data / 2, fsdp * 2, tensor),
            (data / 2, fsdp, tensor * 2),
            (data, fsdp / 2, tensor * 2),
        ):
            if all(size >= 1 and size == int(size) for size in sizes):
                names = "mesh.data", "mesh.fsdp", "mesh.tensor"
                yield dict(zip(names, map(int, sizes), strict=True))


def _saved(
    case: Case,
    name: str,
    phase: Phase,
    programs: Sequence[Program],
    changes: Mapping[str, Any],
) -> int | None:
    """Bytes, with temporaries scaled by the tokens of a device: 0 where the change is refused or saves
    nothing, None where only compiling tells."""
    if "train.remat" in changes:
        return None
    try:
        other = make_case(overridden(case.config, changes), case.slice)
    except ConfigError:
        return 0
    after = phases(other, programs)[name]
    kept, temporary = after.total, phase.parts.get("temporary", 0)
    if name == "update":
        kept -= int(temporary * (1 - _tokens(other) / _tokens(case)))
    return max(phase.total - kept, 0)


def overridden(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some of its keys changed. Raises `ConfigError`."""
    values = config.model_dump()
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    return parse_config(values)


def _tokens(case: Case) -> float:
    """Of a microbatch on one device."""
    mesh, pack = case.subject.mesh, case.pack
    slots = pack.bins * (pack.prefix + pack.lanes * pack.slots)
    return slots / (1 if mesh is None else data_shards(mesh) * mesh.shape["tensor"])


def largest_slots(case: Case, programs: Sequence[Program], say: Say) -> Largest | None:
    """The most rows that decode at once and fit, by bisection over the base round's groups.

    Beyond the config's own prompts it is the number of prompts that grows. None: not even one group on
    each data shard fits.
    """
    shards, rows = data_shards(case.subject.mesh), case.shapes.base[0].rows

    def free(groups: int) -> int:
        """Bytes left with so many groups of lanes on each shard; negative: it doesn't fit."""
        slots, prompts = groups * shards * rows, case.config.train.prompts_per_step
        changes = {"sampling.slots": slots, "train.prompts_per_step": max(prompts, groups * shards)}
        try:
            other = make_case(overridden(case.config, _with_batches(case, changes)), case.slice)
        except ConfigError:
            return -1
        others = [p for p in programs if p.name in ("accumulate", "apply")]
        others += [
            replace(p, temporary=int(p.temporary * max(groups * shards / prompts, 1)))
            for p in programs
            if p.name in ("prefill", "fork")
        ]
        if phases(other, others)["sampling"].over > 0:
            return -1  # whatever decoding needs
        known = [p for p in programs if p.name == "decode" and p.sizes == decode_sizes(other)]
        drawn = known[0] if known else compile_decode(other, say)
        return -1 if drawn.refused else -phases(other, [*others, drawn])["sampling"].over

    most, beyond, left = 0, max(case.config.train.prompts_per_step // shards, 1), 0
    while (room := free(beyond)) >= 0:
        most, beyond, left = beyond, 2 * beyond, room
    while beyond - most > 1:
        middle = (most + beyond) // 2
        if (room := free(middle)) >= 0:
            most, left = middle, room
        else:
            beyond = middle
    if most == 0:
        return None
    return Largest(most * shards * rows, most * rows, most * shards, left)


def _with_batches(case: Case, changes: Mapping[str, Any]) -> dict[str, Any]:
    """With one minibatch, since prompts may no longer be a multiple of what the config has."""
    return {**changes, "train.minibatch_prompts": None}
