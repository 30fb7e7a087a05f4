"""Rotary angles in `config.json`: what transformers 4 called `rope_scaling` and 5 `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_keys import Keys
from jaxreset.models.rotary import RopeScaling, Yarn

THETA = 10_000.0  # where a folder doesn't say it
LONGEST = 32_768  # tokens, where nothing says how many a model takes


def read_rope(keys: Keys) -> dict[str, Any]:
    """`DecoderConfig`'s `rope_theta` and `rope_scaling` of a model whose layers all rotate alike."""
    # Where both are given, transformers prefers the older name too.
    rope = keys.section("rope_parameters") | keys.section("rope_scaling")
    return {
        "rope_theta": (keys | rope).number("rope_theta", THETA),
        "rope_scaling": read_scaling(rope, keys),
    }


def read_scaling(rope: Keys, keys: Keys) -> RopeScaling | Yarn | None:
    """The scaling that a section of a `config.json` with those other keys describes.

    Raises:
      ValueError: one that we don't compute; names file and key.
    """
    rope.require({"partial_rotary_factor": 1.0, "truncate": True})
    # "type" is what transformers called it before 4.43.
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind == "llama3":
        return _read_llama3(rope)
    if kind == "yarn":
        return _read_yarn(rope, keys)
    raise ValueError(
        f"{rope.file}: rope type {kind!r} is not supported; only default, llama3 and yarn"
    )


def _read_llama3(rope: Keys) -> RopeScaling:
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=int(rope.number("original_max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"{rope.file}: high_freq_factor {scaling.high_freq_factor} must exceed low_freq_factor "
            f"{scaling.low_freq_factor}"
        )
    return scaling


def _read_yarn(rope: Keys, keys: Keys) -> Yarn:
    factor = rope.number("factor")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    inferred = magnitude(1)
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        inferred = magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    longest = "original_max_position_embeddings"
    return Yarn(
        factor=factor,
        original_max_position=int(
            rope.number(longest)
            if longest in rope.values
            else keys.number("max_position_embeddings")
        ),
        attention_factor=rope.number("attention_factor", inferred),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )


def rope_keys(config: DecoderConfig) -> dict[str, Any]:
    """Keys for a model whose layers all rotate alike; transformers 5 reads the first, 4 the others.

    Raises:
      ValueError: layers with a window rotate otherwise, or there are any.
    """
    if config.windowed:
        raise ValueError("some layers have a window, and this family has none")
    return {
        "rope_parameters": {**section(config.rope_scaling), "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": section(config.rope_scaling) if config.rope_scaling else None,
        "max_position_embeddings": longest(config),
    }


def longest(config: DecoderConfig) -> int:
    """Tokens that a model takes, as its scaling has it."""
    scaling = config.rope_scaling
    return LONGEST if scaling is None else int(scaling.factor * scaling.original_max_position)


def section(scaling: RopeScaling | Yarn | None) -> dict[str, Any]:
    """The section that `read_scaling` reads, base of wavelengths left out."""
    if scaling is None:
        return {"rope_type": "default"}
    shared = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
    if isinstance(scaling, Yarn):
        return {
            "rope_type": "yarn",
            **shared,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
    return {
        "rope_type": "llama3",
        **shared,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }
