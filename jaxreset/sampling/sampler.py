"""The sampler: token ids in, token ids out, with the two verbs `sample` and `resume`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxreset.models.decoder import Store
from jaxreset.models.policy import Policy
from jaxreset.parallel.compiling import Compile, SideBySide
from jaxreset.sampling.checks import (
    check_draws,
    check_patterns,
    check_policy,
    check_prompts,
    check_questions,
    check_snapshots,
)
from jaxreset.sampling.dealing import draw_round
from jaxreset.sampling.decoding import Limits
from jaxreset.sampling.drawing import Start, make_start
from jaxreset.sampling.memory import HoldCache, RoundMemory
from jaxreset.sampling.places import room_for
from jaxreset.sampling.programs import Programs
from jaxreset.sampling.rounds import (
    NO_LIMIT,
    Round,
    Shape,
    Snapshot,
    StopRules,
    Stream,
    apart,
)
from jaxreset.sampling.tokens import Draws
from jaxreset.spelling import token_bytes
from jaxreset.steps import StepAutomaton, build_automaton, split_steps

Tokens = Sequence[int] | np.ndarray


class Sampler:
    """Draws groups of rollouts and branches of them.

    Args:
      automaton: the step table of `steps.build_automaton`, as wide as the policy's vocabulary.
      stop: when responses end.
      eos_ids: end-of-sequence tokens.
      shapes: the sizes to compile for; `sample` takes the smallest that holds its prompts. None: sizes
        are rounded up to powers of two and compiled when first met, for interactive use.
      forks: (parent, child) sizes for `resume`; a parent is one of `shapes` or an earlier child.
      slots: most rows that decode at once, in all threads together; the others wait for a place. None:
        32 a stream on CPU, where more make none cheaper, and all elsewhere.
      threads: that each draw some of a round's groups. None: on CPU one a core, unless the
        weights are large, and one elsewhere.
      question_tokens: most tokens that `resume` may put behind a snapshot; 0: it gets no questions.
      hold_cache: whether a round keeps its keys and values, so that `resume` gathers its prefixes.
        "never": it prefills them, once per group. "auto": rounds are held that one of `forks` goes back
        to and that take at most a third of the device's memory.
      mesh: groups are split over it, and the weights along its axis `tensor`; None: one device. With more
        data shards than groups, a group's rows are split too, and its round isn't held.
    """

    def __init__(
        self,
        automaton: StepAutomaton,
        stop: StopRules,
        *,
        eos_ids: Iterable[int] = (),
        shapes: Sequence[Shape] | None = None,
        forks: Sequence[tuple[Shape, Shape]] = (),
        slots: int | None = None,
        threads: int | None = None,
        question_tokens: int = 0,
        hold_cache: HoldCache = "auto",
        mesh: Mesh | None = None,
    ):
        self.automaton = automaton
        self.stop = stop
        self.eos_ids = tuple(eos_ids)
        self.shapes = None if shapes is None else sorted(set(shapes))
        self.forks = list(forks)
        self.question_tokens = question_tokens
        self._vocab = automaton.next_state.shape[1]
        limits = Limits(
            np.int32(stop.max_response),
            np.int32(stop.max_steps or NO_LIMIT),
            np.int32(stop.max_step_tokens or NO_LIMIT),
            np.int32(stop.max_step_tokens or 0),
            np.asarray(self.eos_ids or (-1,), np.int32),
        )
        self._programs = Programs(
            automaton._replace(blank=None),  # read on the host only
            limits,
            mesh=mesh,
            slots=slots,
            threads=threads,
            hold_cache=hold_cache,
            parents=None if shapes is None else frozenset(parent for parent, _ in self.forks),
        )

    @classmethod
    def for_policy(
        cls,
        policy: Policy,
        stop: StopRules,
        *,
        delimiter: str,
        answer_marker: str | None = None,
        stop_strings: Sequence[str] = (),
        **options: Any,
    ) -> Sampler:
        """A sampler for a policy's vocabulary, from the texts that end a step and a response.

        Args:
          policy: its tokenizer says how texts are spelt in tokens.
          stop: when responses end.
          delimiter, answer_marker, stop_strings: see `steps.build_automaton`.
          **options: `shapes`, `forks`, `slots`, `threads`, `question_tokens`, `hold_cache` and
            `mesh` of `Sampler`.

        Raises:
          ValueError: the vocabulary can't spell the delimiter or the answer marker, or only by tokens
            that are left out of texts.
        """
        check_patterns(policy, delimiter=delimiter, answer_marker=answer_marker)
        automaton = build_automaton(
            token_bytes(policy.tokenizer, stop_strings=stop_strings),
            delimiter=delimiter,
            answer_marker=answer_marker,
            stop_strings=stop_strings,
            vocab_size=policy.config.vocab,
        )
        return cls(automaton, stop, eos_ids=policy.eos_ids, **options)

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Tokens],
        *,
        rows: int,
        stream: Stream,
        ids: Sequence[int] | None = None,
        first_rows: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new: int | None = None,
    ) -> Round:
        """Draws `rows` responses to each prompt.

        Args:
          policy: whose weights draw.
          prompts: N rows of token ids, each of at least one token.
          rows: K, responses to each prompt.
          stream: names the random numbers.
          ids: [N] global index of each prompt, part of its random numbers' name; default 0, 1, ...
          first_rows: [N] number of the group's first row, where a prompt has several groups in this
            stream and each must draw differently; default 0.
          kept: [N] how many of each prompt's last tokens are the kept part of a response (which counts
            towards the limits); default 0. This is a reset without a cache: it is prefilled. Give another
            phase than that of the call that drew them, or its noise is drawn again.
          temperature: 0 is greedy.  top_p, top_k: truncation; 1 and 0 keep all.
          max_new: most tokens to draw in each row; default: up to the response limit.

        Returns:
          A `Round`, in the order of `prompts`.

        Raises:
          ValueError: an empty prompt, a token outside the vocabulary, arguments of unlike lengths or out
            of range, more than any of `shapes` holds, or a policy of another vocabulary; with the
            numbers.
        """
        check_policy(policy.config.vocab, self._vocab)
        prefixes = [np.asarray(p, np.int32) for p in prompts]
        check_prompts(prefixes, self._vocab, kept=kept, ids=ids, first_rows=first_rows)
        kept = [0] * len(prompts) if kept is None else kept
        ids = range(len(prompts)) if ids is None else ids
        draws = self._draws(stream, temperature, top_p, top_k, max_new)
        shape = self._shape(prefixes, rows, self.shapes)
        prompt_lengths = [len(p) - k for p, k in zip(prefixes, kept, strict=True)]

        def prefill(part: Shape, groups: np.ndarray, places: np.ndarray) -> Store:
            return self._programs.prefill(policy, part, [prefixes[g] for g in groups], places)

        starts = self._starts(prefixes, prompt_lengths, ids, first_rows)
        drawn = draw_round(
            self._programs, policy, shape, prefill, starts, prefixes, prompt_lengths, draws
        )
        return dataclasses.replace(drawn, streams=(stream,))

    def resume(
        self,
        policy: Policy,
        snapshots: Sequence[Snapshot],
        *,
        rows: int,
        stream: Stream,
        questions: Sequence[Tokens] | None = None,
        first_rows: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new: int | None = None,
        release: bool = False,
    ) -> Round:
        """Draws `rows` continuations from each snapshot, all of one round.

        Nothing is prefilled where the round holds its cache, but for `questions`; over a mesh, unless more
        go on from one data shard than a compiled shape has room for. The parent round is only read, unless
        it is to be released.
        Arguments, result and errors are `sample`'s; moreover:

        Args:
          stream: one that drew the snapshots' round, or a round that it goes back to, is drawn apart, as
            `rounds.apart` says: else a branch would repeat its parent's noise. The same stream draws the
            same branches again.
          questions: tokens to put behind each snapshot. All before the answer is then the prompt, and
            rows answer from their first step on.
          release: let the parent's keys and values go as soon as they are gathered, before anything is
            drawn: nothing else will be resumed from it, but by prefilling.

        Raises:
          ValueError: snapshots of several rounds, of other weights than the policy's, or of a length
            outside the row.
        """
        check_policy(policy.config.vocab, self._vocab)
        check_snapshots(snapshots, policy)
        parent = snapshots[0].round
        stream = apart(stream, parent.streams)
        draws = self._draws(stream, temperature, top_p, top_k, max_new)
        children = None
        if self.shapes is not None:
            children = [child for above, child in self.forks if above == parent.shape]
        kept = prefixes = [s.tokens for s in snapshots]
        prompt_lengths = [int(parent.prompt_lengths[s.group]) for s in snapshots]
        asked = [np.asarray(q, np.int32) for q in questions or ()]
        if questions is not None:
            check_questions(asked, len(snapshots), self.question_tokens, self._vocab)
            prefixes = [np.concatenate(pair) for pair in zip(kept, asked, strict=True)]
            prompt_lengths = [len(p) for p in prefixes]
        shards = self._stay(snapshots, children)
        shape = self._shape(prefixes, rows, children, shards)
        ids = [int(parent.ids[s.group]) for s in snapshots]

        def continued(part: Shape, groups: np.ndarray, places: np.ndarray) -> Store:
            def of(items: Sequence[Any]) -> list[Any]:
                return [items[g] for g in groups]

            if shards is None:
                return self._programs.prefill(policy, part, of(prefixes), places)
            cache = self._programs.fork(parent.held, part, of(snapshots), places)
            if not asked:
                return cache
            behind = cache, list(map(len, of(kept)))
            return self._programs.prefill(policy, part, of(prefixes), places, behind=behind)

        drawn = draw_round(
            self._programs,
            policy,
            shape,
            continued,
            self._starts(prefixes, prompt_lengths, ids, first_rows),
            prefixes,
            prompt_lengths,
            draws,
            shards,
            parent if release else None,
        )
        return dataclasses.replace(drawn, streams=(*parent.streams, stream))

    @property
    def shards(self) -> int:
        """Into how many parts the groups of a round are split."""
        return self._programs.shards

    def shard(self, snapshot: Snapshot) -> int:
        """The part that a snapshot of a held round is in; what is resumed from it is drawn there."""
        held = snapshot.round.held
        return self._programs.shard(held, snapshot.group) if held else 0

    def steps(self, response: Tokens) -> list[tuple[int, int]]:
        """Spans [start, end) of a response's steps, in tokens after the prompt."""
        return split_steps(
            self.automaton,
            np.asarray(response),
            max_step_tokens=self.stop.max_step_tokens or NO_LIMIT,
            eos_ids=self.eos_ids,
        )

    def snapshot(self, round_: Round, group: int, row: int, *, before_step: int) -> Snapshot:
        """The point before step `before_step` (1 is the first) of a row's response.

        Raises:
          ValueError: the response has no such step.
        """
        spans = self.steps(round_.response(group, row))
        if not 1 <= before_step <= len(spans):
            raise ValueError(
                f"before_step={before_step}: row {row} of group {group} has steps 1 to {len(spans)}"
            )
        length = int(round_.prompt_lengths[group]) + spans[before_step - 1][0]
        return Snapshot(round_, group, row, length)

    def memory(self, policy: Policy) -> RoundMemory:
        """In which sizes rounds of the policy are drawn, which are held, and what that takes."""
        return self._programs.memory(policy)

    def compile(self, policy: Policy, compiled: Compile | None = None) -> None:
        """Compiles all that `sample` and `resume` will need, in `shapes` and `forks`; nothing is run.

        `compiled`: that more is compiled by, beside this.
        """
        if compiled is None:
            with SideBySide() as compiled:
                return self.compile(policy, compiled)
        draws = self._draws(Stream(0), 1.0, 1.0, 0, None)
        memory, programs = self.memory(policy), self._programs.in_shapes(compiled)
        held, nowhere = {}, np.zeros(0, int)
        for shape in self.shapes or ():
            part = memory.part(shape)
            prefix = programs.prefill(policy, part, [], nowhere)
            held[shape] = programs.compile_draw(policy, part, prefix, draws)
        for parent, child in self.forks:
            part = memory.part(child)
            if memory.holds(parent):
                if parent not in held:  # another sampler draws it
                    above = memory.part(parent)
                    prefix = programs.prefill(policy, above, [], nowhere)
                    held[parent] = programs.empty_part(policy, above, prefix)
                parts = memory.threads_of(parent.rows)
                prefix = programs.compile_fork(held[parent], parent, part, parts=parts)
                if self.question_tokens:
                    prefix = programs.prefill(policy, part, [], nowhere, behind=(prefix, []))
            else:
                prefix = programs.prefill(policy, part, [], nowhere)
            held[child] = programs.compile_draw(policy, part, prefix, draws)

    def _stay(
        self, snapshots: Sequence[Snapshot], shapes: Sequence[Shape] | None
    ) -> list[int] | None:
        """The shard of each snapshot, where their cache is held and all can be drawn beside it."""
        if not snapshots[0].round.held:
            return None
        shards = [self.shard(s) for s in snapshots]
        most = max((shape.groups for shape in shapes or ()), default=NO_LIMIT)
        return shards if room_for(shards, self.shards) <= most else None

    def _starts(self, *where: Any) -> Start:
        return make_start(self.automaton, self.stop, *where)

    def _draws(
        self, stream: Stream, temperature: float, top_p: float, top_k: int, max_new: int | None
    ) -> Draws:
        check_draws(temperature, top_p, top_k, max_new)
        return Draws(
            np.float32(temperature),
            np.float32(top_p),
            np.int32(top_k),
            np.int32(self.stop.max_response if max_new is None else max_new),
            np.uint32(stream.seed),
            np.uint32(stream.step),
            np.uint32(stream.phase),
        )

    def _shape(
        self,
        prefixes: Sequence[np.ndarray],
        rows: int,
        shapes: Sequence[Shape] | None,
        shards: Sequence[int] | None = None,
    ) -> Shape:
        """The smallest of `shapes` that holds N prefixes and `rows` rows each; None: a new one."""
        if not prefixes or min(map(len, prefixes)) < 1:
            raise ValueError(
                f"{len(prefixes)} prompts, of {[len(p) for p in prefixes][:8]} tokens: expected at "
                "least one prompt, and a token in each to continue from"
            )
        count, longest = len(prefixes), max(map(len, prefixes))
        if shards is not None:
            count = max(count, room_for(shards, self.shards))
        if shapes is None:
            groups, prefix = (1 << (n - 1).bit_length() for n in (count, longest))
            return Shape(groups, rows, prefix, self.stop.max_response)
        for shape in sorted(shapes):
            if shape.rows == rows and shape.groups >= count and shape.prefix >= longest:
                return shape
        raise ValueError(
            f"{count} groups of {rows} rows with prefixes of up to {longest} tokens fit none of the "
            f"compiled shapes {[tuple(s) for s in shapes]} (groups, rows, prefix, suffix)"
        )
