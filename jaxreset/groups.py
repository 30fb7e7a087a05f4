"""The group: K suffixes of one shared prefix, with their rewards and advantages, of ragged lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxreset.losses import Scale, group_advantages

Advantage = Callable[..., jax.Array]  # see `scale` of `set_advantages`


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
      parent: (group, row) of the rollout that it goes back to, the group's number among the prompt's;
        None for a group from the prompt, or from a rollout that is in no group.
      cut: [K] bool, whether a response reached a limit before its answer.
      advantages: [K], from `set_advantages`.
      token_advantages: K float arrays, one value for each token of a suffix, which count in place of
        `advantages` and which `set_advantages` leaves alone; None: each token has its row's.
    """

    prompt: int
    prefix: np.ndarray
    suffixes: list[np.ndarray]
    behavior_logps: list[np.ndarray]
    rewards: np.ndarray
    normalized_with: int = 0
    reset_step: int | None = None
    parent: tuple[int | None, int] | None = None
    cut: np.ndarray = field(default_factory=lambda: np.zeros(1, bool))  # none: broadcast over K
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_advantages: list[np.ndarray] | None = None

    @property
    def has_signal(self) -> bool:
        """Whether any advantage differs from 0; without one the group's gradient is 0."""
        if self.token_advantages is not None:
            return any(map(np.any, self.token_advantages))
        return bool(np.any(self.advantages))

    @property
    def tokens(self) -> int:
        """Tokens that carry the loss."""
        return sum(map(len, self.suffixes))


# Between rewards that came to be equal by different sums, relative to the largest.
ROUNDING = 32 * float(np.finfo(np.float64).eps)


@partial(jax.jit, static_argnames="scale")
def _advantages(rewards: jax.Array, where: jax.Array, *, scale: Scale | Advantage) -> jax.Array:
    """[sets, K] advantages; compiled once for each scale."""
    if not callable(scale):
        return group_advantages(rewards, where=where, scale=scale)
    found = jnp.asarray(scale(rewards, where=where))
    if found.shape != rewards.shape:
        name = getattr(scale, "__name__", scale)
        raise ValueError(
            f"the result of scale={name} has shape {found.shape}, expected {rewards.shape}, that of rewards"
        )
    spoilt = (where & ~jnp.isfinite(rewards)).any(-1, keepdims=True)
    return jnp.where(spoilt, jnp.nan, found.astype(jnp.float32))


def set_advantages(
    groups: Sequence[Group],
    *,
    scale: Scale | Advantage,
    size: tuple[int, int],
    cut_penalty: float = 0.0,
    mask_cut: bool = False,
) -> None:
    """Fills `advantages` of all groups, normalising inside each (prompt, normalized_with).

    Args:
      groups: in any order.
      scale: see `losses.group_advantages`; or a pure function in its place, `(rewards, *, where)`
        -> advantages, all `[..., K]`, which compiles once. It gets float32 rewards as they are, of a set in
        each row; what it gives where `where` is False is not read.
      size: (most sets normalised apart, most rollouts in one), fixed so that it compiles once.
      cut_penalty: taken off the rewards of cut responses first (as in DAPO, arXiv 2503.14476).
      mask_cut: cut responses get no advantage, though the others' are normalised with theirs.

    Rewards that differ by no more than float64's rounding, as 0.1 + 0.2 does from 0.3, are equal, and where
    all of a set are, nobody has an advantage (a function decides that itself, from equal rewards). A reward
    that isn't finite makes the advantages of its set NaN, which an update then skips.

    Raises:
      ValueError: more sets or rollouts than `size`, an unknown scale, or a function's result of another
        shape than its rewards'.
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
        more = _from_lowest(joined)
        # What only looks at differences keeps more digits of them without what all have in common.
        shared = joined.min(initial=np.inf) if callable(scale) or scale == "mean" else 0
        rewards[row, : len(joined)], where[row, : len(joined)] = shared + more, True
    advantages = np.asarray(_advantages(rewards, where, scale=scale))
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
