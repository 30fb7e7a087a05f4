"""The problems of the embedded task: lettered numbers, generated, the same on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import chain, product
from string import ascii_lowercase
from typing import Literal

import numpy as np

from jaxreset.tasks.base import Problem

LETTERS = ascii_lowercase  # one for each number of a problem


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
