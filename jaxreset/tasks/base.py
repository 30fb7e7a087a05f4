"""What a task is: problems, the prompts that ask them, and a verifier that scores responses.

A task turns a `Problem` into text for the policy and a response into a reward. Everything here is
plain data, so that reward workers can import it without importing jax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxreset.tasks.localization import ask_for_step
from jaxreset.tasks.templates import fill, shipped, spoken

LARGEST = float(np.finfo(np.float32).max)
ANSWERED_WITHIN = 20_000  # last characters of a response, in which its answer is looked for


@dataclass(frozen=True)
class Problem:
    """One problem of a data set.

    Attributes:
        id: unique in its data set, and readable in a log (for files: `train:17`, the stem and the
            line).
        question: the text that the policy is asked.
        answer: the final answer that the verifier compares with; never shown to the policy.
        solution: a reference solution, where the data has one; shown only where a rule or a
            demonstration asks for it.
        context: chat messages before the question, (role, content) each.
        extra: what else its task's verifier needs, such as tests of a program or the letters of choices.
    """

    id: str
    question: str
    answer: str
    solution: str = field(default="", compare=False, repr=False)
    context: tuple[tuple[str, str], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


Item = tuple[Problem, str]  # and a response to it
Message = Mapping[str, str]  # of a chat: role and content


class Scores(NamedTuple):
    """Rewards of a batch of responses.

    Attributes:
        rewards: float64 [n], in the order of the items scored.
        timeouts: indexes, ascending, of the items whose deadline fired; their reward is 0.
        errors: indexes, ascending, of the items on which the verifier itself failed: it raised,
            crashed, or returned what is no reward; their reward is 0.
        reasons: how, in the order of `errors`.
        parts: of several rewards, each one's own, float64 [n] by its name; unweighted.
    """

    rewards: NDArray[np.float64]
    timeouts: tuple[int, ...]
    errors: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()
    parts: Mapping[str, NDArray[np.float64]] = MappingProxyType({})


ScoreItems = Callable[[Sequence[Item]], "Scores | Sequence[float]"]


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


class Task:
    """What is learnt: how a problem is asked, and how a response is scored.

    A task of your own is a class with `prompt` and `score`; derived from this one or not, what it lacks is
    taken from here. `task.name: my_tasks:Sums` names it, and `task.options` are its keyword arguments.
    Where it has `problems(split, size)`, for "train" and "test", it needs no `data.path`. A warm start
    shows what a `demonstrate_solution(problem, rng)` of its own returns, a prompt and an answer, else the
    problems' solutions; with `demonstrate_localization(problem, rng, inline=False)` localising is taught.

    Attributes:
        name: short name for logs and messages.
        delimiter: text that ends a step of a response.
        answer_marker: text whose appearance makes the current step the last one.
        failed_below: a reward under it is a failure, unless the config says otherwise; the class's.
    """

    name: str = "task"
    delimiter: str = "\n"
    answer_marker: str = "\\boxed{"
    failed_below: float = 0.5

    def prompt(self, problem: Problem) -> str | Sequence[Message]:
        """The raw text that the policy continues, one step at a time; or messages of a chat."""
        raise NotImplementedError

    def message(self, problem: Problem) -> str | Sequence[Message]:
        """What is asked where a chat template is filled in: the user's message, or several messages."""
        return self.prompt(problem)

    def read_record(self, record: Mapping[str, Any]) -> Problem:
        """A record of a data file as a problem; its id is given by the caller.

        Raises:
            UngradableError: no response can be scored; the record is left out, and counted.
            ValueError: anything else wrong with it; names the field and what was expected, not the place.
        """
        from jaxreset.tasks.schemas import read_problem  # schemas make problems, and so import this

        return read_problem(record)

    def score(self, items: Sequence[Item]) -> Scores | Sequence[float]:
        """Rewards of (problem, response text) pairs, in their order.

        It may raise: `tasks.scoring` then finds out on which response.
        """
        raise NotImplementedError

    def answer(self, problem: Problem, response: str) -> str | None:
        r"""The final answer of a response to the problem, equal texts for equal answers; None: it has none.

        It is what `majority@k` counts. By default the last `\boxed{…}`, or the rest of the line behind the
        last answer marker, where that is another. Called in the trainer's own process, on whatever the
        policy wrote: it takes next to no time.
        """
        # Of a package that not every task needs.
        from jaxreset.tasks.answers.boxes import final_answer

        end = response[-ANSWERED_WITHIN:]
        if "boxed" in self.answer_marker:
            found = final_answer(end) or ""
        else:
            found = end.rpartition(self.answer_marker)[2] if self.answer_marker in end else ""
            for ending in ("\n", self.delimiter):
                found = found.lstrip().partition(ending)[0]
        return found.strip() or None

    def localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The question which of the `steps` of a failed response is the first wrong one
        (1-based)."""
        return ask_for_step(shipped("localize.txt"), problem, steps, self.delimiter)

    def inline_localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The same question, put behind the failed response itself."""
        values = {"count": str(len(steps)), "delimiter": spoken(self.delimiter)}
        return fill(shipped("localize_inline.txt"), values)

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """The true first wrong step (1-based), or None where the task cannot tell."""
        return None

    def reference(self, problem: Problem) -> list[str] | None:
        """The steps of a reference solution, the last one with the answer; None: there is none."""
        separator = self.delimiter if self.delimiter in problem.solution else "\n"
        steps = [step.strip() for step in problem.solution.split(separator)]
        return [step for step in steps if step] or None

    def demonstrate_solution(
        self, problem: Problem, rng: np.random.Generator
    ) -> tuple[str | Sequence[Message], str] | None:
        """A prompt and an answer to imitate: the reference solution; None: there is none."""
        if (steps := self.reference(problem)) is None:
            return None
        return self.prompt(problem), "".join(f"{step}{self.delimiter}" for step in steps)

    def close(self) -> None:
        """Ends whatever processes the verifier started; a later `score` starts them again."""
