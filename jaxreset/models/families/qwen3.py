"""Qwen3: queries and keys are normed, each head for itself."""

from __future__ import annotations

from collections.abc import Mapping

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_rope import read_rope, rope_keys

ARCHITECTURE = "Qwen3ForCausalLM"
SWITCHES = frozenset({"qk_norm"})
TENSORS: Mapping[str, str] = {}

# Layers, width, heads, key-value heads, head width, hidden units, tied embeddings.
_SIZES = {
    "0.6B": (28, 1_024, 16, 8, 128, 3_072, True),
    "1.7B": (28, 2_048, 16, 8, 128, 6_144, True),
    "4B": (36, 2_560, 32, 8, 128, 9_728, True),
    "8B": (36, 4_096, 32, 8, 128, 12_288, False),
    "14B": (40, 5_120, 40, 8, 128, 17_408, False),
    "32B": (64, 5_120, 64, 8, 128, 25_600, False),
}
SIZES = {
    f"Qwen/Qwen3-{name}{kind}": DecoderConfig(
        151_936, *sizes[:6], rope_theta=1e6, qk_norm=True, tie_embeddings=sizes[6], family="qwen3"
    )
    for name, sizes in _SIZES.items()
    for kind in ("", "-Base")
}

read, write = read_rope, rope_keys
