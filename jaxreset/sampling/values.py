"""What a state is worth: Monte Carlo estimates before each step of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreset.models.policy import Policy
from jaxreset.sampling.rounds import Round, Snapshot, Stream, apart
from jaxreset.sampling.sampler import Sampler

Score = Callable[[Sequence[int], Sequence[np.ndarray]], Any]


class StepValues(NamedTuple):
    """Values of the states before each step of a round's rows.

    Attributes:
      means: `[N][K]` arrays [steps] float64: the mean reward of the branches from before each step.
      errors: as `means`, their standard errors.
      tokens: sampled for all of it.
    """

    means: list[list[np.ndarray]]
    errors: list[list[np.ndarray]]
    tokens: int

    def advantages(self, rewards: np.ndarray) -> list[list[np.ndarray]]:
        """What each step adds to the value: `[N][K]` arrays [steps]; the last one leads to the reward.

        Args:
          rewards: `[N, K]` of the round's responses.
        """
        return [
            [np.diff(values, append=reward) for values, reward in zip(*of_group, strict=True)]
            for of_group in zip(self.means, rewards, strict=True)
        ]


def step_values(
    policy: Policy,
    sampler: Sampler,
    round_: Round,
    score: Score,
    *,
    branches: int = 8,
    stream: Stream | None = None,
    batch: int = 64,
    **draw: Any,
) -> StepValues:
    """Estimates what the state before each step of each row is worth, by sampling on from there.

    As VinePPO (arXiv 2410.01679) estimates its values. States that rows of a group share, such as that
    before the first step, are estimated once. Where the round holds its cache nothing is prefilled.

    Args:
      policy: whose continuations are drawn; the one that drew the round.
      sampler: that drew the round, without fixed `shapes` or with `forks` of `branches` rows from it.
      round_: of N groups of K rows; a row without a step has no values.
      score: (groups, responses) -> rewards: numbers of groups, token ids after their prompts.
      branches: continuations of each state.
      stream: names the random numbers; None: the round's own, in another phase.
      batch: states in one call of the sampler.
      **draw: `temperature`, `top_p`, `top_k` of the continuations.

    Raises:
      ValueError: as `Sampler.resume` does, or fewer than 2 branches.
    """
    if branches < 2:
        raise ValueError(f"branches={branches}: a standard error needs at least 2")
    spans = [
        [sampler.steps(round_.response(g, r)) for r in range(round_.lengths.shape[1])]
        for g in range(len(round_.prefixes))
    ]
    states: dict[tuple[int, bytes], Snapshot] = {}
    names: list[list[list[tuple[int, bytes]]]] = []
    for g, rows in enumerate(spans):
        names.append([])
        for r, steps in enumerate(rows):
            kept = int(len(round_.prefixes[g]) - round_.prompt_lengths[g])
            names[-1].append([])
            for start, _ in steps:
                # What the prefix keeps was drawn before the round: its value is that of its end.
                length = int(round_.prompt_lengths[g]) + max(start, kept)
                name = g, round_.response(g, r)[: max(start, kept)].tobytes()
                states.setdefault(name, Snapshot(round_, g, r, length))
                names[-1][-1].append(name)
    where, rewards, tokens = list(states), [], 0
    stream = stream or apart(round_.streams[-1], round_.streams)
    for first in range(0, len(where), batch):
        members = where[first : first + batch]
        drawn = sampler.resume(
            policy,
            [states[name] for name in members],
            rows=branches,
            stream=stream,
            # Several states of a prompt number their rows one after the other, so that they differ.
            first_rows=[(first + n) * branches for n in range(len(members))],
            **draw,
        )
        tokens += int(drawn.lengths.sum())
        groups = [name[0] for name in members for _ in range(branches)]
        responses = [drawn.response(n, r) for n in range(len(members)) for r in range(branches)]
        scored = np.asarray(score(groups, responses), np.float64)
        rewards.append(scored.reshape(len(members), branches))
    if not where:
        empty = [[np.zeros(0) for _ in rows] for rows in spans]
        return StepValues(empty, empty, 0)
    of_states = np.concatenate(rewards)
    means = dict(zip(where, of_states.mean(axis=1), strict=True))
    errors = dict(zip(where, of_states.std(axis=1, ddof=1) / branches**0.5, strict=True))

    def laid_out(values: dict[tuple[int, bytes], float]) -> list[list[np.ndarray]]:
        return [[np.array([values[name] for name in row]) for row in group] for group in names]

    return StepValues(laid_out(means), laid_out(errors), tokens)
