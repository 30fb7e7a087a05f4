"""Accuracy on held-out problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from jaxreset.models.policy import Policy
from jaxreset.run.experiment import Experiment
from jaxreset.sampling.rounds import Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.base import Task
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
    task: Task,
    decode: Callable[[np.ndarray], str],
    *,
    batch: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int,
    step: int = 0,
    interrupt: Callable[[], None] = lambda: None,
    keep_errors: Callable[[Sequence[Record]], None] = lambda errors: None,
) -> Accuracy:
    """Draws one response to each prompt and verifies it; temperature 0 is greedy.

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
    scores = score_together(task, items)
    errors = judge([verdicts(items, scores)], step=step, evaluation=True, keep=keep_errors)
    solved = int((scores.rewards >= 0.5).sum())
    interval = binomtest(solved, len(items)).proportion_ci(method="wilson")
    return Accuracy(solved / len(items), float(interval.low), float(interval.high), errors)


def evaluations(experiment: Experiment, policy: Policy, step: int) -> dict[str, float]:
    """Greedy and sampled accuracy on the held-out problems."""
    config = experiment.config
    prompts = experiment.test_prompts()

    def accuracy(**draw: Any) -> Accuracy:
        return evaluate(
            policy,
            prompts,
            experiment.sampler,
            experiment.task,
            experiment.decode,
            batch=config.eval.batch,
            seed=config.seed,
            step=step,
            interrupt=experiment.collector.interrupt,
            keep_errors=experiment.collector.keep_errors,
            **draw,
        )

    e = config.eval
    sampled = accuracy(temperature=e.temperature, top_p=e.top_p, top_k=e.top_k)
    greedy = accuracy(temperature=0.0)
    return {
        "eval/accuracy": sampled.mean,
        "eval/accuracy_low": sampled.low,
        "eval/accuracy_high": sampled.high,
        "eval/greedy_accuracy": greedy.mean,
        "eval/problems": float(len(prompts)),
        "eval/verifier_errors": float(sampled.errors + greedy.errors),
    }
