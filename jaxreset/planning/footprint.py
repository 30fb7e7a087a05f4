"""What a config's arrays and programs take of a device that need not be there.

What is resident follows from shapes, what a program needs besides from its compiler. A program that the
compiler refuses for its memory is an answer too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax

from jaxreset.config import Config
from jaxreset.disk import WRITTEN_AT_ONCE, size_text
from jaxreset.errors import ConfigError
from jaxreset.learning.microbatches import PackShape
from jaxreset.models import activations
from jaxreset.models.block import DecoderConfig
from jaxreset.models.sizes import model_sizes
from jaxreset.parallel import check_sizes, data_shards, device_bytes
from jaxreset.parallel.topology import Slice
from jaxreset.planning import ahead, caches
from jaxreset.planning.ahead import Subject, device_bytes_of
from jaxreset.planning.programs import Program, Say, compile_program
from jaxreset.planning.shapes import RunShapes, choose_mesh, fresh_sizes, run_shapes
from jaxreset.planning.supervised import warm_start_parts
from jaxreset.sampling.memory import RoundMemory
from jaxreset.sampling.prefilling import chunk_shape
from jaxreset.sampling.rounds import Shape
from jaxreset.sampling.schedule import LaneShape
from jaxreset.tasks.chain import TOKENIZER

# Of a process on a CPU: Python with its libraries, and for each layer a decoding program and all others.
PROCESS, DECODE_LAYER, OTHER_LAYER = 800 * 10**6, 2_200_000, 20_000_000
BEING_WRITTEN = 3 * WRITTEN_AT_ONCE  # with what it is compressed to
MOST_OVER = 1.25  # times the memory that there is; what is added up may be wrong by 15%
REMEDIES = {
    "compiling": ("model.lora.rank",),
    "sampling": ("sampling.slots", "train.prompts_per_step", "sampling.max_response_tokens"),
    "update": ("train.remat=true", "a smaller train.microbatch_tokens", "model.lora.rank"),
    "saving": ("model.lora.rank",),
    "warm start": ("a smaller warm_start.batch", "a smaller train.microbatch_tokens"),
}


@dataclass(frozen=True)
class Phase:
    """What a device holds at the worst moment of a phase, in bytes; `over`: more than its memory."""

    parts: dict[str, int]
    over: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Case:
    """A config on a slice, ready to be compiled."""

    config: Config
    slice: Slice
    subject: Subject
    shapes: RunShapes

    @property
    def prefilled(self) -> list[Shape]:
        """Rounds whose prefixes run through the network: all but what goes on from rounds that are held."""
        kept = caches.held(self.memory, self.shapes)
        gathered = {child for parent, child in self.shapes.forks if parent in kept}
        if (
            kept
            and self.config.reset.localizer.mode == "inline"
            and self.shapes.localize is not None
        ):
            gathered.add(self.shapes.localize)
        gathered -= {*self.shapes.written}
        named = caches.rounds(self.config, self.shapes)
        return [shape for shape in named if shape not in gathered]

    @property
    def decoded(self) -> set[tuple[Shape, LaneShape]]:
        """Parts of all rounds and their lanes: as many decoding programs.

        Where lanes aren't all rows in their places a program doesn't know how many rows there are: 0 here.
        """
        parts = map(self.memory.part, caches.rounds(self.config, self.shapes))
        return {
            (part if lanes[:2] == part[:2] else part._replace(rows=0), lanes)
            for part in parts
            for lanes in self.memory.lanes(part)
        }

    @property
    def lanes(self) -> tuple[Shape, LaneShape]:
        """Of all rounds' lanes, those that attend to most slots, and their part of a round."""

        def slots(of: tuple[Shape, LaneShape]) -> int:
            part, at = of
            return at.groups * (part.prefix + at.rows * at.window)

        return max(self.decoded, key=slots)

    @property
    def memory(self) -> RoundMemory:
        """In which sizes rounds are drawn, and what they take."""
        subject, sampling = self.subject, self.config.sampling
        params = jax.tree.leaves((subject.state.params, subject.frozen))
        return RoundMemory(
            subject.model,
            sum(x.size * x.dtype.itemsize for x in params),
            on_cpu=subject.on_cpu,
            device_bytes=self.slice.memory,
            mesh=subject.mesh,
            slots=sampling.slots,
            hold_cache=sampling.hold_cache,
            parents=frozenset(parent for parent, _ in self.shapes.forks),
        )

    @property
    def pack(self) -> PackShape:
        """The largest microbatch."""
        return max(self.shapes.pack, key=lambda s: s.bins * (s.prefix + s.lanes * s.slots))


