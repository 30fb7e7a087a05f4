"""Rewards: plain functions of a problem and a response, one or several of them, weighted.

    def correct(problem, response): ...          -> float; in worker processes, under a deadline
    def correct(problems, responses): ...        -> a float each; in this process, a round at a time

The names of the parameters tell the two apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreset import extensions
from jaxreset.tasks.base import Item, ScoreItems, Scores, Task
from jaxreset.tasks.scoring import score_alone
from jaxreset.tasks.workers import RewardWorkers

logger = logging.getLogger(__name__)

OWN = "task"  # names the task's own verifier among several rewards
EXPECTED = "a function of (problem, response), or of (problems, responses) for many at once"

Reward = Callable[..., Any]


class Weighted(NamedTuple):
    """One of several rewards: its function, None for the task's own verifier, and its weight."""

    function: Reward | None
    weight: float = 1.0


def find_reward(name: str) -> Reward | None:
    """The function of an import path; None for `OWN`.

    Raises:
      ValueError: there is none, or it can't be called as a reward.
    """
    found = extensions.find(name, {OWN: None}, "reward")
    return None if found is None else check_reward(found)


def check_reward(function: Reward) -> Reward:
    """The function, if it can be called as a reward; raises `ValueError`."""
    extensions.check_call(function, EXPECTED, count=2)
    if is_batched(function) is None:
        names = ", ".join(p.name for p in extensions.parameters(function, EXPECTED))
        raise ValueError(
            f"{extensions.path_of(function)} takes ({names}), which doesn't say whether it gets one "
            f"response or many; expected {EXPECTED}, by these names"
        )
    return function


def is_batched(function: Reward) -> bool | None:
    """Whether it takes many responses at once; None: its parameters' names don't say."""
    names = [p.name for p in extensions.parameters(function, EXPECTED)][:2]
    return {"problem response": False, "problems responses": True}.get(" ".join(names))


class Rewards:
    """Scores responses by several rewards: their weighted sum, and each apart (`Scores.parts`).

    A response on which one of them fails scores 0 in all.

    Args:
      task: whose own verifier may be one of them.
      parts: the rewards by name.
      processes, cpu_seconds: of the workers of each that takes one response at a time.
    """

    def __init__(
        self, task: Task, parts: Mapping[str, Weighted], *, processes: int, cpu_seconds: float
    ):
        self._weights = {name: part.weight for name, part in parts.items()}
        self._scorers: dict[str, ScoreItems] = {}
        self._workers: list[RewardWorkers] = []
        for name, (function, _) in parts.items():
            if function is None:
                self._scorers[name] = task.score
            elif is_batched(function):
                self._scorers[name] = _many_at_once(function)
            elif extensions.importable(function):
                workers = RewardWorkers(function, processes=processes, cpu_seconds=cpu_seconds)
                self._workers.append(workers)
                self._scorers[name] = workers.score
            else:
                logger.warning(
                    "reward %s (%s) can't be imported by worker processes: it runs in this one, without a "
                    "deadline",
                    name,
                    extensions.path_of(function),
                )
                self._scorers[name] = _one_by_one(function)

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs, in their order."""
        parts, timeouts, errors = {}, set[int](), dict[int, str]()
        total = np.zeros(len(items), np.float64)
        for name, scorer in self._scorers.items():
            scores = score_alone(scorer, items)
            parts[name] = scores.rewards
            total += self._weights[name] * scores.rewards
            timeouts |= set(scores.timeouts)
            reasons = zip(scores.errors, scores.reasons, strict=True)
            errors |= {i: f"reward {name}: {reason}" for i, reason in reasons}
        failed = sorted(errors)
        total[failed] = 0
        reasons_of = tuple(errors[i] for i in failed)
        return Scores(total, tuple(sorted(timeouts)), tuple(failed), reasons_of, parts)

    def close(self) -> None:
        """Ends the workers; a later `score` starts them again."""
        for workers in self._workers:
            workers.close()


def _many_at_once(function: Reward) -> ScoreItems:
    def score(items: Sequence[Item]) -> Sequence[float]:
        if not items:
            return []
        problems, responses = map(list, zip(*items, strict=True))
        return list(function(problems, responses))

    return score


def _one_by_one(function: Reward) -> ScoreItems:
    return lambda items: [function(problem, response) for problem, response in items]
