"""What the steps of a warm start learn from: a file, the problems' solutions, or what the task draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxreset.config import Config
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem
from jaxreset.tasks.classes import demonstrates
from jaxreset.tasks.demonstrations import (
    Answers,
    Demonstration,
    Shuffled,
    fitting,
    localized,
    read_demonstrations,
    solved,
    solved_problems,
)

Batches = tuple[Sequence[Demonstration], ...]

# Solving comes first: localising is learnt quickly once the sums are known, and hardly before.
SOLVING_ONLY = 0.45
LOOKED_AT = 100  # generated problems that tell whether such have solutions


class Lessons(NamedTuple):
    """Of a warm start.

    Attributes:
      of_step: a step's batches, by its number from 0; the loss is the sum of their means.
      found: all demonstrations there are; none where they are drawn when they are needed.
      dropped: how many more are too long.
    """

    of_step: Callable[[int], Batches]
    found: Sequence[Demonstration]
    dropped: int = 0


def make_lessons(
    config: Config, asking: Asking, problems: Sequence[Problem], eos_ids: Sequence[int]
) -> Lessons:
    """What the config's warm start learns from.

    Args:
      config: resolved.
      asking: puts prompts together as training does.
      problems: to train on.
      eos_ids: of the policy.

    Raises:
      ValueError: there is nothing to learn from, or something is wrong with it; names the config's key.
    """
    answers, path = Answers(asking, eos_ids), config.warm_start.path
    if path is None and demonstrates(type(asking.task)):
        return _drawn(config, answers, problems)
    if path is not None:
        source = "warm_start.path"
        try:
            found = read_demonstrations(path, answers)
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        source = "the problems' solutions"
        found = _solutions(config, answers, problems)
    kept = _fitting(config, found, source)
    order, batch = Shuffled(kept, seed=config.seed), config.warm_start.batch
    return Lessons(lambda step: (order.batch(step, batch),), kept, len(found) - len(kept))


def _solutions(
    config: Config, answers: Answers, problems: Sequence[Problem]
) -> list[Demonstration]:
    """All solutions of problems that are read, and as many as are shown of those that are generated."""
    count = len(problems)
    if not isinstance(problems, list):
        count = min(count, config.warm_start.steps * config.warm_start.batch)
        if not solved_problems((problems[i] for i in range(min(count, LOOKED_AT))), answers):
            count = 0
    if not (found := solved_problems((problems[i] for i in range(count)), answers)):
        raise ValueError(
            f"warm_start.steps={config.warm_start.steps}: none of {len(problems)} problems has a "
            "solution to learn from; name a file of demonstrations in warm_start.path, or set it to 0"
        )
    return found


def _drawn(config: Config, answers: Answers, problems: Sequence[Problem]) -> Lessons:
    """What the task shows, drawn anew in every step, and later as many localisations beside solutions."""
    task, warm, taught = answers.asking.task, config.warm_start, config.reset.localizer.mode
    half = max(warm.batch // 2, 1)

    def of_step(step: int) -> Batches:
        rng = np.random.default_rng((config.seed, step))

        def draw(count: int) -> Sequence[Problem]:
            return [problems[int(number)] for number in rng.integers(len(problems), size=count)]

        if step < SOLVING_ONLY * warm.steps or not hasattr(task, "demonstrate_localization"):
            return ([solved(problem, answers, rng) for problem in draw(warm.batch)],)
        inline = taught == "inline"
        return (
            [solved(problem, answers, rng) for problem in draw(half)],
            [localized(problem, answers, rng, inline=inline) for problem in draw(half)],
        )

    if config.warms_at_once:
        return Lessons(of_step, [])
    steps = [of_step(step) for step in range(warm.steps)]
    all_solved = [one for solutions, *_ in steps for one in solutions]
    kept = {id(one) for one in _fitting(config, all_solved, f"task.name={config.task.name}")}
    steps = [
        ([one for one in solutions if id(one) in kept], *others) for solutions, *others in steps
    ]
    found = [one for batches in steps for batch in batches for one in batch]
    dropped = len(all_solved) - len(kept)
    return Lessons(lambda step: tuple(batch for batch in steps[step] if batch), found, dropped)


def _fitting(config: Config, found: Sequence[Demonstration], source: str) -> list[Demonstration]:
    s = config.sampling
    return fitting(found, prompt=s.max_prompt_tokens, answer=s.max_response_tokens, source=source)
