"""Step-level credit: what a reset kept of a rollout is worth what it adds to the chance of success."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jaxreset.groups import Group


def credit_steps(
    groups: Sequence[Group], *, cut_penalty: float = 0.0, mask_cut: bool = False
) -> None:
    """Gives the tokens of rollouts that were reset advantages of their own, `Group.token_advantages`.

    A group's mean reward is the value of the state that it starts from (VinePPO, arXiv 2410.01679; SPO,
    arXiv 2505.23564). Of a rollout with a reset before step h,

        tokens of the kept steps   value of the reset group - value of its own group
        the tokens after them      its reward - value of the reset group

    in the unit that the group's advantages have, whichever of `losses.Scale` made them: together they are
    the group's advantage, and a rollout without resets has just that. With several resets each part is
    between two of them.

    Args:
      groups: of a step, those of a prompt in the order in which they were drawn, with advantages.
      cut_penalty, mask_cut: as of `groups.set_advantages`, which was called before.
    """

    def value_of(group: Group) -> float:
        return float(np.mean(group.rewards - cut_penalty * group.cut))

    of_prompt: defaultdict[int, list[Group]] = defaultdict(list)
    for group in groups:
        of_prompt[group.prompt].append(group)
    for family in of_prompt.values():
        for number, group in enumerate(family):
            children: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
            for child in family:
                if child.parent is not None and child.parent[0] == number:
                    kept = len(child.prefix) - len(group.prefix)
                    children[child.parent[1]].append((kept, value_of(child)))
            if not children:
                continue
            together = [g for g in family if g.normalized_with == group.normalized_with]
            rewards = np.concatenate([g.rewards - cut_penalty * g.cut for g in together])
            advantages = np.concatenate([g.advantages for g in together])
            value, unit = value_of(group), _unit(rewards - rewards.mean(), advantages)
            group.token_advantages = [
                _of_parts(
                    len(suffix), sorted(children[row]), value, unit, float(group.advantages[row])
                )
                for row, suffix in enumerate(group.suffixes)
            ]
            for row in np.flatnonzero(np.broadcast_to(group.cut & mask_cut, len(group.suffixes))):
                group.token_advantages[row] = np.zeros(len(group.suffixes[row]), np.float32)


def _of_parts(
    length: int, cuts: Sequence[tuple[int, float]], start: float, unit: float, whole: float
) -> np.ndarray:
    """Advantages `[length]` of a rollout's tokens; `cuts`: kept tokens and value of each reset."""
    advantages, begin, value = np.zeros(length, np.float32), 0, start
    for kept, reached in cuts:
        advantages[begin : max(kept, begin)] = (reached - value) / unit
        if kept > begin:
            begin, value = kept, reached
    advantages[begin:] = whole - (value - start) / unit
    return advantages


def _unit(rewards: np.ndarray, advantages: np.ndarray) -> float:
    """What a group's rewards, less their mean, were divided by; 1 where nobody has an advantage."""
    largest = int(np.argmax(np.abs(advantages)))
    if not advantages[largest]:
        return 1.0
    return float(rewards[largest] / advantages[largest])
