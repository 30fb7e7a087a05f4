r"""A task of your own, from its problems to its verifier: letters are sorted, one a step.

    task: {name: "sorting:Sorting", options: {size: 4}}

    prompt   dazc      response   a:dzc
                                  c:dz
                                  d:z
                                  \boxed{acdz}

A task needs `prompt` and `score`. With `problems` it needs no file, with `demonstrate_solution` it can be
warm-started, and with `first_wrong_step` the rule `oracle` can reset it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

import jaxreset
from jaxreset.tasks.base import Item, Problem


@dataclass(frozen=True)
class Sorting(jaxreset.Task):
    """Each step takes the first letter of the alphabet out of those that are left.

    Attributes:
      size: letters of a problem.
      mistakes: the share of demonstrated steps that take another letter.
    """

    size: int = 4
    mistakes: float = 0.1
    name: str = "sorting"

    def problems(self, split: str, size: int) -> list[Problem]:
        """`size` problems; those of the two splits begin with letters of their own."""
        rng, words = random.Random(split), list[str]()
        while len(words) < size:
            word = "".join(rng.sample(ascii_lowercase, self.size))
            if (word[0] in "aeiou") == (split == "test"):
                words.append(word)
        return [
            Problem(f"{split}:{n}", word, "".join(sorted(word))) for n, word in enumerate(words)
        ]

    def prompt(self, problem: Problem) -> str:
        """The letters, on a line of their own."""
        return problem.question + "\n"

    def score(self, items: Sequence[Item]) -> list[float]:
        """1 where the last line is the box with the sorted letters, else 0."""
        return [
            float(text.strip().endswith(f"\n\\boxed{{{problem.answer}}}"))
            for problem, text in items
        ]

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int:
        """The first step that isn't the right one there; the last where all are right."""
        right = self.solution(problem)
        for number, (step, line) in enumerate(zip(steps, right, strict=False), 1):
            if step != line:
                return number
        return max(len(steps), 1)

    def demonstrate_solution(self, problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
        """A prompt and a completion to imitate; mistakes are carried on."""
        return self.prompt(problem), "".join(f"{line}\n" for line in self.solution(problem, rng))

    def solution(self, problem: Problem, rng: np.random.Generator | None = None) -> list[str]:
        """The steps; with `rng`, some of them take the wrong letter."""
        left, taken, lines = problem.question, "", []
        while len(left) > 1:
            order = sorted(left)
            letter = order[int(rng is not None and rng.random() < self.mistakes)]
            left, taken = left.replace(letter, ""), taken + letter
            lines.append(f"{letter}:{left}")
        return [*lines, f"\\boxed{{{taken + left}}}"]
