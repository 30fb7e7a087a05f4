"""The one batch type: K suffixes of one shared prefix, with their rewards and advantages.

`Group` is one group on the host, of ragged lengths. `pack` lays groups into `GroupBatch` microbatches
of a few fixed shapes, which is what a jitted update takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreset.losses import Scale, group_advantages

Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit


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
      advantages: [K], from `set_advantages`.
    """

    prompt: int
    prefix: np.ndarray
    suffixes: list[np.ndarray]
    behavior_logps: list[np.ndarray]
    rewards: np.ndarray
    normalized_with: int = 0
    reset_step: int | None = None
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def has_signal(self) -> bool:
        """Whether any advantage differs from 0; without one the group's gradient is 0."""
        return bool(np.any(self.advantages))

    @property
    def tokens(self) -> int:
        """Tokens that carry the loss."""
        return sum(map(len, self.suffixes))


class GroupBatch(NamedTuple):
    """A microbatch of N groups of K rows, for `Decoder.suffix_hidden`; right-padded.

    Attributes:
      prefix: [N, P] int32, prefix tokens but for the last.
      prefix_lengths: [N] int32, how many of them exist.
      rows: [N, K, S] int32 row inputs: the last prefix token, then the suffix but for its last token.
      targets: [N, K, S] int32, the suffix.
      lengths: [N, K] int32 suffix lengths; 0 for padding rows.
      advantages: [N, K] float32.
      behavior_logps: [N, K, S] float32.
    """

    prefix: Leaf
    prefix_lengths: Leaf
    rows: Leaf
    targets: Leaf
    lengths: Leaf
    advantages: Leaf
    behavior_logps: Leaf


class PackShape(NamedTuple):
    """Sizes of a microbatch: groups N, rows K, prefix tokens P (the last one counted), suffix tokens S."""

    groups: int
    rows: int
    prefix: int
    suffix: int


_advantages = jax.jit(group_advantages, static_argnames="scale")


def set_advantages(groups: Sequence[Group], *, scale: Scale, size: tuple[int, int]) -> None:
    """Fills `advantages` of all groups, normalising inside each (prompt, normalized_with).

    Args:
      groups: in any order.
      scale: see `losses.group_advantages`.
      size: (most sets normalised apart, most rollouts in one), fixed so that it compiles once.

    Raises:
      ValueError: a reward that isn't finite, or more sets or rollouts than `size`.
    """
    members: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        if not np.all(np.isfinite(group.rewards)):
            raise ValueError(f"rewards of prompt {group.prompt} aren't finite: {group.rewards}")
        members.setdefault((group.prompt, group.normalized_with), []).append(group)
    rewards, where = np.zeros(size, np.float32), np.zeros(size, bool)
    widest = max((sum(len(g.rewards) for g in m) for m in members.values()), default=0)
    if len(members) > size[0] or widest > size[1]:
        raise ValueError(f"{len(members)} sets of up to {widest} rollouts exceed size={size}")
    for row, together in enumerate(members.values()):
        joined = np.concatenate([g.rewards for g in together])
        rewards[row, : len(joined)], where[row, : len(joined)] = joined, True
    advantages = np.asarray(_advantages(rewards, where=where, scale=scale))
    for row, together in enumerate(members.values()):
        ends = np.cumsum([len(g.rewards) for g in together])
        for group, end in zip(together, ends, strict=True):
            group.advantages = advantages[row, end - len(group.rewards) : end]


def pack(groups: Sequence[Group], shapes: Sequence[PackShape]) -> list[GroupBatch]:
    """Lays groups into microbatches: each into the smallest of `shapes` that holds it, in order.

    Args:
      groups: of at most K suffixes each.
      shapes: sizes to choose from, smallest first.

    Returns:
      Microbatches in the order of `shapes`; the last one of a shape is padded with empty groups.

    Raises:
      ValueError: a group that no shape holds, with its sizes.
    """
    chosen: dict[PackShape, list[Group]] = {shape: [] for shape in shapes}
    for group in groups:
        longest = max(map(len, group.suffixes))
        need = len(group.suffixes), len(group.prefix), longest
        for shape in shapes:
            if all(n <= s for n, s in zip(need, shape[1:], strict=True)):
                chosen[shape].append(group)
                break
        else:
            raise ValueError(f"a group of (rows, prefix, suffix) {need} fits none of {shapes}")
    return [
        _lay(members[first : first + shape.groups], shape)
        for shape, members in chosen.items()
        for first in range(0, len(members), shape.groups)
    ]


def empty_batch(shape: PackShape) -> GroupBatch:
    """A microbatch of padding."""
    return _lay([], shape)


def _lay(groups: Sequence[Group], shape: PackShape) -> GroupBatch:
    n, k, p, s = shape
    ints = partial(np.zeros, dtype=np.int32)
    batch = GroupBatch(
        prefix=ints((n, p)),
        prefix_lengths=ints(n),
        rows=ints((n, k, s)),
        targets=ints((n, k, s)),
        lengths=ints((n, k)),
        advantages=np.zeros((n, k), np.float32),
        behavior_logps=np.zeros((n, k, s), np.float32),
    )
    for i, group in enumerate(groups):
        held = len(group.prefix) - 1
        batch.prefix[i, :held] = group.prefix[:-1]
        batch.prefix_lengths[i] = held
        for j, (suffix, logps) in enumerate(zip(group.suffixes, group.behavior_logps, strict=True)):
            length = len(suffix)
            batch.rows[i, j, 0] = group.prefix[-1]
            batch.rows[i, j, 1:length] = suffix[:-1]
            batch.targets[i, j, :length] = suffix
            batch.behavior_logps[i, j, :length] = logps
            batch.lengths[i, j] = length
            batch.advantages[i, j] = group.advantages[j]
    return batch
