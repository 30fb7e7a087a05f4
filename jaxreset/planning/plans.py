"""Whether a run fits a machine that isn't there: its real programs compiled ahead of time, and read.

report = plan(config, "v5e:16x16")
report.fits, report.phases["update"].total, report.memory
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxreset.config import Config
from jaxreset.errors import ConfigError
from jaxreset.models import flops
from jaxreset.parallel.topology import slice_of
from jaxreset.planning import caches
from jaxreset.planning.advice import Advice, Largest, advise, largest_slots
from jaxreset.planning.footprint import Case, Phase, compiled, kinds, make_case, phases
from jaxreset.planning.programs import Program, Say


@dataclass(frozen=True)
class Report:
    """Of a config on a topology; bytes are on one device.

    Attributes:
      topology, kind, devices, memory: of what it was planned for.
      mesh: sizes of its axes.
      parameters: numbers of the policy, adapters left out.
      phases: "compiling", "sampling" and "update"; on a CPU "saving", and for a fresh policy with one "warm
        start" too.
      programs: compiled.
      kinds: how many programs of each kind a run compiles.
      flops: of a step at its limits on all devices: every response as long as it may be.
      cuts: of rounds with fewer groups than there are data shards, into how many parts each group is cut.
        Each part prefills and keeps the whole prefix, and resets of it are prefilled too.
      advice: where it doesn't fit, changes that help.
      largest: where it was asked for.
    """

    topology: str
    kind: str
    devices: int
    memory: int
    mesh: dict[str, int]
    parameters: int
    phases: dict[str, Phase]
    programs: tuple[Program, ...]
    kinds: dict[str, int]
    flops: dict[str, float]
    cuts: dict[str, int]
    advice: tuple[Advice, ...] = ()
    largest: Largest | None = None

    @property
    def fits(self) -> bool:
        """Whether all phases do, and the compiler refused nothing."""
        refused = any(program.refused for program in self.programs)
        return not refused and all(phase.over <= 0 for phase in self.phases.values())

    @property
    def compile_seconds(self) -> float:
        """About how long a run's programs take one after another on this machine, were all the largest."""
        return sum(self.kinds[program.name] * program.seconds for program in self.programs)

    def as_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        phases = {
            name: {**asdict(phase), "total": phase.total} for name, phase in self.phases.items()
        }
        programs = [
            {**asdict(p), "traffic": p.traffic and [t._asdict() for t in p.traffic]}
            for p in self.programs
        ]
        changed = {
            "phases": phases,
            "programs": programs,
            "advice": [a._asdict() for a in self.advice],
            "largest": self.largest and self.largest._asdict(),
        }
        sums = {"fits": self.fits, "compile_seconds": self.compile_seconds}
        return {**sums, **asdict(self), **changed}


def plan(
    config: Config, topology: str, *, largest: bool = False, say: Say = lambda _: None
) -> Report:
    """Compiles a config's programs for a topology and adds up what a device holds.

    Args:
      config: resolved.
      topology: see `topology.slice_of`.
      largest: look for the most rows that decode at once, too.
      say: told what is compiled.

    Raises:
      ConfigError: a bad config or topology, a mesh that doesn't have as many devices, a model whose sizes
        are not to be had, or no compiler for that kind of device.
    """
    try:
        target = slice_of(topology)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    case = make_case(config, target)
    programs = tuple(compiled(case, say))
    mesh = case.subject.mesh
    report = Report(
        topology=target.name,
        kind=target.kind,
        devices=len(target.devices),
        memory=target.memory,
        mesh={} if mesh is None else dict(mesh.shape),
        parameters=case.subject.parameters,
        phases=phases(case, programs),
        programs=programs,
        kinds=kinds(case),
        flops=_step_flops(case),
        cuts=caches.cuts(case.memory, config, case.shapes),
    )
    if not report.fits:
        report = replace(report, advice=tuple(advise(case, report.phases, programs)))
    if largest:
        report = replace(report, largest=largest_slots(case, programs, say))
    return report


def _step_flops(case: Case) -> dict[str, float]:
    """Of each part of a step at its limits, on all devices."""
    model, shapes, objective = case.subject.model, case.shapes, case.config.make_objective()
    made = {"prefill": 0.0, "decode": 0.0}
    for shape, name in caches.rounds(case.config, shapes).items():
        if name == "evaluate":
            continue
        times = objective.rungs if name == "resume" else 1
        if shape in case.prefilled:
            prefixes = case.memory.part(shape).groups
            made["prefill"] += times * prefixes * flops.prefill_flops(model, shape.prefix)
        rows = times * shape.groups * shape.rows
        made["decode"] += rows * flops.decode_flops(model, shape.prefix, shape.suffix)
    s, remat = case.config.sampling, case.config.train.remat
    prompts = case.config.train.prompts_per_step
    prompt, response = s.max_prompt_tokens, s.max_response_tokens
    groups = [(objective.base, prompt)] if objective.base else []
    groups += [(objective.branches, prompt + response)] * (objective.rungs * objective.resets)
    update = sum(
        flops.update_flops(model, prefix, rows, response, remat=remat) for rows, prefix in groups
    )
    return made | {"update": prompts * case.config.train.epochs * update}
