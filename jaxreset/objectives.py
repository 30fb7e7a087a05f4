"""The objectives: small combinations of a reset rule, a layout and the choice of what to reset.

Every objective is a policy gradient over groups that share a prefix; they differ in where it ends.
A new objective is a new `Objective`, or a new rule in `resets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxreset.resets import RuleName

ObjectiveName = Literal["grpo", "rrpo", "srpo", "ladder"]
Method = Literal["ours", "paper"]
Layout = Literal["4+4", "2x4", "1x8"]


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
    layout: Layout = "4+4",
    rungs: int | None = None,
    when: Literal["any_failure", "all_failed"] | None = None,
    seed_choice: Literal["first", "deepest"] | None = None,
) -> Objective:
    """The objective of a config; None takes what the objective's name stands for.

    Raises:
      ValueError: a choice that the objective doesn't have, with what to do.
    """
    if name == "grpo":
        asked: dict[str, object] = {
            "rule": rule,
            "rungs": rungs,
            "when": when,
            "seed_choice": seed_choice,
        }
        asked["layout"] = None if layout == "4+4" else layout
        if given := {k: v for k, v in asked.items() if v is not None}:
            raise ValueError(f"objective=grpo has no resets, but reset got {given}; leave them out")
        return Objective(rule=None, base=8, top_up=False)
    if name == "ladder":
        if method == "paper" or layout != "4+4":
            raise ValueError(
                f"objective=ladder with method={method}, layout={layout}: the ladder is ours, with "
                "layout 4+4 only; use method=ours and layout=4+4"
            )
        return Objective(
            rule=rule or "self",
            base=4,
            resets=1,
            branches=4,
            rungs=3 if rungs is None else rungs,
            when=when or "all_failed",
            seed_choice=seed_choice or "deepest",
            top_up=False,
        )
    if rungs not in (None, 1):
        raise ValueError(f"reset.rungs={rungs}: {name} resets once; use objective=ladder for more")
    base, resets, branches = {"4+4": (4, 1, 4), "2x4": (0, 2, 4), "1x8": (0, 1, 8)}[layout]
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
    )
