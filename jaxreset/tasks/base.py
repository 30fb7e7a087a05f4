"""What a task is: problems, the prompts that ask them, and a verifier that scores responses.

A task turns a `Problem` into text for the policy and a response into a reward. Everything here is
plain data, so that reward workers can import it without importing jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


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
    """

    rewards: NDArray[np.float64]
    timeouts: tuple[int, ...]


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
        """Rewards of (problem, response text) pairs, in their order."""

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """The true first wrong step (1-based), or None where the task cannot tell."""

    def close(self) -> None:
        """Ends whatever processes the verifier started; a later `score` starts them again."""
