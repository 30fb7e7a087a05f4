"""Reset rules: before which step of a failed rollout to go back.

A rule is a function of failed rollouts that returns one step h (1-based) for each: the reset keeps
steps 1 to h - 1. It takes, by name, what else it needs:

    rule(failures)           -> steps
    rule(failures, ask)      -> steps; `ask(failures)` puts the localisation question to the policy
    rule(failures, write)    -> steps, or `write(texts)`: steps to keep that are of no rollout

To add a rule, write such a function anywhere and name it: `reset.rule: my_rules:before_last`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxreset import extensions
from jaxreset.errors import RunError
from jaxreset.tasks.base import Problem, Task
from jaxreset.tasks.localization import parse_answer


class Cut(NamedTuple):
    """A reset that a rollout comes from: before which step, and the share of its group that succeeded."""

    step: int
    solved: float


@dataclass(frozen=True)
class Failure:
    """A failed rollout of at least one step, as a reset rule sees it.

    Attributes:
      task: that the problem is of.
      problem: what was to be solved.
      steps: the texts of its steps, kept ones first, delimiters stripped.
      seed: names this rollout's random numbers: (seed, step, phase, prompt, row).
      logps: of each step, its tokens' log-probabilities when drawn, float32; of steps that were written
        in, zeros.
      cuts: the resets that it comes from, the first one first; none where it began at the prompt.
    """

    task: Task
    problem: Problem
    steps: list[str]
    seed: tuple[int, ...]
    logps: Sequence[np.ndarray] = ()
    cuts: tuple[Cut, ...] = ()

    def rng(self) -> np.random.Generator:
        """A generator of its own, independent of the batch."""
        return np.random.default_rng(self.seed)


class Written(NamedTuple):
    """Steps to start from that no rollout drew."""

    steps: tuple[str, ...]


Ask = Callable[[Sequence[Failure]], list[str]]
Write = Callable[[Sequence[str]], Written]
ResetRule = Callable[..., list[Any]]  # see above


def random_step(failures: Sequence[Failure]) -> list[int]:
    """Uniform over the rollout's steps (RRPO, arXiv 2605.25507)."""
    return [int(f.rng().integers(1, len(f.steps), endpoint=True)) for f in failures]


