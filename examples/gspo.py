"""A form of the loss: the clipped ratio of whole sequences (GSPO, arXiv 2507.18071).

loss: {form: "gspo:sequence_ratio"}
"""

from __future__ import annotations

import jax.numpy as jnp

LOW, HIGH = 3e-4, 4e-4  # of the clip, as published


def sequence_ratio(logps, advantages, mask, *, behavior_logps):
    """The losses of tokens: each has its sequence's, whose mean over the tokens is GSPO's.

    Args:
      logps, advantages, behavior_logps: [..., T].
      mask: [..., T] bool, the tokens of the response.
    """
    tokens = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    log_ratio = jnp.where(mask, logps - behavior_logps, 0).sum(-1, keepdims=True) / tokens
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - LOW, 1 + HIGH)
    return jnp.maximum(-advantages * ratio, -advantages * clipped)
