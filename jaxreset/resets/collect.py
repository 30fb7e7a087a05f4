"""One step's rollouts: base round, verification, reset rule, reset rounds, as an `Objective` says.

prompts ─sample─▶ base round ─score─▶ seeds ─rule─▶ snapshots ─resume─▶ reset round ─score─▶ …
                                        ▲                                              │
                                        └────────────── next rung ─────────────────────┘
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from jaxreset.groups import Group
from jaxreset.models.policy import Policy
from jaxreset.resets.localize import Localizer
from jaxreset.resets.objectives import FEW, Objective
from jaxreset.resets.rules import Cut, Failure, Written, apply_rule
from jaxreset.sampling.rounds import Round, Snapshot, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.base import ScoreItems, Task
from jaxreset.tasks.localization import parse_answer
from jaxreset.tasks.pipeline import Prompt
from jaxreset.tasks.rollouts import Rollout, format_values, score_round
from jaxreset.tasks.scoring import Record, Verdicts, judge


@dataclass
class Collected:
    """A step's groups, over which it iterates, its reset trees (JSON objects, one a prompt), metrics."""

    groups: list[Group]
    trees: list[dict[str, Any]]
    metrics: dict[str, float]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)


@dataclass(frozen=True)
class Collector:
    """Draws and scores the groups of a batch of prompts.

    Attributes:
      objective: which groups.
      rounds: the sampler.
      task: what the problems are of.
      decode: token ids -> text; see `Policy.decode`.
      localizer: answers the localisation question of rules that ask.
      draw: `temperature`, `top_p` and `top_k` of the rollouts.
      interrupt: called before each round; what it raises ends the step, which has changed nothing yet.
      keep_errors: is given records of the responses that the verifier failed on; see `scoring.judge`.
      score: rewards of responses; None: the task's own.
      failed_below: a reward under it is a failure.
      write: steps -> the token ids that a response begins with; rules that write steps in need it.
    """

    objective: Objective
    rounds: Sampler
    task: Task
    decode: Callable[[np.ndarray], str]
    localizer: Localizer | None = None
    draw: dict[str, Any] = field(default_factory=dict)
    interrupt: Callable[[], None] = lambda: None
    keep_errors: Callable[[Sequence[Record]], None] = lambda errors: None
    score: ScoreItems | None = None
    failed_below: float = 0.5
    write: Callable[[Sequence[str]], np.ndarray] | None = None

    def collect(
        self, policy: Policy, prompts: Sequence[Prompt], *, seed: int, step: int
    ) -> Collected:
        """Draws all groups of one step with the policy's weights; `seed` and `step` name, with each
        prompt's number, every random number.

        Raises:
          RunError: the verifier failed on every response.
        """
        return _Step(self, policy, prompts, seed, step).run()


class _Seed(NamedTuple):
    """A failed rollout, by where the tree has it: a row of a group, or (None) of the dropped seeds."""

    group: int | None
    row: int


class _Start(NamedTuple):
    """Where a group begins: at a snapshot, or else behind its prompt and what was `written` there.

    Attributes:
      prompt: of which.
      first_row: number of its first row among the prompt's rows of the phase.
      seed: the failed rollout that it goes back to, by where the tree has it; None: it is no reset.
      step: before which it begins.
      kept_logps: of the kept tokens.
      cuts: the resets that the seed comes from.
    """

    prompt: int
    first_row: int
    snapshot: Snapshot | None = None
    written: np.ndarray = np.zeros(0, np.int32)
    seed: _Seed | None = None
    step: int | None = None
    kept_logps: np.ndarray = np.zeros(0, np.float32)
    cuts: tuple[Cut, ...] = ()

    @property
    def parent(self) -> Round | None:
        return self.snapshot and self.snapshot.round


