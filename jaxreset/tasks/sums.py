r"""Sums in words, for pretrained policies: small enough for a laptop, and the first wrong step is known.

    question   What is 7 + 8 + 6?      response   7 + 8 = 15
                                                  15 + 6 = 21
                                                  \boxed{21}

A problem needs no file. How a response looks is shown by `task.examples` in the config; the box alone
decides whether it is right.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxreset.tasks.base import Item, Problem, Scores, Task

_BOX = re.compile(r"\\boxed\{\s*(-?\d{1,9})\s*\}")
_SUM = re.compile(r"(\d{1,9}) \+ (\d{1,9}) = (\d{1,9})\.?")


class SumProblems(Sequence[Problem]):
    """Generated problems; number i is always the same, and no question is in both splits.

    Args:
      split: `"train"` or `"test"`.
      size: how many.
      min_terms, max_terms: one-digit numbers added, drawn uniformly.
    """

    def __init__(
        self, split: Literal["train", "test"], size: int, *, min_terms: int, max_terms: int
    ):
        self.split, self.size = split, size
        self.min_terms, self.max_terms = min_terms, max_terms

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng((index, self.split == "test"))
        while True:
            terms = rng.integers(1, 10, rng.integers(self.min_terms, self.max_terms + 1))
            written = " + ".join(map(str, terms))
            if (zlib.crc32(written.encode()) % 10 == 0) == (self.split == "test"):
                steps = "\n".join(solution([int(term) for term in terms]))
                name, answer = f"{self.split}:{index}", str(int(terms.sum()))
                return Problem(name, f"What is {written}?", answer, steps)


class SumsTask(Task):
    r"""One-digit numbers, added from left to right, one sum a line.

    A reward is 1.0 where the last `\boxed{}` holds the sum, else 0.0.

    Args:
      min_terms, max_terms: numbers in a problem.

    Raises:
      ValueError: there is nothing to add.
    """

    name = "sums"

    def __init__(self, *, min_terms: int = 2, max_terms: int = 4):
        if not 2 <= min_terms <= max_terms:
            raise ValueError(
                f"min_terms={min_terms}, max_terms={max_terms}: expected 2 <= min_terms <= max_terms"
            )
        self.min_terms, self.max_terms = min_terms, max_terms

    def problems(self, split: Literal["train", "test"], size: int) -> SumProblems:
        """`size` problems of a split."""
        return SumProblems(split, size, min_terms=self.min_terms, max_terms=self.max_terms)

    def prompt(self, problem: Problem) -> str:
        """The question, on a line of its own."""
        return f"{problem.question}\n"

    def message(self, problem: Problem) -> str:
        """The question."""
        return problem.question

    def score(self, items: Sequence[Item]) -> Scores:
        """1 where the last box holds the sum, else 0; the steps before it don't count."""
        boxes = [_BOX.findall(text) for _, text in items]
        right = [
            bool(found) and int(found[-1]) == int(problem.answer)
            for (problem, _), found in zip(items, boxes, strict=True)
        ]
        return Scores(np.array(right, np.float64), ())

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """The first step that isn't the next sum, or that boxes what isn't the answer; the last where
        all are right."""
        terms = [int(term) for term in re.findall(r"\d+", problem.question)]
        sums = solution(terms)[:-1]
        for number, step in enumerate(steps, 1):
            boxed = _BOX.search(step)
            if boxed is not None:
                done = number > len(sums)
                return number if not done or int(boxed[1]) != sum(terms) else len(steps)
            if number > len(sums) or _written(step) != _written(sums[number - 1]):
                return number
        return max(len(steps), 1)


def solution(terms: Sequence[int]) -> list[str]:
    """The steps of the one right solution, the answer's box last."""
    total, lines = terms[0], []
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return [*lines, f"\\boxed{{{total}}}"]


def _written(step: str) -> tuple[str, ...] | None:
    """The numbers of a step that is one sum and nothing else; None: it isn't."""
    found = _SUM.fullmatch(step.strip())
    return None if found is None else found.groups()