def make_case(config: Config, target: Slice) -> Case:
    """Checks all that a plan needs; nothing is compiled.

    Raises:
      ConfigError: a bad config, a mesh of another number of devices, or a model of unknown sizes.
    """
    try:
        mesh = choose_mesh(config, target.devices)
        shards, tensor = data_shards(mesh), mesh.shape["tensor"]
        shapes = run_shapes(config, config.make_objective(), shards=shards, tensor=tensor)
        task = config.task.make()
        task.close()
        sizes = _sizes(config)
        check_sizes(mesh, heads=sizes.heads, mlp=sizes.mlp, width=sizes.width)
        texts = {"delimiter": task.delimiter, "answer_marker": task.answer_marker}
        subject = ahead.make_subject(config, sizes, mesh, **texts)
        return Case(config, target, subject, shapes)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error


def compiled(case: Case, say: Say) -> Iterator[Program]:
    """Each kind of program in its largest size; the update, which takes longest, comes last."""
    subject, memory, shapes = case.subject, case.memory, case.shapes
    drawn = [memory.part(shape) for shape in case.prefilled]
    longest = max(drawn, key=lambda s: s.groups * s.prefix)
    yield compile_program("prefill", longest[::2], ahead.prefill(subject, longest), say)
    yield compile_decode(case, say)
    kept = caches.held(memory, shapes)
    if forks := [(parent, child) for parent, child in shapes.forks if parent in kept]:
        parent, child = map(memory.part, max(forks))
        yield compile_program("fork", child[::2], ahead.fork(subject, parent, child), say)
    yield compile_program("apply", (), ahead.apply_gradients(subject), say)
    call = ahead.accumulate_microbatch(subject, case.pack)
    yield compile_program("accumulate", case.pack, call, say)


def kinds(case: Case) -> dict[str, int]:
    """How many programs of each kind a run compiles; those that move keys and values are small."""
    memory, shapes = case.memory, case.shapes
    part, kept = memory.part, caches.held(memory, shapes)
    filled = [*case.prefilled]
    if case.config.reset.localizer.mode == "inline" and shapes.localize is not None:
        filled.append(shapes.localize)  # questions, behind what is gathered
    forks = {(part(parent), part(child)) for parent, child in shapes.forks if parent in kept}
    counts = {
        "prefill": len({part(shape)[::2] for shape in filled}),
        "decode": len(case.decoded),
        "fork": len(forks),
        "apply": 1,
        "accumulate": len(shapes.pack),
    }
    return {name: count for name, count in counts.items() if count}


def resident(subject: Subject) -> dict[str, int]:
    """Bytes of what outlives a phase."""
    state = subject.state
    trained = device_bytes_of(state.params)
    parts = {
        "trained parameters": trained,
        "frozen parameters": device_bytes_of(subject.frozen),
        "optimizer": device_bytes_of(state.opt_state),
    }
    if subject.config.loss.kl:
        parts["reference parameters"] = trained
    return parts


