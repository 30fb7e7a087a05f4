"""Floating-point operations of a decoder, from its sizes.

A compiler's own count has each loop's body once, so it says nothing of layers and tokens. Counted are
matrix products, two operations for each multiplication and addition.
"""

from __future__ import annotations

from jaxreset.models.block import DecoderConfig


def token_flops(config: DecoderConfig) -> float:
    """Of one token through all blocks, attention left out."""
    return 2.0 * config.layers * (_matrices(config) + _adapters(config))


def head_flops(config: DecoderConfig) -> float:
    """Of one token's logits."""
    return 2.0 * config.width * config.vocab


def attention_flops(config: DecoderConfig, slots: float) -> float:
    """Of one token that attends to so many."""
    return 4.0 * config.layers * config.heads * config.head_dim * slots


def prefill_flops(config: DecoderConfig, tokens: int) -> float:
    """Of a prefix of so many tokens."""
    return tokens * (token_flops(config) + attention_flops(config, tokens / 2))


def decode_flops(config: DecoderConfig, prefix: int, tokens: int) -> float:
    """Of a row that draws so many tokens behind a prefix."""
    attended = attention_flops(config, prefix + tokens / 2)
    return tokens * (token_flops(config) + attended + head_flops(config))


def update_flops(
    config: DecoderConfig, prefix: int, rows: int, tokens: int, *, remat: bool
) -> float:
    """Of the gradient of a group of so many rows behind a prefix, which runs once.

    A frozen matrix has no gradient of its own: its backward pass costs as much as its forward pass, that
    of a trained one twice as much. Attention scores and logits are always computed anew, and with `remat`
    all else.
    """
    suffixes = rows * tokens
    products = 2.0 * config.layers * (prefix + suffixes)
    frozen = config.lora is not None
    forward = 1 + remat
    blocks = products * (
        _matrices(config) * (forward + (1 if frozen else 2)) + _adapters(config) * (forward + 2)
    )
    attended = attention_flops(config, 1) * (prefix * prefix / 2 + suffixes * (prefix + tokens / 2))
    logits = suffixes * head_flops(config) * (2 + (1 if frozen else 2))
    return blocks + attended * (forward + 1 + 2) + logits


def _matrices(config: DecoderConfig) -> int:
    """Numbers in the matrices of a block."""
    c = config
    return c.width * ((2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.mlp)


def _adapters(config: DecoderConfig) -> int:
    """Numbers in the adapters of a block."""
    if (lora := config.lora) is None:
        return 0
    c, queries, keys = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {
        "q": (c.width, queries),
        "k": (c.width, keys),
        "v": (c.width, keys),
        "o": (queries, c.width),
        "gate": (c.width, c.mlp),
        "up": (c.width, c.mlp),
        "down": (c.mlp, c.width),
    }
    return lora.rank * sum(sum(sizes[name]) for name in lora.targets)
