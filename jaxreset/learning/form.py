"""The form of a run's loss: what `losses.policy_loss` is called with, and functions from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxreset import extensions
from jaxreset.losses import Aggregation, KLEstimator, Scale

ADVANTAGE = "a function of (rewards, where=...), [..., K] both, that returns advantages [..., K]"
FORM = (
    "a function of (logps, advantages, mask, behavior_logps=...), all [..., T], that returns the losses of "
    "tokens [..., T]"
)


@dataclass(frozen=True)
class LossForm:
    """The static choices of a loss; see `losses.policy_loss`.

    Attributes:
      aggregation, clip, dual_clip, form: its.
      recompute: the clipped ratio is to the trainer's own log-probabilities before the step's first update,
        not to the sampler's.
      importance_cap: see `losses.importance_weights`; None: no weights.
      kl, kl_estimator: coefficient of `losses.kl_penalty`.
      entropy_bonus: coefficient of the entropy.

    Raises:
      ValueError: `clip` and `importance_cap` without `recompute`: both would hold the ratio to the sampler.
    """

    aggregation: Aggregation = "sequence"
    clip: float | tuple[float, float] | None = None
    dual_clip: float | None = None
    recompute: bool = False
    importance_cap: float | None = None
    kl: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_bonus: float = 0.0
    form: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and self.importance_cap is not None and not self.recompute:
            raise ValueError(
                f"importance_cap={self.importance_cap} with clip={self.clip} and recompute=False counts "
                "the ratio to the sampler twice; recompute, or leave one out"
            )

    @property
    def regularized(self) -> bool:
        """Whether tokens have a gradient even where the advantage is 0."""
        return bool(self.kl or self.entropy_bonus)


def find_advantage(name: str) -> Scale | Callable[..., Any]:
    """One of `losses.Scale`, or the function of an import path.

    Raises:
      ValueError: neither, or it can't be called as an advantage.
    """
    found = extensions.find(name, {scale: scale for scale in get_args(Scale)}, "advantage")
    return found if isinstance(found, str) else check_advantage(found)  # type: ignore[return-value]


def check_advantage(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, if it makes advantages of rewards; raises `ValueError`. Nothing is computed."""
    extensions.check_call(function, ADVANTAGE, count=1, keywords=["where"])
    rewards = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    where = jax.ShapeDtypeStruct((3, 8), jnp.bool_)
    return _check_shape(function, ADVANTAGE, rewards, where=where)


def find_form(name: str) -> Callable[..., Any]:
    """The function of an import path.

    Raises:
      ValueError: there is none, or it can't be called as a form of the loss.
    """
    return check_form(extensions.find(name, {}, "form of the loss"))


def check_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, if it makes losses of log-probabilities; raises `ValueError`. Nothing is computed."""
    extensions.check_call(function, FORM, count=3, keywords=["behavior_logps"])
    logps = jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct(logps.shape, jnp.bool_)
    return _check_shape(function, FORM, logps, logps, mask, behavior_logps=logps)


def _check_shape(function: Callable[..., Any], expected: str, *args: Any, **kwargs: Any) -> Any:
    name = extensions.path_of(function)
    try:
        result = jax.eval_shape(function, *args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"{name} can't be traced by JAX, in which it runs jitted ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); expected {expected}, of JAX arrays"
        ) from error
    if getattr(result, "shape", None) != args[0].shape:
        shape = getattr(result, "shape", None)
        raise ValueError(
            f"{name} gave {'no array' if shape is None else f'shape {shape}'} for {args[0].shape}; "
            f"expected {expected}"
        )
    return function