def estimated(case: Case) -> list[Program]:
    """What the programs that need most would need, without compiling them."""
    model, pack = case.subject.model, case.pack
    prefixes = [case.memory.part(shape) for shape in case.prefilled]
    shards = data_shards(case.subject.mesh)
    lanes = max(at.groups * at.rows for _, at in case.decoded)
    gradients = device_bytes_of(case.subject.state.gradients)
    passes = activations.update_bytes(
        model,
        pack.bins // shards,
        pack.prefix,
        pack.lanes,
        pack.slots,
        remat=case.config.train.remat,
    )

    def prefill(part: Shape) -> int:
        size = chunk_shape(part.groups, part.prefix, on_cpu=case.subject.on_cpu, shards=shards)
        return activations.prefill_bytes(model, size.chunks * size.tokens, part.prefix)

    needs = {
        "prefill": max(map(prefill, prefixes)),
        "decode": activations.decode_bytes(model, lanes // shards),
        "apply": 2 * gradients,  # the updates, and the moments before they take the old ones' place
        "accumulate": gradients + passes,
    }
    return [Program(name, (), 0.0, temporary=needed) for name, needed in needs.items()]


def phases(case: Case, programs: Sequence[Program]) -> dict[str, Phase]:
    """What each phase holds, with these programs."""
    subject, memory = case.subject, case.slice.memory
    keeps, needs = resident(subject), {p.name: p.temporary for p in programs}
    process = {}
    if subject.on_cpu:  # what runs lies in the same memory
        process = {"process": PROCESS, "compiled programs": _programs_bytes(case)}
        keeps |= process
    gradients = {"gradients": device_bytes_of(subject.state.gradients)}
    microbatch = {"microbatch": device_bytes_of(ahead.microbatch(subject, case.pack))}
    updating = keeps | gradients
    held = {
        "compiling": updating | microbatch,  # all else from shapes
        "sampling": (updating if case.config.train.min_signal_groups else keeps)
        | {
            "decoding copy": device_bytes_of(subject.decoding) if subject.copies else 0,
            "caches": caches.most_bytes(case.memory, case.config, case.shapes),
            "temporary": max(needs.get(name, 0) for name in ("prefill", "decode", "fork")),
        },
        "update": updating
        | microbatch
        | {"temporary": max(needs.get(name, 0) for name in ("accumulate", "apply"))},
    }
    if subject.on_cpu:
        most = min(BEING_WRITTEN, device_bytes_of(subject.state))
        held["saving"] = updating | {"being written": most}
    if (parts := warm_start_parts(subject)) is not None:
        held["warm start"] = process | parts
    return {name: Phase(parts, sum(parts.values()) - memory) for name, parts in held.items()}


def _programs_bytes(case: Case) -> int:
    """Of a CPU's compiled programs; those of a decoding step, where layers are unrolled, are most of it."""
    return case.subject.model.layers * (len(case.decoded) * DECODE_LAYER + OTHER_LAYER)


def here(config: Config) -> Case:
    """The config on the devices of this job.

    Raises:
      ConfigError: as `make_case`.
    """
    devices = jax.devices()
    memory = device_bytes()
    if devices[0].platform == "cpu":  # those of a machine share it
        memory //= len(jax.local_devices())
    return make_case(config, Slice("here", devices[0].device_kind, devices, memory))


def check_room(case: Case) -> str | None:
    """What to say of a run that will hardly have room, before anything of it is compiled; None: it has.

    Raises:
      ConfigError: it needs far more than there is.
    """
    name, phase = max(phases(case, estimated(case)).items(), key=lambda item: item[1].total)
    if phase.over <= 0:
        return None
    most = ", ".join(
        f"{part} {size_text(size)}"
        for part, size in sorted(phase.parts.items(), key=lambda item: -item[1])[:3]
    )
    advice = " or ".join(REMEDIES[name])
    there = size_text(case.slice.memory)
    text = (
        f"{name} takes about {size_text(phase.total)}, and a device has {there}: {most}. "
        f"Change {advice}; --dry-run lists all that is held"
    )
    if phase.total > MOST_OVER * case.slice.memory:
        raise ConfigError(text)
    return text


def _sizes(config: Config) -> DecoderConfig:
    """Of the policy, without adapters."""
    if config.model.path is not None:
        return model_sizes(config.model.path, dtype=config.model.dtype)
    from transformers import AutoTokenizer

    vocab = len(AutoTokenizer.from_pretrained(TOKENIZER))
    return fresh_sizes(config, vocab)


def decode_sizes(case: Case) -> tuple[int, ...]:
    """Of the largest decoding program: groups, rows, slots of a row, and of a prefix."""
    part, lanes = case.lanes
    return *lanes, part.prefix


def compile_decode(case: Case, say: Say) -> Program:
    """The largest decoding program."""
    call = ahead.decode(case.subject, *case.lanes)
    return compile_program("decode", decode_sizes(case), call, say)
