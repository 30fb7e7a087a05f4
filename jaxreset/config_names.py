"""What a section of a config is, and names in it that stand for what may come from outside.

Each name is found when it is read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from jaxreset import extensions
from jaxreset.learning.form import find_advantage, find_form
from jaxreset.resets.rules import find_rule
from jaxreset.tasks.classes import find_task
from jaxreset.tasks.rewards import find_reward


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _named(find: Any) -> AfterValidator:
    """Of a name: that `find` finds it. What it finds is found again where it is used."""

    def check(name: str) -> str:
        find(name)
        return name

    return AfterValidator(check)


CALLBACK = "a function of (record, experiment)"


def find_callback(name: str) -> Any:
    """The function of an import path; raises `ValueError`."""
    return check_callback(extensions.find(name, {}, "callback"))


def check_callback(function: Any) -> Any:
    """The function, if it can be called as a callback; raises `ValueError`."""
    return extensions.check_call(function, CALLBACK, count=2)


RuleName = Annotated[str, _named(find_rule)]
RewardName = Annotated[str, _named(find_reward)]
TaskName = Annotated[str, _named(find_task)]
AdvantageName = Annotated[str, _named(find_advantage)]
FormName = Annotated[str, _named(find_form)]
CallbackName = Annotated[str, _named(find_callback)]


def by_name(rewards: Any) -> Any:
    """Rewards in short, one by its import path or several without weights, as the schema has them."""
    if isinstance(rewards, str):
        rewards = {rewards.rpartition(":")[2].rpartition(".")[2]: rewards}
    if not isinstance(rewards, dict | None):
        raise ValueError(
            f"{rewards!r:.80}: expected an import path, or rewards by names of your own"
        )
    if rewards is None:
        return None
    if not rewards or "mean" in rewards:
        raise ValueError(
            f"{rewards!r:.80}: expected at least one reward, and none called mean: reward/mean is their sum"
        )
    return {n: {"function": r} if isinstance(r, str) else r for n, r in rewards.items()}
