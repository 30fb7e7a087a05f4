"""Low-rank adapters beside frozen matrices (LoRA, arXiv 2106.09685).

y = x W + (alpha / rank) · (x A) B        A [inputs, rank] random, B [rank, *outputs] zero at first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
LINEAR: tuple[Target, ...] = get_args(Target)  # the matrices of a block


@dataclass(frozen=True)
class LoRA:
    """Which matrices of every block have an adapter, and of what size.

    Attributes:
      rank: of the product A B.
      alpha: the product is scaled by alpha / rank.
      targets: names among `LINEAR`.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = LINEAR

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(LINEAR):
            raise ValueError(f"no matrices {sorted(unknown)}; there are {', '.join(LINEAR)}")
        if not self.targets or self.rank < 1:
            raise ValueError(f"LoRA needs a target and a rank of at least 1, got {self}")

    @property
    def scale(self) -> float:
        """That the product A B is multiplied by."""
        return self.alpha / self.rank
