"""A task with a verifier of its own: running sums of which every step must be right.

    task: {name: "strict_sums:StrictSums", options: {max_terms: 5}}

A task needs `prompt` and `score`; this one has the rest from the embedded task: problems, questions about
wrong steps, and demonstrations for a warm start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxreset.tasks.base import Item
from jaxreset.tasks.chain import ChainTask


@dataclass(frozen=True)
class StrictSums(ChainTask):
    """Guessing the last digit earns nothing here."""

    name: str = "strict_sums"

    def score(self, items: Sequence[Item]) -> list[float]:
        """1 where the response is the solution, line by line, else 0."""
        return [float(text.split() == self.solution(problem)) for problem, text in items]
