"""What the warm start of a fresh policy holds: all its parameters are trained, at most in whole batches.

That of another policy trains what training trains, in microbatches that are no larger than training's: the
phase "update" covers it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxreset.models import activations
from jaxreset.parallel import data_shards
from jaxreset.planning.ahead import Subject, device_bytes_of


def warm_start_parts(subject: Subject) -> dict[str, int] | None:
    """Bytes on a device, estimated; None: there is no warm start that "update" doesn't cover."""
    config = subject.config
    if not config.warm_start.steps or config.model.path is not None:
        return None
    base = subject.state.params if subject.model.lora is None else subject.frozen
    trained = device_bytes_of(jax.tree.map(_wide, base))
    size = jnp.dtype(subject.model.dtype).itemsize
    return {
        "trained parameters": trained,
        "frozen parameters": trained * size // 4 if size < 4 else 0,  # what it starts from
        "optimizer": 2 * trained,
        "gradients": trained,
        "temporary": _activations(subject),
    }


def _activations(subject: Subject) -> int:
    """Of the forward and backward pass of as many rows as run at once, each as long as it may be."""
    config, shards = subject.config, data_shards(subject.mesh)
    s, asked = config.sampling, config.reset.localizer
    longest = max(
        s.max_prompt_tokens + s.max_response_tokens, asked.max_question_tokens + asked.max_tokens
    )
    rows, remat = config.warm_start.batch, False
    if not config.warms_at_once:
        rows, remat = max(config.train.microbatch_tokens // longest, shards), config.train.remat
    own = rows if rows % shards else rows // shards
    return activations.update_bytes(subject.model, own, 0, 1, longest, remat=remat)


def _wide(x: Any) -> jax.ShapeDtypeStruct:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
