"""One step's rollouts: base round, verification, reset rule, reset rounds, as an `Objective` says.

prompts ─sample─▶ base round ─score─▶ seeds ─rule─▶ snapshots ─resume─▶ reset round ─score─▶ …
                                        ▲                                              │
                                        └────────────── next rung ─────────────────────┘
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxreset.groups import Group
from jaxreset.models.policy import Policy
from jaxreset.resets.objectives import Objective
from jaxreset.resets.rules import RULES, Failure, parse_answer
from jaxreset.sampling.rounds import Round, Snapshot, StopReason, Stream
from jaxreset.tasks.base import Task
from jaxreset.tasks.pipeline import Prompt
from jaxreset.tasks.scoring import Record, Verdicts, judge, score_together, verdicts

FAILED_BELOW = 0.5  # a score under it is a failure
CUT = StopReason.BUDGET, StopReason.LENGTH, StopReason.STEPS  # a response that a limit ended


class Rounds(Protocol):
    """What collecting needs of a sampler; see `sampling.Sampler`."""

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[np.ndarray],
        *,
        rows: int,
        stream: Stream,
        ids: Sequence[int] | None = None,
        first_rows: Sequence[int] | None = None,
    ) -> Round: ...
    def resume(
        self,
        policy: Policy,
        snapshots: Sequence[Snapshot],
        *,
        rows: int,
        stream: Stream,
        first_rows: Sequence[int] | None = None,
        release: bool = False,
    ) -> Round: ...
    def steps(self, response: np.ndarray) -> list[tuple[int, int]]: ...


class Localizer(Protocol):
    """Answers localisation questions; see `localize`."""

    def __call__(
        self, policy: Policy, failures: Sequence[Failure], ends: Sequence[Snapshot]
    ) -> tuple[list[str], int]:
        """The answers' texts, and the number of tokens sampled for them; `ends`: of the responses."""

    def compile(self, policy: Policy) -> None:
        """Compiles all that a call needs."""


