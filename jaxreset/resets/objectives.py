"""The objectives: small combinations of a reset rule, a layout and the choice of what to reset.

Every objective is a policy gradient over groups that share a prefix; they differ in where it ends.
A new objective is an `Objective` anywhere, named by its import path: `objective: my_objectives:wide`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxreset import extensions
from jaxreset.resets.rules import ResetRule, check_rule, find_rule, needs_of

ObjectiveName = Literal["grpo", "rrpo", "srpo", "ladder"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
Method = Literal["ours", "paper"]
When = Literal["any_failure", "all_failed", "few_failed"]
Mask = Literal["suffix", "response"]
FEW = 1 / 4  # of a group, at most: its failures are rare


@dataclass(frozen=True)
class Objective:
    """Which groups are drawn for each prompt.

    Attributes:
      rule: where a failed rollout is reset: a name among `rules.RULES`, an import path, or the function
        itself; None for no resets.
      base: rollouts in the base group, drawn from the prompt.
      resets: reset groups of each rung, each from another failed rollout (its *seed*).
      branches: rollouts in each reset group.
      rungs: most resets in a row; each goes back into the groups of the one before.
      when: a group is reset when any of its rollouts failed, only when all did, or only when few did: a
        prompt that is nearly solved goes on from its rare failure (arXiv 2601.20829).
      seed_choice: the first failed rollout, or the one whose reset step is the largest ("deepest").
      drop_seeds: draw one rollout after the other until enough failed, leave those out of the base
        group (the paper), rather than keep the seed among the base group's rollouts (ours).
      max_draws: most rollouts drawn so.
      top_up: where nothing is reset, draw the reset groups' rollouts from the prompt and count them
        with the base group as one.
      mask: what of a reset group is learnt from: what it drew (the paper), or the kept steps too.
    """

    rule: str | ResetRule | None
    base: int
    resets: int = 0
    branches: int = 0
    rungs: int = 1
    when: When = "any_failure"
    seed_choice: Literal["first", "deepest"] = "first"
    drop_seeds: bool = False
    max_draws: int = 12
    top_up: bool = True
    mask: Mask = "suffix"

    def find_rule(self) -> ResetRule | None:
        """The rule as a function.

        Raises:
          ValueError: there is none of that name, or it can't be called as one.
        """
        return find_rule(self.rule) if isinstance(self.rule, str) else self.rule

    @property
    def needs(self) -> tuple[str, ...]:
        """What its rule takes besides the failures, see `rules.NEEDS`."""
        rule = self.find_rule()
        return () if rule is None else needs_of(rule)

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
    name: str,
    *,
    method: Method = "ours",
    rule: str | None = None,
    layout: str = "4+4",
    rungs: int | None = None,
    when: When | None = None,
    seed_choice: Literal["first", "deepest"] | None = None,
    drop_seeds: bool | None = None,
    mask: Mask | None = None,
) -> Objective:
    """The objective of a config; None takes what the objective's name stands for.

    Args:
      name: one of `OBJECTIVES`, or the import path of an `Objective`, which leaves the others no say.
      layout: "B+K": B rollouts from the prompt, and K from a reset state; "GxK": no base group, K
        rollouts from each of G reset states. GRPO draws as many in all, in one group.

    Raises:
      ValueError: a choice that the objective doesn't have, with what to do.
    """
    base, resets, branches = parse_layout(layout)
    choices = {"rule": rule, "rungs": rungs, "when": when, "seed_choice": seed_choice, "mask": mask}
    choices["drop_seeds"] = drop_seeds
    given = {key: value for key, value in choices.items() if value is not None}
    found = extensions.find(name, dict.fromkeys(OBJECTIVES), "objective")
    if found is not None:
        if given or layout != "4+4":
            raise ValueError(
                f"objective={name} says itself what is reset, but reset got {given or layout}; leave it out"
            )
        return check_objective(found)
    if rule is not None:
        find_rule(rule)
    if name == "grpo":
        if given:
            raise ValueError(f"objective=grpo has no resets, but reset got {given}; leave them out")
        return Objective(rule=None, base=base + resets * branches, top_up=False)
    if name == "ladder":
        if method == "paper" or base == 0 or drop_seeds:
            raise ValueError(
                f"objective=ladder with method={method}, drop_seeds={drop_seeds}, layout={layout}: the "
                "ladder is ours and climbs from a base group that holds its seeds; use method=ours and a "
                "layout such as 4+4"
            )
        ladder = {"rule": "self", "rungs": 3, "when": "all_failed", "seed_choice": "deepest"}
        sizes = {"base": base, "resets": resets, "branches": branches}
        return Objective(**sizes, top_up=False, **ladder | given)  # type: ignore[arg-type]
    if rungs not in (None, 1):
        raise ValueError(f"reset.rungs={rungs}: {name} resets once; use objective=ladder for more")
    if drop_seeds is None or base == 0:
        drop_seeds = method == "paper" or base == 0
    if drop_seeds and (when not in (None, "any_failure") or seed_choice == "deepest"):
        raise ValueError(
            f"reset.when={when}, reset.seed_choice={seed_choice}: with method=paper, reset.drop_seeds or a "
            "layout without a base group, the first failures drawn are reset; leave both out"
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
        mask=mask or "suffix",
    )


def check_objective(found: Any) -> Objective:
    """What was named or handed over as an objective.

    Raises:
      ValueError: it is none, or its numbers make no groups.
    """
    if not isinstance(found, Objective):
        raise ValueError(
            f"{found!r:.80} is no objective; expected a jaxreset.Objective, such as "
            "Objective(rule='random', base=4, resets=1, branches=4)"
        )
    o, rule = found, found.find_rule()
    drawn = o.base >= 2 or (o.base == 0 and o.drop_seeds)
    if not drawn or o.rungs < 1 or (rule and (o.resets < 1 or o.branches < 2)):
        raise ValueError(
            f"{o}: a group needs at least 2 rollouts whose outcomes can differ, and a rule a reset"
        )
    if rule is not None:
        check_rule(rule)
    return o


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