def early_step(failures: Sequence[Failure]) -> list[int]:
    """Uniform over the first half of the steps, rounded up: the control for "earlier is easier"."""
    return [int(f.rng().integers(1, (len(f.steps) + 1) // 2, endpoint=True)) for f in failures]


def blamed_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """The step that the policy itself names as its first wrong one (SRPO, arXiv 2605.25507)."""
    answers = ask(failures)
    return [parse_answer(a, len(f.steps)).step for a, f in zip(answers, failures, strict=True)]


def matched_step(failures: Sequence[Failure], ask: Ask) -> list[int]:
    """Where the policy put the blame in *another* rollout of the batch: the control for `self`.

    Positions, as shares of the steps, are distributed as the self rule's, at as many tokens; only what a
    rollout's own answer says of it is gone. A lone failure gets a random step.
    """
    if len(failures) < 2:
        return random_step(failures)
    blamed = blamed_step(failures, ask)
    shares = [(step - 0.5) / len(f.steps) for step, f in zip(blamed, failures, strict=True)]
    # A cycle in an order that depends on no rollout's place in the batch: nobody keeps its own.
    order = sorted(
        range(len(failures)), key=lambda i: (failures[i].rng().random(), failures[i].seed)
    )
    steps = [0] * len(failures)
    for here, other in zip(order, [*order[1:], order[0]], strict=True):
        steps[here] = int(shares[other] * len(failures[here].steps)) + 1
    return steps


def uncertain_step(failures: Sequence[Failure]) -> list[int]:
    """The step with the token that the policy was least sure of when it drew it; the first of equals."""
    lowest = [[float(np.min(x, initial=0.0)) for x in f.logps] for f in failures]
    return [int(np.argmin(of_steps)) + 1 for of_steps in lowest]


def bisected_step(failures: Sequence[Failure]) -> list[int]:
    """The middle of where the first wrong step may be, by the outcomes of the resets so far: no localiser.

    A prefix that some continuation succeeded from is taken to be right, one that all failed from to hold
    the mistake. Each of `reset.rungs` halves what is left.
    """
    steps = []
    for f in failures:
        right, wrong = 1, len(f.steps)  # the mistake is in one of these
        for cut in f.cuts:
            if cut.solved:
                right = max(right, cut.step)
            else:
                wrong = max(min(wrong, cut.step - 1), 1)
        steps.append((min(right, wrong) + wrong + 1) // 2)
    return steps


def demonstrated_step(failures: Sequence[Failure], write: Write) -> list[Written]:
    """The first half of a reference solution, then more where all failed, else less: a bisection over
    `reset.rungs` (a curriculum from demonstrations: R3, arXiv 2402.05808; AdaBack, arXiv 2506.18110).

    Raises:
      RunError: the task has no reference solution of a problem.
    """
    starts = []
    for f in failures:
        reference = f.task.reference(f.problem)
        if not reference:
            raise RunError(
                f"reset.rule=demo: the task {f.task.name!r} has no reference solution of problem "
                f"{f.problem.id!r}; use data with solutions, or another rule"
            )
        least, most = (
            0,
            max(len(reference) - 1, 0),
        )  # of its steps are shown; the last is the answer
        for cut in f.cuts:
            if cut.solved:
                most = min(most, max(cut.step - 2, 0))
            else:
                least = max(least, cut.step)
        starts.append(write(reference[: (min(least, most) + most + 1) // 2]))
    return starts


def oracle_step(failures: Sequence[Failure]) -> list[int]:
    """The true first wrong step, as the task says it.

    Raises:
      ValueError: the task can't tell.
    """
    steps = [f.task.first_wrong_step(f.problem, f.steps) for f in failures]
    for failure, step in zip(failures, steps, strict=True):
        if step is None:
            raise ValueError(
                f"reset.rule=oracle: the task {failure.task.name!r} can't tell the first wrong step; "
                "use a task that can (chain), or another rule"
            )
    return [step for step in steps if step is not None]


def no_step(failures: Sequence[Failure]) -> list[int]:
    """Keeps nothing: the control that only draws again and normalises apart ("fresh")."""
    return [1] * len(failures)


RULES: dict[str, ResetRule] = {
    "random": random_step,
    "self": blamed_step,
    "early": early_step,
    "oracle": oracle_step,
    "fresh": no_step,
    "matched": matched_step,
    "entropy": uncertain_step,
    "bisect": bisected_step,
    "demo": demonstrated_step,
}
NEEDS = "ask", "write"  # what a rule may take besides the failures
EXPECTED = "a function of (failures), (failures, ask) or (failures, write)"


def find_rule(name: str) -> ResetRule:
    """A rule by its name among `RULES`, or by its import path; raises `ValueError` where there is none."""
    return check_rule(extensions.find(name, RULES, "reset rule"))


def check_rule(rule: ResetRule) -> ResetRule:
    """The rule, if it can be called as one; raises `ValueError`."""
    needs = needs_of(rule)
    extensions.check_call(rule, EXPECTED, count=1, keywords=needs)
    return rule


def needs_of(rule: ResetRule) -> tuple[str, ...]:
    """Which of `NEEDS` a rule takes."""
    names = {p.name for p in extensions.parameters(rule, EXPECTED)[1:]}
    return tuple(name for name in NEEDS if name in names)


def apply_rule(rule: ResetRule, failures: Sequence[Failure], ask: Ask) -> list[int | Written]:
    """What the rule says of each failure: a step of it, or steps that are written in.

    Raises:
      RunError: it gives another number of steps than there are failures, or one that a rollout hasn't.
    """

    def write(steps: Sequence[str]) -> Written:
        return Written(tuple(steps))

    given = {"ask": ask, "write": write}
    chosen = list(rule(failures, **{name: given[name] for name in needs_of(rule)}))
    name = extensions.path_of(rule)
    if len(chosen) != len(failures):
        raise RunError(f"{name} gave {len(chosen)} steps for {len(failures)} failures; one each")
    for step, failure in zip(chosen, failures, strict=True):
        whole = isinstance(step, int | np.integer) and not isinstance(step, bool)
        if not isinstance(step, Written) and not (whole and 1 <= step <= len(failure.steps)):
            raise RunError(
                f"{name} gave {step!r} for a rollout of {len(failure.steps)} steps; expected an integer "
                "from 1 to that number, or what write(...) returns"
            )
    return [step if isinstance(step, Written) else int(step) for step in chosen]
