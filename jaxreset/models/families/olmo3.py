"""OLMo 3: norms behind attention and MLP, and a window in three layers of four.

Queries and keys are normed over all heads together. Layers with a window keep the pretrained wavelengths;
the others scale theirs (YaRN) for long contexts.
"""

from __future__ import annotations

from typing import Any

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_keys import Keys
from jaxreset.models.config_rope import longest, read_scaling, section
from jaxreset.models.rotary import Rope, Yarn

ARCHITECTURE = "Olmo3ForCausalLM"
SWITCHES = frozenset({"joint_qk_norm", "post_norm"})
TENSORS = {
    "attention_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "post_feedforward_layernorm.weight",
}
THETA, WINDOW = 5e5, 4096
FULL, SLIDING = "full_attention", "sliding_attention"  # names of kinds of layers


def _windowed(layers: int) -> tuple[bool, ...]:
    """Which layers have a window, where nothing else is said."""
    return tuple((layer + 1) % 4 != 0 for layer in range(layers))


# Layers, width, heads, key-value heads, head width, hidden units.
_SIZES = {
    "7B": (32, 4_096, 32, 32, 128, 11_008),
    "32B": (64, 5_120, 40, 8, 128, 27_648),
}
_NAMES = {
    "7B": ("Olmo-3-1025-7B", "Olmo-3-7B-Instruct", "Olmo-3-7B-Think"),
    "32B": ("Olmo-3-1125-32B", "Olmo-3-32B-Think", "Olmo-3.1-32B-Instruct", "Olmo-3.1-32B-Think"),
}
SIZES = {
    f"allenai/{name}": DecoderConfig(
        100_278,
        *sizes,
        rope_theta=THETA,
        rope_scaling=Yarn(8.0, 8192, attention_factor=1.2079441541679836),
        norm_eps=1e-6,
        joint_qk_norm=True,
        post_norm=True,
        window=WINDOW,
        windowed=_windowed(sizes[0]),
        window_rope=Rope(THETA),
        tie_embeddings=False,
        family="olmo3",
    )
    for size, sizes in _SIZES.items()
    for name in _NAMES[size]
}


def read(keys: Keys) -> dict[str, Any]:
    """Windows, and the angles of either kind of layer."""
    windowed, by_kind = _read_windowed(keys), keys.section("rope_parameters")
    if by_kind.values and not by_kind.values.keys() & {FULL, SLIDING}:
        raise ValueError(
            f"{keys.file}: rope_parameters has neither {FULL} nor {SLIDING}, which OLMo 3 keeps apart"
        )
    # transformers 4 has one base for both kinds, and scales full attention only.
    whole = by_kind.section(FULL) | keys.section("rope_scaling")
    inside = by_kind.section(SLIDING)
    theta, scaling = (keys | whole).number("rope_theta", THETA), read_scaling(whole, keys)
    fields: dict[str, Any] = {
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    if any(windowed):
        rope = Rope((keys | inside).number("rope_theta", THETA), read_scaling(inside, keys))
        fields |= {
            "window": keys.size("sliding_window"),
            "windowed": windowed,
            "window_rope": None if rope == Rope(theta, scaling) else rope,
        }
    return fields


def _read_windowed(keys: Keys) -> tuple[bool, ...]:
    layers, kinds = keys.size("num_hidden_layers"), keys.listed("layer_types")
    if not kinds:
        return _windowed(layers)
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise ValueError(
            f"{keys.file}: layer_types holds {unknown[0]!r}; expected {FULL} and {SLIDING} only"
        )
    if len(kinds) != layers:
        raise ValueError(
            f"{keys.file}: layer_types has {len(kinds)} entries; expected one for each of "
            f"num_hidden_layers {layers}"
        )
    return tuple(kind == SLIDING for kind in kinds)


def write(config: DecoderConfig) -> dict[str, Any]:
    """Keys of windows and angles; transformers 4 has one base of wavelengths for both kinds of layers."""
    c = config
    inside = c.window_rope or Rope(c.rope_theta, c.rope_scaling)
    return {
        "layer_types": [SLIDING if w else FULL for w in c.windowed or (False,) * c.layers],
        "sliding_window": c.window or WINDOW,
        "rope_parameters": {
            FULL: {**section(c.rope_scaling), "rope_theta": c.rope_theta},
            SLIDING: {**section(inside.scaling), "rope_theta": inside.theta},
        },
        "rope_theta": c.rope_theta,
        "rope_scaling": section(c.rope_scaling) if c.rope_scaling else None,
        "max_position_embeddings": longest(c),
    }
