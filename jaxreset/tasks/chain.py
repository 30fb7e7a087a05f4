r"""The embedded task: running sums modulo 10 (or less), one number a line.

Each number of a problem has a letter; each line of a response repeats letter and number, and gives
the sum so far.

    prompt   a3b8c5      response   a3=3        localisation   a3b8c5
                                    b8=1                       1:a3=3
                                    c5=6                       2:b8=2
                                    \boxed{6}                  3:c5=7
                                                               4:\boxed{7}
                                                               ?             answer   a3=3:3
                                                                                      b8=1:2\boxed{2}

A localisation's answer solves line after line, each with the sum that the response gave, and names
the first where they differ.

A problem needs no file, and the checker knows the first wrong step. The demonstrations make
mistakes and carry them on, so a policy that imitates them errs at a chosen rate at every step:
what resets are for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, product
from pathlib import Path
from typing import Literal

import numpy as np

from jaxreset.tasks.base import Item, Problem, Scores, Task

LETTERS = "abcdefghi"
TOKENIZER = Path(str(resources.files("jaxreset.tasks") / "chain_tokenizer"))


class ChainProblems(Sequence[Problem]):
    """Generated problems; number i is always the same, and no question is in both splits.

    Args:
      split: `"train"` or `"test"`.
      size: how many.
      min_terms, max_terms: numbers added, drawn uniformly.
      modulus: of the numbers and the sum.

    Raises:
      ValueError: there are so few questions that none is in the split.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int,
        *,
        min_terms: int,
        max_terms: int,
        modulus: int,
    ):
        self.split, self.size = split, size
        self.min_terms, self.max_terms, self.modulus = min_terms, max_terms, modulus
        counts = range(min_terms, max_terms + 1)
        every = chain.from_iterable(product(range(modulus), repeat=n) for n in counts)
        if not any(self._holds(_question(terms)) for terms in every):
            raise ValueError(
                f"min_terms={min_terms}, max_terms={max_terms}, modulus={modulus}: none of the "
                f"{sum(modulus**n for n in counts)} questions is in the {split} split; allow more numbers "
                "or a larger modulus"
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng((index, self.split == "test"))
        while True:
            terms = rng.integers(0, self.modulus, rng.integers(self.min_terms, self.max_terms + 1))
            if self._holds(question := _question(terms)):
                answer = str(int(terms.sum()) % self.modulus)
                return Problem(f"{self.split}:{index}", question, answer)

    def _holds(self, question: str) -> bool:
        return (zlib.crc32(question.encode()) % 10 == 0) == (self.split == "test")


def _question(terms: Iterable[int]) -> str:
    return "".join(f"{letter}{n}" for letter, n in zip(LETTERS, terms, strict=False))


@dataclass(frozen=True)
class ChainTask(Task):
    """Prompts, demonstrations and checker of the running sums.

    Attributes:
      min_terms, max_terms: numbers in a problem.
      modulus: of the numbers and their sum, 2 to 10.
      mistakes: the share of sums that go wrong in demonstrations.
    """

    min_terms: int = 3
    max_terms: int = 8
    modulus: int = 10
    mistakes: float = 0.08
    name: str = "chain"
    delimiter: str = "\n"
    answer_marker: str = "\\boxed{"

    def __post_init__(self) -> None:
        if not 1 <= self.min_terms <= self.max_terms <= len(LETTERS):
            raise ValueError(
                f"min_terms={self.min_terms}, max_terms={self.max_terms}: expected 1 <= min_terms <= "
                f"max_terms <= {len(LETTERS)}, a letter for each number"
            )
        if not 2 <= self.modulus <= 10:
            raise ValueError(
                f"modulus={self.modulus}: expected 2 to 10, so that numbers are digits"
            )

    def problems(self, split: Literal["train", "test"], size: int) -> ChainProblems:
        """`size` problems of a split."""
        return ChainProblems(
            split,
            size,
            min_terms=self.min_terms,
            max_terms=self.max_terms,
            modulus=self.modulus,
        )

    def prompt(self, problem: Problem) -> str:
        """The lettered numbers, on a line of their own."""
        return problem.question + "\n"

    def localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The problem, the numbered steps and a question mark."""
        numbered = "".join(f"{n}:{step}\n" for n, step in enumerate(steps, 1))
        return f"{problem.question}\n{numbered}?\n"

    def inline_localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """A question mark: problem and steps stand before it."""
        return "?\n"

    def score(self, items: Sequence[Item]) -> Scores:
        """1 where the last line is the boxed sum, else 0; the lines before it don't count."""
        right = [
            text.rstrip("\n").rpartition("\n")[2] == f"\\boxed{{{problem.answer}}}"
            for problem, text in items
        ]
        return Scores(np.array(right, np.float64), ())

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """The first step that isn't the one right step there; the last where all are right."""
        right = self.solution(problem)
        for number, step in enumerate(steps, 1):
            if number > len(right) or step.strip() != right[number - 1]:
                return number
        return max(len(steps), 1)

    def solution(self, problem: Problem, *, rng: np.random.Generator | None = None) -> list[str]:
        """The steps of a solution; with `rng`, each sum errs with probability `mistakes`."""
        total, lines = 0, []
        for letter, number in zip(problem.question[::2], problem.question[1::2], strict=True):
            total = (total + int(number)) % self.modulus
            if rng is not None and rng.random() < self.mistakes:
                total = int(total + rng.integers(1, self.modulus)) % self.modulus
            lines.append(f"{letter}{number}={total}")
        return [*lines, f"\\boxed{{{total}}}"]

    def demonstrate_solution(self, problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
        """A (prompt, completion) to imitate, mistakes included."""
        return self.prompt(problem), "".join(f"{s}\n" for s in self.solution(problem, rng=rng))

    def demonstrate_localization(
        self, problem: Problem, rng: np.random.Generator, *, inline: bool = False
    ) -> tuple[str, str]:
        """A (question, answer) about a solution with at least one mistake."""
        if self.mistakes <= 0:
            raise ValueError(
                f"mistakes={self.mistakes}: a question about mistakes needs some; give mistakes > 0"
            )
        right = self.solution(problem)
        steps = right
        while steps == right:
            steps = self.solution(problem, rng=rng)
        wrong = self.first_wrong_step(problem, steps)
        claims = zip(right, steps[:wrong], strict=False)
        checks = "\n".join(f"{should}:{step.rpartition('=')[2]}" for should, step in claims)
        question = self.localization(problem, steps)
        if inline:
            attempt = self.prompt(problem) + "".join(f"{step}\n" for step in steps)
            question = attempt + self.inline_localization(problem, steps)
        return question, f"{checks}\\boxed{{{wrong}}}"

    def reference(self, problem: Problem) -> list[str]:
        """The one right solution."""
        return self.solution(problem)
