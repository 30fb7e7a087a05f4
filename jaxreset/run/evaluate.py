"""Accuracy on held-out problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from jaxreset.models.policy import Policy
from jaxreset.sampling.rounds import Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.base import ScoreItems
from jaxreset.tasks.pipeline import Prompt
from jaxreset.tasks.scoring import Record, judge, score_together, verdicts

PHASE = 2**16  # of the random streams, apart from those of training


class Accuracy(NamedTuple):
    """A share of problems solved, with its 95% Wilson interval.

    `errors`: responses that the verifier failed on, which count as wrong.
    """

    mean: float
    low: float
    high: float
    errors: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    score: ScoreItems,
    decode: Callable[[np.ndarray], str],
    *,
    batch: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int,
    step: int = 0,
    failed_below: float = 0.5,
    interrupt: Callable[[], None] = lambda: None,
    keep_errors: Callable[[Sequence[Record]], None] = lambda errors: None,
) -> Accuracy:
    """Draws one response to each prompt and verifies it; temperature 0 is greedy.

    A problem is solved where its reward isn't under `failed_below`.
    `interrupt` is called before each batch and may raise; `keep_errors` is given records of the
    responses that the verifier failed on.

    Raises:
      RunError: those are all.
    """
    items = []
    for first in range(0, len(prompts), batch):
        interrupt()
        members = prompts[first : first + batch]
        round_ = sampler.sample(
            policy,
            [p.tokens for p in members],
            rows=1,
            stream=Stream(seed, step, PHASE),
            ids=[p.number for p in members],
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        items += [(p.problem, decode(round_.response(n, 0))) for n, p in enumerate(members)]
    scores = score_together(score, items)
    errors = judge([verdicts(items, scores)], step=step, evaluation=True, keep=keep_errors)
    solved = int((scores.rewards >= failed_below).sum())
    interval = binomtest(solved, len(items)).proportion_ci(method="wilson")
    return Accuracy(solved / len(items), float(interval.low), float(interval.high), errors)
