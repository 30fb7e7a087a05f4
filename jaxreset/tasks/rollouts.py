"""Rollouts: the rows of a round, decoded and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreset.sampling.rounds import Round, Snapshot, StopReason
from jaxreset.tasks.base import Problem, ScoreItems
from jaxreset.tasks.scoring import Verdicts, score_together, verdicts

CUT = StopReason.BUDGET, StopReason.LENGTH, StopReason.STEPS  # a response that a limit ended


class Rollout(NamedTuple):
    """A scored row of a round.

    Attributes:
      round, group, row: where it is.
      text: of its response, kept steps among it.
      reward, failed: of the response, and whether that is a failure.
      parts: of several rewards, each one's own.
    """

    round: Round
    group: int
    row: int
    text: str
    reward: float
    failed: bool
    parts: dict[str, float]

    @property
    def response(self) -> np.ndarray:
        """All tokens after the prompt, kept ones among them."""
        return self.round.response(self.group, self.row)

    @property
    def drawn(self) -> np.ndarray:
        """The tokens that it drew."""
        return self.round.suffix(self.group, self.row)

    @property
    def logps(self) -> np.ndarray:
        """Their log-probabilities when drawn, float32."""
        return self.round.behavior_logps[self.group, self.row, : len(self.drawn)]

    @property
    def end(self) -> StopReason:
        """Why it ended."""
        return StopReason(int(self.round.reasons[self.group, self.row]))

    @property
    def cut(self) -> bool:
        """Whether a limit ended it."""
        return self.end in CUT

    @property
    def last(self) -> Snapshot:
        """The end of its response, the end-of-sequence token left out."""
        length = len(self.round.prefixes[self.group]) + len(self.drawn)
        return Snapshot(self.round, self.group, self.row, length - (self.end == StopReason.EOS))

    def as_json(self) -> dict[str, Any]:
        """What a reset tree says of it."""
        record: dict[str, Any] = {"text": self.text, "reward": self.reward}
        record |= {"tokens": len(self.drawn), "end": self.end.name.lower()}
        return record | ({"rewards": self.parts} if self.parts else {})


def format_values(
    rollouts: Sequence[Rollout], steps: Sequence[int], marker: str
) -> dict[str, list[float]]:
    """Of each rollout how well it keeps to the format: lists in their order, by the metric's name.

    Args:
      rollouts: with responses of so many `steps`.
      marker: that an answer begins with.
    """
    values: dict[str, list[float]] = {
        "answered": [float(holds_marker(r.text, marker)) for r in rollouts],
        "steps": [float(count) for count in steps],
        "drawn_tokens": [float(len(r.drawn)) for r in rollouts],
        "cut": [float(r.cut) for r in rollouts],
    }
    for reason in list(StopReason)[1:]:  # all that end a row
        values[f"ended_by_{reason.name.lower()}"] = [float(r.end == reason) for r in rollouts]
    return values


def holds_marker(text: str, marker: str) -> bool:
    """Whether an answer marker is in a response; a line break at its end needs not have been written."""
    return marker in f"{text}\n"


class Scored(NamedTuple):
    """A round's rollouts `[N][K]`, how often a deadline fired, and what the verifier made of them."""

    rollouts: list[list[Rollout]]
    timeouts: int
    verdicts: Verdicts


def score_round(
    round_: Round,
    problems: Sequence[Problem],
    *,
    score: ScoreItems,
    failed_below: float,
    decode: Callable[[np.ndarray], str],
) -> Scored:
    """Verifies all rows of a round; every process calls it with the same.

    Args:
      round_: of N groups.
      problems: [N], that each group is about.
      score: rewards of (problem, response text) pairs.
      failed_below: a reward under it is a failure.
      decode: token ids -> text.
    """
    n, k = round_.lengths.shape
    cells = [(g, r) for g in range(n) for r in range(k)]
    items = [(problems[g], decode(round_.response(g, r))) for g, r in cells]
    scores = score_together(score, items)
    rollouts = [
        Rollout(
            round_,
            g,
            r,
            items[i][1],
            float(scores.rewards[i]),
            bool(scores.rewards[i] < failed_below),
            {name: float(part[i]) for name, part in scores.parts.items()},
        )
        for i, (g, r) in enumerate(cells)
    ]
    rows = [rollouts[g * k : (g + 1) * k] for g in range(n)]
    return Scored(rows, len(scores.timeouts), verdicts(items, scores))
