"""Bytes that programs of a decoder need besides their arguments and results, from its sizes.

Estimates, for when there is no time to compile; a plan reads what a compiler says.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxreset.losses import chunk_size
from jaxreset.models.attention import LEAST_BLOCK, MOST_BLOCKS
from jaxreset.models.block import DecoderConfig

WIDE = 4  # bytes of a float32


def prefill_bytes(config: DecoderConfig, tokens: int, prefix: int) -> int:
    """Of running so many tokens at once behind so many: one layer's activations, and scores."""
    scores = 2 * WIDE * config.heads * prefix
    return tokens * (_token_bytes(config) // 2 + scores)


def decode_bytes(config: DecoderConfig, lanes: int) -> int:
    """Of decoding steps of so many lanes: logits and what drawing makes of them."""
    return lanes * config.vocab * WIDE * 6


def update_bytes(
    config: DecoderConfig, bins: int, prefix: int, lanes: int, slots: int, *, remat: bool
) -> int:
    """Of the forward and backward pass of bins of a microbatch, gradients left out; see `microbatches`."""
    c = config
    tokens = bins * (prefix + lanes * slots)
    stream = tokens * c.width * jnp.dtype(c.dtype).itemsize
    inputs = c.layers * stream
    kept = inputs if remat else c.layers * tokens * _token_bytes(c)
    block = max(LEAST_BLOCK, -(-slots // MOST_BLOCKS))
    scores = 3 * WIDE * bins * c.heads * lanes * min(block, slots) * (prefix + slots)
    logits = 3 * WIDE * min(chunk_size(c.vocab), tokens) * c.vocab
    return kept + max(tokens * _token_bytes(c) + scores, logits)


def _token_bytes(config: DecoderConfig) -> int:
    """Of what one token leaves for the backward pass in a layer."""
    c = config
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    # The stream, norms in float32 before and after their scale, heads before and after rotation, gate, up,
    # their product, and the derivative of its activation.
    numbers = 2 * heads + 5 * c.mlp
    return numbers * jnp.dtype(c.dtype).itemsize + 6 * c.width * WIDE
