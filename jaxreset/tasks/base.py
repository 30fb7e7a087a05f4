"""What a task is: problems, the prompts that ask them, and a verifier that scores responses.

A task turns a `Problem` into text for the policy and a response into a reward. Everything here is
plain data, so that reward workers can import it without importing jax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Problem:
    """One problem of a data set.

    Attributes:
        id: unique in its data set, and readable in a log (for files: `train:17`, the stem and the
            line).
        question: the text that the policy is asked.
        answer: the final answer that the verifier compares with; never shown to the policy.
    """

    id: str
    question: str
    answer: str


class Scores(NamedTuple):
    """Rewards of a batch of responses.

    Attributes:
        rewards: float64 [n], in the order of the items scored.
        timeouts: indexes, ascending, of the items whose deadline fired; their reward is 0.
        errors: indexes, ascending, of the items on which the verifier itself failed: it raised,
            crashed, or returned what is no reward; their reward is 0.
        reasons: how, in the order of `errors`.
    """

    rewards: NDArray[np.float64]
    timeouts: tuple[int, ...]
    errors: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()


def reward_of(value: Any) -> float:
    """What a verifier returned, as a reward; NaN and infinities are left to the caller.

    Raises:
        TypeError: it is no number.
        OverflowError: float32, in which losses are computed, can't hold it.
    """
    if value is None or isinstance(value, str | bytes | complex):
        raise TypeError(f"the verifier returned {value!r:.100}: expected a number")
    reward = float(value)
    if LARGEST < abs(reward) < math.inf:
        raise OverflowError(f"the verifier returned {reward}: more than float32 can hold")
    return reward


class Task(Protocol):
    """What the training loop and the reset rules ask of a task.

    Attributes:
        name: short name for logs and the run folder.
        delimiter: text that ends a step of a response.
        answer_marker: text whose appearance makes the current step the last one.
    """

    @property
    def name(self) -> str: ...
    @property
    def delimiter(self) -> str: ...
    @property
    def answer_marker(self) -> str: ...

    def prompt(self, problem: Problem) -> str:
        """The raw text that the policy continues, one step at a time."""

    def localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The question which of the `steps` of a failed response is the first wrong one
        (1-based)."""

    def inline_localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The same question, put behind the failed response itself."""

    def score(self, items: Sequence[tuple[Problem, str]]) -> Scores:
        """Rewards of (problem, response text) pairs, in their order.

        It may raise: `training.scoring` then finds out on which response.
        """

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """The true first wrong step (1-based), or None where the task cannot tell."""

    def close(self) -> None:
        """Ends whatever processes the verifier started; a later `score` starts them again."""
