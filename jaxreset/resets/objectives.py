"""The objectives: small combinations of a reset rule, a layout and the choice of what to reset.

Every objective is a policy gradient over groups that share a prefix; they differ in where it ends.
A new objective is a new `Objective`, or a new rule in `resets`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jaxreset.resets.rules import RuleName

ObjectiveName = Literal["grpo", "rrpo", "srpo", "ladder"]
Method = Literal["ours", "paper"]


@dataclass(frozen=True)
class Objective:
    """Which groups are drawn for each prompt.

    Attributes:
      rule: where a failed rollout is reset, or None for no resets.
      base: rollouts in the base group, drawn from the prompt.
      resets: reset groups of each rung, each from another failed rollout (its *seed*).
      branches: rollouts in each reset group.
      rungs: most resets in a row; each goes back into the groups of the one before.
      when: a group is reset when any of its rollouts failed, or only when all did.
      seed_choice: the first failed rollout, or the one whose reset step is the largest ("deepest").
      drop_seeds: draw one rollout after the other until enough failed, leave those out of the base
        group (the paper), rather than keep the seed among the base group's rollouts (ours).
      max_draws: most rollouts drawn so.
      top_up: where nothing is reset, draw the reset groups' rollouts from the prompt and count them
        with the base group as one.
    """

    rule: RuleName | None
    base: int
    resets: int = 0
    branches: int = 0
    rungs: int = 1
    when: Literal["any_failure", "all_failed"] = "any_failure"
    seed_choice: Literal["first", "deepest"] = "first"
    drop_seeds: bool = False
    max_draws: int = 12
    top_up: bool = True

    @property
    def first_draw(self) -> int:
        """Rollouts of the first round from each prompt."""
        return self.base + (self.resets if self.drop_seeds else 0)

    @property
    def rollouts(self) -> int:
        """Most rollouts of a prompt that are trained on."""
        return self.base + self.rungs * self.resets * self.branches

    @property
    def most_in_group(self) -> int:
        """Most rollouts of one group."""
        return max(self.base, self.branches)


def make_objective(
    name: ObjectiveName,
    *,
    method: Method = "ours",
    rule: RuleName | None = None,
    layout: str = "4+4",
    rungs: int | None = None,
    when: Literal["any_failure", "all_failed"] | None = None,
    seed_choice: Literal["first", "deepest"] | None = None,
) -> Objective:
    """The objective of a config; None takes what the objective's name stands for.

    Args:
      layout: "B+K": B rollouts from the prompt, and K from a reset state; "GxK": no base group, K
        rollouts from each of G reset states. GRPO draws as many in all, in one group.

    Raises:
      ValueError: a choice that the objective doesn't have, with what to do.
    """
    base, resets, branches = parse_layout(layout)
    if name == "grpo":
        asked: dict[str, object] = {
            "rule": rule,
            "rungs": rungs,
            "when": when,
            "seed_choice": seed_choice,
        }
        if given := {k: v for k, v in asked.items() if v is not None}:
            raise ValueError(f"objective=grpo has no resets, but reset got {given}; leave them out")
        return Objective(rule=None, base=base + resets * branches, top_up=False)
    if name == "ladder":
        if method == "paper" or base == 0:
            raise ValueError(
                f"objective=ladder with method={method}, layout={layout}: the ladder is ours and "
                "starts from a base group; use method=ours and a layout such as 4+4"
            )
        return Objective(
            rule=rule or "self",
            base=base,
            resets=resets,
            branches=branches,
            rungs=3 if rungs is None else rungs,
            when=when or "all_failed",
            seed_choice=seed_choice or "deepest",
            top_up=False,
        )
    if rungs not in (None, 1):
        raise ValueError(f"reset.rungs={rungs}: {name} resets once; use objective=ladder for more")
    drop_seeds = method == "paper" or base == 0
    if drop_seeds and (when == "all_failed" or seed_choice == "deepest"):
        raise ValueError(
            f"reset.when={when}, reset.seed_choice={seed_choice}: with method=paper, or a layout "
            "without a base group, the first failures drawn are reset; leave both out"
        )
    return Objective(
        rule=rule or ("self" if name == "srpo" else "random"),
        base=base,
        resets=resets,
        branches=branches,
        when=when or "any_failure",
        seed_choice=seed_choice or "first",
        drop_seeds=drop_seeds,
        max_draws=3 * (base + resets * branches) // 2,
    )


def parse_layout(layout: str) -> tuple[int, int, int]:
    """ "4+4" -> (4, 1, 4) and "2x4" -> (0, 2, 4): base rollouts, reset groups, rollouts in each.

    Raises:
      ValueError: neither form, or a group without two rollouts to compare.
    """
    match = re.fullmatch(r"(\d+)([+x])(\d+)", layout)
    if not match:
        raise ValueError(
            f"reset.layout={layout}: expected B+K (a base group and a reset group), such as 4+4, or "
            "GxK (reset groups alone), such as 2x4"
        )
    first, branches = int(match[1]), int(match[3])
    base, resets = (first, 1) if match[2] == "+" else (0, first)
    if branches < 2 or base == 1 or first == 0:
        raise ValueError(
            f"reset.layout={layout}: a group needs at least 2 rollouts whose outcomes can differ; "
            "enlarge it"
        )
    return base, resets, branches