class _Step:
    """The state of one step; each method is one box of the picture above."""

    def __init__(
        self, to: Collector, policy: Policy, prompts: Sequence[Prompt], seed: int, step: int
    ):
        self.to, self.policy, self.prompts = to, policy, prompts
        self.objective, self.rule = to.objective, to.objective.find_rule()
        # Phases: 0 the base round, then for each rung one of the localiser and one of the resets.
        self.stream = Stream(seed, step, phase=0)
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.totals: Counter[str] = Counter({"tokens_sampled": 0, "tokens/localizer": 0})
        self.verdicts: list[Verdicts] = []  # of each round
        self.lane_steps = 0
        self.rounds: list[Round] = []  # that the next rung may go back to
        self.origins: dict[tuple[Round, int], tuple[_Start, tuple[Cut, ...]]] = {}  # of each group
        self.groups: list[list[Group]] = [[] for _ in prompts]
        named = [{"index": p.number, "problem": p.problem.id} for p in prompts]
        self.trees: list[dict[str, Any]] = [
            {**name, "question": p.problem.question, "groups": [], "localizations": []}
            for name, p in zip(named, prompts, strict=True)
        ]

    def run(self) -> Collected:
        rollouts = self.base_round()
        candidates = []  # for each prompt, the failed rollouts that may be reset next
        for n, drawn in enumerate(rollouts):
            kept, seeds = self.split(drawn)
            if kept:
                self.add_group(n, kept, normalized_with=0)
            if self.objective.drop_seeds:
                self.trees[n]["seeds"] = [r.as_json() for r in seeds]
            candidates.append(seeds if self.objective.drop_seeds else self.resettable(kept))
            self.values["reward/mean"] += [r.reward for r in drawn]
            for name in drawn[0].parts:
                self.values[f"reward/{name}"] += [r.parts[name] for r in drawn]
        roots = [drawn[0] for drawn in rollouts]
        for rung in range(self.objective.rungs if self.rule else 0):
            above, self.rounds = self.rounds, []
            candidates = self.reset_round(candidates, roots, rung)
            for round_ in above:
                round_.release()  # the next rung goes back to this one
        for round_ in self.rounds:
            round_.release()
        self.totals["verifier/errors"] = judge(
            self.verdicts, step=self.stream.step, evaluation=False, keep=self.to.keep_errors
        )
        metrics = {name: float(np.mean(values)) for name, values in self.values.items()}
        useful = self.totals["tokens_sampled"] - self.totals["tokens/localizer"]
        metrics["sampling/slot_utilization"] = useful / max(self.lane_steps, 1)
        return Collected(list(chain(*self.groups)), self.trees, metrics | dict(self.totals))

    def base_round(self) -> list[list[Rollout]]:
        """Rollouts from each prompt; where seeds are dropped, as many as it takes to find them."""
        o, everyone = self.objective, range(len(self.prompts))
        drawn = self.draw([_Start(n, 0) for n in everyone], o.first_draw, phase=0)
        if not o.drop_seeds:
            return drawn
        short = [n for n in everyone if not self.split(drawn[n])[1]]
        if short:
            more = [_Start(n, o.first_draw) for n in short]
            rest = self.draw(more, o.max_draws - o.first_draw, phase=0)
            for n, rollouts in zip(short, rest, strict=True):
                drawn[n] = drawn[n] + rollouts
        return drawn

    def split(self, drawn: list[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
        """The base group, and, where they are left out of it, the seeds: all that it takes or none."""
        o = self.objective
        if not o.drop_seeds:
            return drawn, []
        seeds = [r for r in drawn if r.failed and self.spans(r)][: o.resets]
        seeds = seeds if len(seeds) == o.resets else []
        return [r for r in drawn if r not in seeds][: o.base], seeds

    def resettable(self, group: list[Rollout]) -> list[Rollout]:
        """The failed rollouts of a group that the objective may reset."""
        o = self.objective
        failed = [r for r in group if r.failed]
        if o.when == "all_failed" and len(failed) < len(group):
            return []
        if o.when == "few_failed" and len(failed) > max(FEW * len(group), 1):
            return []
        found = [r for r in failed if self.spans(r)]
        return found[: o.resets] if o.seed_choice == "first" else found

    def reset_round(
        self, candidates: list[list[Rollout]], roots: list[Rollout], rung: int
    ) -> list[list[Rollout]]:
        """One reset for every prompt that has candidates; returns the next rung's candidates."""
        o = self.objective
        chosen = self.apply_rule(candidates, 1 + 2 * rung)
        starts: list[_Start] = []
        for n, failed in enumerate(candidates):
            if rung == 0:
                self.values["reset/prompts"].append(bool(failed))
            planned = [self.plan_reset(n, failed, i, step) for i, step in enumerate(chosen[n])]
            if (
                o.seed_choice == "deepest"
            ):  # "first" has cut the candidates already; sorting is stable
                planned = sorted(planned, key=lambda start: -(start.step or 0))[: o.resets]
            for start in planned:
                self.values["reset/step"].append(start.step or 0)
                self.values["reset/kept_tokens"].append(len(start.kept_logps))
            if not failed and o.top_up:
                root = roots[n]
                at = Snapshot(root.round, root.group, root.row, len(self.prompts[n].tokens))
                planned = [_Start(n, 0, at)] * o.resets
            # Several groups of one prompt number their rows one after the other, so that they differ.
            starts += [start._replace(first_row=i * o.branches) for i, start in enumerate(planned)]
        following: list[list[Rollout]] = [[] for _ in self.prompts]
        for start, rollouts in zip(starts, self.resume(starts, 2 + 2 * rung), strict=True):
            n = start.prompt
            if start.seed is None:
                self.add_group(n, rollouts, normalized_with=0)
                continue
            self.add_group(n, rollouts, normalized_with=len(self.groups[n]) + 1, start=start)
            following[n] = self.resettable(rollouts)
            self.values["reset/reward"].append(float(np.mean([r.reward for r in rollouts])))
            self.values["reset/corrected"].append(any(not r.failed for r in rollouts))
        return following

    def apply_rule(self, candidates: list[list[Rollout]], phase: int) -> list[list[int | Written]]:
        """What the rule says of each candidate; it is called once for all."""
        asked = [
            (n, rollout, self.seed(n, failed, i))
            for n, failed in enumerate(candidates)
            for i, rollout in enumerate(failed)
        ]
        if not asked or self.rule is None:
            return [[] for _ in candidates]
        failures = [self.failure(n, rollout, phase) for n, rollout, _ in asked]
        members = {f.seed: member for f, member in zip(failures, asked, strict=True)}

        def ask(failures: Sequence[Failure]) -> list[str]:
            about = [members[f.seed] for f in failures]
            if self.to.localizer is None:
                name = self.objective.rule
                raise ValueError(
                    f"reset.rule={name} asks the policy; the collector has no localizer"
                )
            self.to.interrupt()
            ends = [rollout.last for _, rollout, _ in about]
            texts, tokens = self.to.localizer(self.policy, failures, ends)
            self.totals["tokens_sampled"] += tokens
            self.totals["tokens/localizer"] += tokens
            for (n, _, place), failure, text in zip(about, failures, texts, strict=True):
                answer = parse_answer(text, len(failure.steps))
                truth = self.to.task.first_wrong_step(failure.problem, failure.steps)
                self.values["reset/answer_boxed"].append(answer.source == "boxed")
                if truth is not None:
                    self.values["reset/blame_right"].append(answer.step == truth)
                self.trees[n]["localizations"].append(
                    {**place._asdict(), "answer": text, "step": answer.step, "truth": truth}
                )
            return texts

        steps = iter(apply_rule(self.rule, failures, ask))
        return [[next(steps) for _ in failed] for failed in candidates]

    def failure(self, n: int, rollout: Rollout, phase: int) -> Failure:
        """A rollout as the rule sees it."""
        start, cuts = self.origins[rollout.round, rollout.group]
        name = (*self.stream._replace(phase=phase), self.prompts[n].number)
        spans, logps = self.spans(rollout), self.logps(rollout)
        # Of white space, with which it may begin or end, nothing is left at the ends of a text.
        delimiter = self.to.task.delimiter.strip()
        texts = [self.to.decode(rollout.response[a:b]).strip() for a, b in spans]
        return Failure(
            self.to.task,
            self.prompts[n].problem,
            [text.removesuffix(delimiter).strip() for text in texts],
            (*name, start.first_row + rollout.row),
            [logps[a:b] for a, b in spans],
            cuts,
        )

    def plan_reset(self, n: int, failed: list[Rollout], i: int, step: int | Written) -> _Start:
        """The reset of a candidate."""
        seed = failed[i]
        cuts = self.origins[seed.round, seed.group][1]
        start = _Start(n, 0, seed=self.seed(n, failed, i), cuts=cuts)
        if isinstance(step, Written):
            assert self.to.write is not None  # the experiment's part
            tokens = self.to.write(step.steps)
            number, sure = len(self.to.rounds.steps(tokens)) + 1, np.zeros(len(tokens), np.float32)
            return start._replace(written=tokens, step=number, kept_logps=sure)
        kept = self.spans(seed)[step - 1][0]
        length = len(self.prompts[n].tokens) + kept
        snapshot = Snapshot(seed.round, seed.group, seed.row, length)
        return start._replace(snapshot=snapshot, step=step, kept_logps=self.logps(seed)[:kept])

    def seed(self, n: int, failed: list[Rollout], i: int) -> _Seed:
        dropped = self.objective.drop_seeds
        return _Seed(None, i) if dropped else _Seed(len(self.groups[n]) - 1, failed[i].row)

    def resume(self, starts: Sequence[_Start], phase: int) -> list[list[Rollout]]:
        """Scored branches of each start; those whose snapshots are of one round are drawn together."""
        drawn: dict[int, list[Rollout]] = {}
        for parent in {id(start.parent): start.parent for start in starts}.values():
            members = [i for i, start in enumerate(starts) if start.parent is parent]
            together = [starts[i] for i in members]
            drawn |= zip(members, self.draw(together, self.objective.branches, phase), strict=True)
        return [drawn[i] for i in range(len(starts))]

    def draw(self, starts: Sequence[_Start], rows: int, phase: int) -> list[list[Rollout]]:
        """Scored rows from snapshots of one round, or all from behind their prompts."""
        self.to.interrupt()
        options = {"rows": rows, "stream": self.stream._replace(phase=phase), **self.to.draw}
        options["first_rows"] = [start.first_row for start in starts]
        snapshots = [start.snapshot for start in starts if start.snapshot is not None]
        if snapshots:
            round_ = self.to.rounds.resume(self.policy, snapshots, release=True, **options)
        else:
            tokens = [np.concatenate([self.prompts[s.prompt].tokens, s.written]) for s in starts]
            if phase:  # what is written counts towards a response's limits
                options["kept"] = [len(start.written) for start in starts]
            ids = [self.prompts[start.prompt].number for start in starts]
            round_ = self.to.rounds.sample(self.policy, tokens, ids=ids, **options)
        return self.score(round_, starts)

    def score(self, round_: Round, starts: Sequence[_Start]) -> list[list[Rollout]]:
        """Verifies a round's rows, [N][K]; group g began at `starts[g]`."""
        self.rounds.append(round_)
        scored = score_round(
            round_,
            [self.prompts[start.prompt].problem for start in starts],
            score=self.to.score or self.to.task.score,
            failed_below=self.to.failed_below,
            decode=self.to.decode,
        )
        self.verdicts.append(scored.verdicts)
        self.totals["tokens_sampled"] += int(round_.lengths.sum())
        self.totals["verifier/timeouts"] += scored.timeouts
        self.lane_steps += round_.lane_steps
        for g, (start, drawn) in enumerate(zip(starts, scored.rollouts, strict=True)):
            solved = float(np.mean([not r.failed for r in drawn]))
            cut = () if start.step is None else (Cut(start.step, solved),)
            self.origins[round_, g] = start, start.cuts + cut
            steps = [len(self.spans(r)) for r in drawn]
            for name, values in format_values(drawn, steps, self.to.task.answer_marker).items():
                self.values[f"response/{name}"] += values
        return scored.rollouts

    def add_group(
        self, n: int, rollouts: list[Rollout], *, normalized_with: int, start: _Start | None = None
    ) -> None:
        first, seed = rollouts[0], None if start is None else start.seed
        prompt, prefix = self.prompts[n].tokens, first.round.prefixes[first.group]
        own = start is not None and start.snapshot is not None  # the policy wrote what is kept
        whole = own and self.objective.mask == "response"
        group = Group(
            prompt=n,
            prefix=prompt if whole else prefix,
            suffixes=[r.response if whole else r.drawn for r in rollouts],
            behavior_logps=[self.logps(r) if whole else r.logps for r in rollouts],
            rewards=np.array([r.reward for r in rollouts]),
            cut=np.array([r.cut for r in rollouts]),
            normalized_with=normalized_with,
            reset_step=None if start is None else start.step,
            parent=seed if own else None,
        )
        self.groups[n].append(group)
        self.trees[n]["groups"].append(
            {
                "normalized_with": normalized_with,
                "reset_step": group.reset_step,
                "parent_group": None if seed is None else seed.group,
                "parent_row": None if seed is None else seed.row,
                "kept": self.to.decode(prefix[len(prompt) :]),
                "rows": [r.as_json() for r in rollouts],
            }
        )

    def spans(self, rollout: Rollout) -> list[tuple[int, int]]:
        """Of the steps of its response."""
        return self.to.rounds.steps(rollout.response)

    def logps(self, rollout: Rollout) -> np.ndarray:
        """Of all tokens of its response, when they were drawn."""
        start, _ = self.origins[rollout.round, rollout.group]
        return np.concatenate([start.kept_logps, rollout.logps])
