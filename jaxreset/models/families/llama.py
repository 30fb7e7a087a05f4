"""Llama 3: wavelengths scaled for long contexts; neither biases nor norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_rope import read_rope, rope_keys
from jaxreset.models.rotary import RopeScaling

ARCHITECTURE = "LlamaForCausalLM"
SWITCHES: frozenset[str] = frozenset()
TENSORS: Mapping[str, str] = {}

# Layers, width, heads, key-value heads, head width, hidden units, tied embeddings, scaling of wavelengths.
_SIZES = {
    "3.1-8B": (32, 4_096, 32, 8, 128, 14_336, False, 8.0),
    "3.2-1B": (16, 2_048, 32, 8, 64, 8_192, True, 32.0),
    "3.2-3B": (28, 3_072, 24, 8, 128, 8_192, True, 32.0),
}
SIZES = {
    f"meta-llama/Llama-{name}{kind}": DecoderConfig(
        128_256,
        *sizes[:6],
        rope_theta=5e5,
        rope_scaling=RopeScaling(sizes[7], 1.0, 4.0, 8192),
        tie_embeddings=sizes[6],
        family="llama",
    )
    for name, sizes in _SIZES.items()
    for kind in ("", "-Instruct")
}

read = read_rope


def write(config: DecoderConfig) -> dict[str, Any]:
    """Keys of its rotary angles; `transformers` takes no width that heads don't divide."""
    if config.width % config.heads:
        raise ValueError(
            f"width {config.width} is no multiple of heads {config.heads}, as Llama needs it"
        )
    return rope_keys(config)
