"""The group: K suffixes of one shared prefix, with their rewards and advantages, of ragged lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxreset.losses import Scale, group_advantages


@dataclass
class Group:
    """K rollouts that share a prefix.

    Attributes:
      prompt: position of the prompt in its batch.
      prefix: [p] int32 tokens, the prompt and the kept part of a response.
      suffixes: K int32 arrays: the tokens drawn after the prefix, which carry the loss.
      behavior_logps: K float32 arrays, their log-probabilities when drawn.
      rewards: [K] float64.
      normalized_with: groups of one prompt with equal numbers are normalised together; they coincide
        with the groups except where two rounds from one prompt count as one group.
      reset_step: the step before which the prefix ends (1-based), None for a group from the prompt.
      cut: [K] bool, whether a response reached a limit before its answer.
      advantages: [K], from `set_advantages`.
    """

    prompt: int
    prefix: np.ndarray
    suffixes: list[np.ndarray]
    behavior_logps: list[np.ndarray]
    rewards: np.ndarray
    normalized_with: int = 0
    reset_step: int | None = None
    cut: np.ndarray = field(default_factory=lambda: np.zeros(1, bool))  # none: broadcast over K
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def has_signal(self) -> bool:
        """Whether any advantage differs from 0; without one the group's gradient is 0."""
        return bool(np.any(self.advantages))

    @property
    def tokens(self) -> int:
        """Tokens that carry the loss."""
        return sum(map(len, self.suffixes))


# Between rewards that came to be equal by different sums, relative to the largest.
ROUNDING = 32 * float(np.finfo(np.float64).eps)

_advantages = jax.jit(group_advantages, static_argnames="scale")


def set_advantages(
    groups: Sequence[Group],
    *,
    scale: Scale,
    size: tuple[int, int],
    cut_penalty: float = 0.0,
    mask_cut: bool = False,
) -> None:
    """Fills `advantages` of all groups, normalising inside each (prompt, normalized_with).

    Args:
      groups: in any order.
      scale: see `losses.group_advantages`.
      size: (most sets normalised apart, most rollouts in one), fixed so that it compiles once.
      cut_penalty: taken off the rewards of cut responses first (as in DAPO, arXiv 2503.14476).
      mask_cut: cut responses get no advantage, though the others' are normalised with theirs.

    Rewards that differ by no more than float64's rounding, as 0.1 + 0.2 does from 0.3, are equal, and where
    all of a set are, nobody has an advantage. A reward that isn't finite makes the advantages of its set
    NaN, which an update then skips.

    Raises:
      ValueError: more sets or rollouts than `size`.
    """
    members: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        members.setdefault((group.prompt, group.normalized_with), []).append(group)
    rewards, where = np.zeros(size, np.float32), np.zeros(size, bool)
    widest = max((sum(len(g.rewards) for g in m) for m in members.values()), default=0)
    if len(members) > size[0] or widest > size[1]:
        raise ValueError(f"{len(members)} sets of up to {widest} rollouts exceed size={size}")
    for row, together in enumerate(members.values()):
        joined = np.concatenate([g.rewards - cut_penalty * g.cut for g in together])
        rewards[row, : len(joined)], where[row, : len(joined)] = _from_lowest(joined), True
    advantages = np.asarray(_advantages(rewards, where=where, scale=scale))
    for row, together in enumerate(members.values()):
        ends = np.cumsum([len(g.rewards) for g in together])
        for group, end in zip(together, ends, strict=True):
            group.advantages = advantages[row, end - len(group.rewards) : end]
            if mask_cut:
                group.advantages = np.where(group.cut, 0, group.advantages)


def _from_lowest(rewards: np.ndarray) -> np.ndarray:
    """What rewards have more than the lowest, before float32 takes digits off those that lie near."""
    if not np.isfinite(rewards).all() or not rewards.size:
        return np.full(rewards.shape, np.nan)
    more = rewards - rewards.min()
    return np.where(more <= ROUNDING * np.abs(rewards).max(), 0, more)
