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
what resets are for. How often it solves a problem follows from the settings, from nearly always to
one in billions (`chain_base_rate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from jaxreset.tasks.base import Item, Problem, Scores, Task
from jaxreset.tasks.chain_base_rate import MISREAD_RATE, predicted_accuracy
from jaxreset.tasks.chain_problems import LETTERS, ChainProblems

TOKENIZER = Path(str(resources.files("jaxreset.tasks") / "chain_tokenizer"))


@dataclass(frozen=True)
class ChainTask(Task):
    """Prompts, demonstrations and checker of the running sums.

    Attributes:
      min_terms, max_terms: numbers in a problem, 1 to 26.
      modulus: of the numbers and their sum, 2 to 10.
      mistakes: the share of sums that go wrong in demonstrations, by any amount.
      misread: the numbers 1 to this are taken for one more in most demonstrations (`MISREAD_RATE`).
      strict: every step must be right for the reward; else the boxed sum is all that counts.
    """

    min_terms: int = 3
    max_terms: int = 8
    modulus: int = 10
    mistakes: float = 0.08
    misread: int = 0
    strict: bool = False
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
        if not 0 <= self.mistakes <= 1:
            raise ValueError(f"mistakes={self.mistakes}: expected a share of the sums, 0 to 1")
        if not 0 <= self.misread < self.modulus:
            raise ValueError(
                f"misread={self.misread}: expected 0 to {self.modulus - 1}, the largest number with "
                f"modulus={self.modulus}"
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
        """1 where the last line is the boxed sum, and where `strict` each line before it right; else 0."""
        right = [self._is_right(problem, text.rstrip("\n")) for problem, text in items]
        return Scores(np.array(right, np.float64), ())

    def _is_right(self, problem: Problem, response: str) -> bool:
        lines = response.split("\n")
        if lines[-1] != f"\\boxed{{{problem.answer}}}":
            return False
        return not self.strict or [line.strip() for line in lines] == self.solution(problem)

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """The first step that isn't the one right step there; the last where all are right."""
        right = self.solution(problem)
        for number, step in enumerate(steps, 1):
            if number > len(right) or step.strip() != right[number - 1]:
                return number
        return max(len(steps), 1)

    def solution(self, problem: Problem, *, rng: np.random.Generator | None = None) -> list[str]:
        """The steps of a solution; with `rng`, sums go wrong as in demonstrations."""
        total, lines = 0, []
        for letter, number in zip(problem.question[::2], problem.question[1::2], strict=True):
            total = (total + int(number)) % self.modulus
            if rng is not None:
                total = (total + self._slip(int(number), rng)) % self.modulus
            lines.append(f"{letter}{number}={total}")
        return [*lines, f"\\boxed{{{total}}}"]

    def _slip(self, number: int, rng: np.random.Generator) -> int:
        """By how much the sum is off after this number; later sums carry it on."""
        if 1 <= number <= self.misread and rng.random() < MISREAD_RATE:
            return 1
        return int(rng.integers(1, self.modulus)) if rng.random() < self.mistakes else 0

    def predicted_accuracy(self, *, greedy: bool = False) -> float:
        """The share of problems solved by a policy that imitates the demonstrations exactly."""
        return predicted_accuracy(
            min_terms=self.min_terms,
            max_terms=self.max_terms,
            modulus=self.modulus,
            mistakes=self.mistakes,
            misread=self.misread,
            strict=self.strict,
            greedy=greedy,
        )

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
