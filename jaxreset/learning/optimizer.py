"""AdamW with a schedule that follows the training, whether updates wait for signal or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreset.learning.settings import AdamW

Array = jax.Array


@partial(jax.jit, static_argnames="settings")
def learning_rate(updates: Array, position: Array, *, settings: AdamW) -> Array:
    """The rate of an update.

    The rise counts the updates themselves, since it is there for Adam's first ones; the decay follows the
    training, of which fewer updates than `steps` are made where they wait for signal.

    Args:
      updates: scalar int, optimizer steps made so far.
      position: scalar int, how many of the `steps` the training has had a chance to make.
      settings: static.
    """
    warmup = settings.warmup_steps
    decaying = max(settings.steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, decaying),
        "cosine": optax.cosine_decay_schedule(1.0, decaying),
    }[settings.schedule]
    risen = jnp.minimum((updates + 1) / max(warmup, 1), 1)
    # By hand an update may be made without telling the position.
    return (
        settings.learning_rate
        * risen
        * decay(jnp.maximum(jnp.maximum(updates, position) - warmup, 0))
    )


@functools.cache  # a static argument, so that equal ones share a program
def make_optimizer(settings: AdamW) -> optax.GradientTransformationExtraArgs:
    """AdamW behind a global-norm clip, whose `update` takes the training's `position`."""
    rate = partial(learning_rate, settings=settings)
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.chain(  # optax.adamw's parts, so that its state is the one that is saved
            optax.scale_by_adam(b1=settings.b1, b2=settings.b2),
            optax.add_decayed_weights(settings.weight_decay),
            _scale_by_rate(rate),
        ),
    )


def _scale_by_rate(
    rate: Callable[[Array, Array], Array],
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_schedule` for a rate of the updates so far and of the position."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, *, position: Any = 0, **_: Any
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        step = -rate(state.count, position)
        scaled = jax.tree.map(lambda u: step.astype(u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
