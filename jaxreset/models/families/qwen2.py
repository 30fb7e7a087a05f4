"""Qwen2 and Qwen2.5: queries, keys and values have biases."""

from __future__ import annotations

from collections.abc import Mapping

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_rope import read_rope, rope_keys

ARCHITECTURE = "Qwen2ForCausalLM"
SWITCHES = frozenset({"qkv_bias"})
TENSORS: Mapping[str, str] = {}

# Vocabulary, layers, width, heads, key-value heads, head width, hidden units, tied embeddings.
_SIZES = {
    "0.5B": (151_936, 24, 896, 14, 2, 64, 4_864, True),
    "1.5B": (151_936, 28, 1_536, 12, 2, 128, 8_960, True),
    "3B": (151_936, 36, 2_048, 16, 2, 128, 11_008, True),
    "7B": (152_064, 28, 3_584, 28, 4, 128, 18_944, False),
    "14B": (152_064, 48, 5_120, 40, 8, 128, 13_824, False),
    "32B": (152_064, 64, 5_120, 40, 8, 128, 27_648, False),
}
SIZES = {
    f"Qwen/Qwen2.5-{name}{kind}": DecoderConfig(
        *sizes[:7], rope_theta=1e6, qkv_bias=True, tie_embeddings=sizes[7], family="qwen2"
    )
    for name, sizes in _SIZES.items()
    for kind in ("", "-Instruct")
}

read, write = read_rope, rope_keys