@dataclass
class Collected:
    """A step's groups, its reset trees as JSON objects (one a prompt), and metrics."""

    groups: list[Group]
    trees: list[dict[str, Any]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Collector:
    """Draws and scores the groups of a batch of prompts.

    Attributes:
      objective: which groups.
      rounds: the sampler.
      task: scores responses.
      decode: token ids -> text; see `Policy.decode`.
      localizer: answers the localisation question; the rule `self` needs it.
      draw: `temperature`, `top_p` and `top_k` of the rollouts.
      interrupt: called before each round; what it raises ends the step, which has changed nothing yet.
      keep_errors: is given records of the responses that the verifier failed on; see `scoring.judge`.
    """

    objective: Objective
    rounds: Rounds
    task: Task
    decode: Callable[[np.ndarray], str]
    localizer: Localizer | None = None
    draw: dict[str, Any] = field(default_factory=dict)
    interrupt: Callable[[], None] = lambda: None
    keep_errors: Callable[[Sequence[Record]], None] = lambda errors: None

    def collect(
        self, policy: Policy, prompts: Sequence[Prompt], *, seed: int, step: int
    ) -> Collected:
        """Draws all groups of one step.

        Args:
          policy: whose weights draw.
          prompts: the batch.
          seed, step: with each prompt's index, they name every random number.

        Raises:
          RunError: the verifier failed on every response.
        """
        return _Step(self, policy, prompts, seed, step).run()


class _Rollout(NamedTuple):
    """A scored row of a round."""

    round: Round
    group: int
    row: int
    number: int  # among its prompt's rows of its phase
    text: str
    reward: float

    @property
    def failed(self) -> bool:
        return self.reward < FAILED_BELOW

    @property
    def response(self) -> np.ndarray:
        return self.round.response(self.group, self.row)


class _Place(NamedTuple):
    """Where a prompt's record holds a rollout: a row of a group, or (None) of the dropped seeds."""

    group: int | None
    row: int


class _Reset(NamedTuple):
    """A planned reset group: of which prompt, and from which failed rollout, by its place in the
    record (None: from the prompt)."""

    prompt: int
    snapshot: Snapshot
    seed: _Place | None
    step: int


class _Step:
    """The state of one step; each method is one box of the picture above."""

    def __init__(
        self, to: Collector, policy: Policy, prompts: Sequence[Prompt], seed: int, step: int
    ):
        self.to, self.policy, self.prompts = to, policy, prompts
        self.objective = to.objective
        # Phases: 0 the base round, then for each rung one of the localiser and one of the resets.
        self.stream = Stream(seed, step, phase=0)
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.totals: Counter[str] = Counter({"tokens_sampled": 0, "tokens/localizer": 0})
        self.verdicts: list[Verdicts] = []  # of each round
        self.lane_steps = 0
        self.rounds: list[Round] = []  # that the next rung may go back to
        self.groups: list[list[Group]] = [[] for _ in prompts]
        self.records: list[dict[str, Any]] = [
            {"index": p.number, "problem": p.problem.id, "question": p.problem.question, "groups": [],
             "localizations": []}
            for p in prompts
        ]  # fmt: skip

    def run(self) -> Collected:
        rollouts = self.base_round()
        candidates = []  # for each prompt, the failed rollouts that may be reset next
        for n, drawn in enumerate(rollouts):
            kept, seeds = self.split(drawn)
            if kept:
                self.add_group(n, kept, normalized_with=0)
            if self.objective.drop_seeds:
                self.records[n]["seeds"] = [_row_record(r) for r in seeds]
            candidates.append(seeds if self.objective.drop_seeds else self.resettable(kept))
            self.values["reward/mean"] += [r.reward for r in drawn]
        roots = [drawn[0] for drawn in rollouts]
        for rung in range(self.objective.rungs if self.objective.rule else 0):
            above, self.rounds = self.rounds, []
            candidates = self.reset_round(candidates, roots, rung)
            _release(above)  # the next rung goes back to this one
        _release(self.rounds)
        self.totals["verifier/errors"] = judge(
            self.verdicts, step=self.stream.step, evaluation=False, keep=self.to.keep_errors
        )
        means = {name: float(np.mean(values)) for name, values in self.values.items()}
        useful = self.totals["tokens_sampled"] - self.totals["tokens/localizer"]
        means["sampling/slot_utilization"] = useful / max(self.lane_steps, 1)
        groups = [group for of_prompt in self.groups for group in of_prompt]
        return Collected(groups, self.records, means | dict(self.totals))

    def base_round(self) -> list[list[_Rollout]]:
        """Rollouts from each prompt; where seeds are dropped, as many as it takes to find them."""
        o = self.objective
        everyone = range(len(self.prompts))
        drawn = self.sample(everyone, o.first_draw, 0)
        if not o.drop_seeds:
            return drawn
        short = [n for n in everyone if not self.split(drawn[n])[1]]
        if short:
            rest = self.sample(short, o.max_draws - o.first_draw, o.first_draw)
            for n, rollouts in zip(short, rest, strict=True):
                drawn[n] = drawn[n] + rollouts
        return drawn

    def split(self, drawn: list[_Rollout]) -> tuple[list[_Rollout], list[_Rollout]]:
        """The base group, and, where they are left out of it, the seeds: all that it takes or none."""
        o = self.objective
        if not o.drop_seeds:
            return drawn, []
        seeds = [r for r in drawn if r.failed and self.spans(r)][: o.resets]
        if len(seeds) < o.resets:
            seeds = []
        return [r for r in drawn if r not in seeds][: o.base], seeds

    def resettable(self, group: list[_Rollout]) -> list[_Rollout]:
        """The failed rollouts of a group that the objective may reset."""
        o = self.objective
        failed = [r for r in group if r.failed]
        if o.when == "all_failed" and len(failed) < len(group):
            return []
        found = [r for r in failed if self.spans(r)]
        return found[: o.resets] if o.seed_choice == "first" else found

    def reset_round(
        self, candidates: list[list[_Rollout]], roots: list[_Rollout], rung: int
    ) -> list[list[_Rollout]]:
        """One reset for every prompt that has candidates; returns the next rung's candidates."""
        o = self.objective
        steps = self.apply_rule(candidates, 1 + 2 * rung)
        resets: list[_Reset] = []
        for n, failed in enumerate(candidates):
            if rung == 0:
                self.values["reset/prompts"].append(bool(failed))
            # "first" has cut the candidates already; a stable sort keeps the first of equals.
            deepest = sorted(range(len(failed)), key=lambda i: -steps[n][i])
            for i in deepest[: o.resets] if o.seed_choice == "deepest" else range(len(failed)):
                resets.append(self.plan_reset(n, failed, i, steps[n][i]))
            if not failed and o.top_up:
                root = roots[n]
                start = Snapshot(root.round, root.group, root.row, len(self.prompts[n].tokens))
                resets += [_Reset(n, start, None, 1)] * o.resets
        following: list[list[_Rollout]] = [[] for _ in self.prompts]
        for reset, rollouts in zip(resets, self.resume(resets, 2 + 2 * rung), strict=True):
            n = reset.prompt
            if reset.seed is None:
                self.add_group(n, rollouts, normalized_with=0)
                continue
            apart = len(self.groups[n]) + 1
            self.add_group(n, rollouts, normalized_with=apart, reset=reset)
            following[n] = self.resettable(rollouts)
            self.values["reset/reward"].append(float(np.mean([r.reward for r in rollouts])))
            self.values["reset/corrected"].append(any(not r.failed for r in rollouts))
        return following

    def apply_rule(self, candidates: list[list[_Rollout]], phase: int) -> list[list[int]]:
        """The reset step of each candidate; the rule is called once for all."""
        asked = [
            (n, rollout, self.place(n, failed, i))
            for n, failed in enumerate(candidates)
            for i, rollout in enumerate(failed)
        ]
        if not asked or self.objective.rule is None:
            return [[] for _ in candidates]
        stream = self.stream._replace(phase=phase)
        failures = [
            Failure(
                self.to.task,
                self.prompts[n].problem,
                self.step_texts(rollout),
                (*stream, self.prompts[n].number, rollout.number),
            )
            for n, rollout, _ in asked
        ]
        members = {f.seed: member for f, member in zip(failures, asked, strict=True)}

        def ask(failures: Sequence[Failure]) -> list[str]:
            about = [members[f.seed] for f in failures]
            if self.to.localizer is None:
                raise ValueError("reset.rule=self asks the policy; the collector has no localizer")
            self.to.interrupt()
            ends = [self.end(rollout) for _, rollout, _ in about]
            texts, tokens = self.to.localizer(self.policy, failures, ends)
            self.totals["tokens_sampled"] += tokens
            self.totals["tokens/localizer"] += tokens
            for (n, _, place), failure, text in zip(about, failures, texts, strict=True):
                answer = parse_answer(text, len(failure.steps))
                truth = self.to.task.first_wrong_step(failure.problem, failure.steps)
                self.values["reset/answer_boxed"].append(answer.source == "boxed")
                if truth is not None:
                    self.values["reset/blame_right"].append(answer.step == truth)
                self.records[n]["localizations"].append(
                    {**place._asdict(), "answer": text, "step": answer.step, "truth": truth}
                )
            return texts

        steps = iter(RULES[self.objective.rule](failures, ask))
        return [[next(steps) for _ in failed] for failed in candidates]

    def end(self, rollout: _Rollout) -> Snapshot:
        """The end of a response, its end-of-sequence token left out."""
        round_, group, row = rollout.round, rollout.group, rollout.row
        length = len(round_.prefixes[group]) + int(round_.lengths[group, row])
        return Snapshot(round_, group, row, length - (round_.reasons[group, row] == StopReason.EOS))

    def plan_reset(self, n: int, failed: list[_Rollout], i: int, step: int) -> _Reset:
        seed = failed[i]
        kept = self.spans(seed)[step - 1][0]
        self.values["reset/step"].append(step)
        self.values["reset/kept_tokens"].append(kept)
        length = len(self.prompts[n].tokens) + kept
        snapshot = Snapshot(seed.round, seed.group, seed.row, length)
        return _Reset(n, snapshot, self.place(n, failed, i), step)

    def place(self, n: int, failed: list[_Rollout], i: int) -> _Place:
        if self.objective.drop_seeds:
            return _Place(None, i)
        return _Place(len(self.groups[n]) - 1, failed[i].row)

    def sample(self, members: Sequence[int], rows: int, first_row: int) -> list[list[_Rollout]]:
        """`rows` more scored rollouts of the base phase for each of the prompts `members`."""
        self.to.interrupt()
        round_ = self.to.rounds.sample(
            self.policy,
            [self.prompts[n].tokens for n in members],
            rows=rows,
            stream=self.stream,
            ids=[self.prompts[n].number for n in members],
            first_rows=[first_row] * len(members),
            **self.to.draw,
        )
        return self.score(round_, members, [first_row] * len(members))

    def resume(self, resets: Sequence[_Reset], phase: int) -> list[list[_Rollout]]:
        """Scored branches of each reset; those whose snapshots are of one round are drawn together."""
        rows = self.objective.branches
        # Several groups of one prompt number their rows one after the other, so that they differ.
        prompts = [reset.prompt for reset in resets]
        first_rows = [rows * prompts[:i].count(n) for i, n in enumerate(prompts)]
        drawn: dict[int, list[_Rollout]] = {}
        for parent in {id(r.snapshot.round): r.snapshot.round for r in resets}.values():
            members = [i for i, reset in enumerate(resets) if reset.snapshot.round is parent]
            first = [first_rows[i] for i in members]
            self.to.interrupt()
            round_ = self.to.rounds.resume(
                self.policy,
                [resets[i].snapshot for i in members],
                rows=rows,
                stream=self.stream._replace(phase=phase),
                first_rows=first,
                release=True,
                **self.to.draw,
            )
            scored = self.score(round_, [prompts[i] for i in members], first)
            drawn.update(zip(members, scored, strict=True))
        return [drawn[i] for i in range(len(resets))]

    def score(
        self, round_: Round, members: Sequence[int], first_rows: Sequence[int]
    ) -> list[list[_Rollout]]:
        """Verifies a round's rows, [N][K]; group g belongs to prompt `members[g]`."""
        self.rounds.append(round_)
        n, k = round_.lengths.shape
        cells = [(g, r) for g in range(n) for r in range(k)]
        texts = [self.to.decode(round_.response(g, r)) for g, r in cells]
        problems = [self.prompts[members[g]].problem for g, _ in cells]
        items = list(zip(problems, texts, strict=True))
        scores = score_together(self.to.task, items)
        self.verdicts.append(verdicts(items, scores))
        self.totals["tokens_sampled"] += int(round_.lengths.sum())
        self.totals["verifier/timeouts"] += len(scores.timeouts)
        self.lane_steps += round_.lane_steps
        self.values["response/cut"] += np.isin(round_.reasons, CUT).ravel().tolist()
        self.values["response/answered"] += [self.to.task.answer_marker in text for text in texts]
        self.values["response/drawn_tokens"] += round_.lengths.ravel().tolist()
        rollouts = [
            _Rollout(round_, g, r, first_rows[g] + r, text, float(reward))
            for (g, r), text, reward in zip(cells, texts, scores.rewards, strict=True)
        ]
        return [rollouts[g * k : (g + 1) * k] for g in range(n)]

    def add_group(
        self, n: int, rollouts: list[_Rollout], *, normalized_with: int, reset: _Reset | None = None
    ) -> None:
        first = rollouts[0]
        prefix = first.round.prefixes[first.group]
        group = Group(
            prompt=n,
            prefix=prefix,
            suffixes=[r.round.suffix(r.group, r.row) for r in rollouts],
            behavior_logps=[
                r.round.behavior_logps[r.group, r.row, : r.round.lengths[r.group, r.row]]
                for r in rollouts
            ],
            rewards=np.array([r.reward for r in rollouts]),
            cut=np.array([r.round.reasons[r.group, r.row] in CUT for r in rollouts]),
            normalized_with=normalized_with,
            reset_step=None if reset is None else reset.step,
        )
        self.groups[n].append(group)
        seed = None if reset is None else reset.seed
        self.records[n]["groups"].append(
            {
                "normalized_with": normalized_with,
                "reset_step": group.reset_step,
                "parent_group": None if seed is None else seed.group,
                "parent_row": None if seed is None else seed.row,
                "kept": self.to.decode(prefix[len(self.prompts[n].tokens) :]),
                "rows": [_row_record(r) for r in rollouts],
            }
        )

    def spans(self, rollout: _Rollout) -> list[tuple[int, int]]:
        return self.to.rounds.steps(rollout.response)

    def step_texts(self, rollout: _Rollout) -> list[str]:
        # Of white space, with which it may begin or end, nothing is left at the ends of a text.
        response, delimiter = rollout.response, self.to.task.delimiter.strip()
        texts = [self.to.decode(response[a:b]) for a, b in self.spans(rollout)]
        return [text.strip().removesuffix(delimiter).strip() for text in texts]


def _release(rounds: Sequence[Round]) -> None:
    for round_ in rounds:
        round_.release()


def _row_record(rollout: _Rollout) -> dict[str, Any]:
    round_, group, row = rollout.round, rollout.group, rollout.row
    return {
        "text": rollout.text,
        "reward": rollout.reward,
        "tokens": int(round_.lengths[group, row]),
        "end": StopReason(int(round_.reasons[group, row])).name.lower(),
    }
