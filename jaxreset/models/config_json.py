"""`config.json` of a Hugging Face folder, read into a `DecoderConfig` and written from one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxreset.models.block import DecoderConfig
from jaxreset.models.rotary import RopeScaling

FILE = "config.json"
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Switches of config.json that change what a model computes, and the one setting that we compute.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_config(path: str | Path, *, dtype: str = "float32") -> DecoderConfig:
    """Sizes and switches from a folder's `config.json`, as transformers 4 or 5 wrote it.

    Args:
      path: the checkpoint's folder.
      dtype: of the decoder's parameters, whatever the folder stores.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: a model that we don't compute, a missing or impossible key, an unknown `dtype`.
    """
    check_dtype(dtype)
    file = Path(path) / FILE
    raw = read_json(file)
    family, architectures = raw.get("model_type"), _listed(file, raw, "architectures")
    if not isinstance(family, str) or ARCHITECTURES.get(family) not in (
        architectures or ARCHITECTURES.values()
    ):
        raise ValueError(
            f"{file}: architectures {architectures}, model_type {family!r} is not supported; "
            f"expected one of {', '.join(ARCHITECTURES.values())}"
        )
    # Where both are given, transformers prefers the older name too.
    rope = _section(file, raw, "rope_parameters") | _section(file, raw, "rope_scaling")
    for key, ours in FIXED.items():
        for value in (raw.get(key), rope.get(key)):
            if value is not None and value != ours:
                raise ValueError(f"{file}: {key} is {value!r}; only {ours!r} is supported")
    if any(kind != "full_attention" for kind in _listed(file, raw, "layer_types")):
        raise ValueError(f"{file}: layer_types holds more than 'full_attention', all we support")

    def size(key: str, default: int | None = None) -> int:
        value = default if raw.get(key) is None else raw[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{file}: {key} is {value!r}; expected a positive integer")
        return value

    tied = raw.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise ValueError(f"{file}: tie_word_embeddings is {tied!r}; expected true or false")

    width, heads = size("hidden_size"), size("num_attention_heads")
    config = DecoderConfig(
        vocab=size("vocab_size"),
        layers=size("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", width // heads),
        mlp=size("intermediate_size"),
        rope_theta=_number(file, raw | rope, "rope_theta", 10_000.0),
        rope_scaling=_rope_scaling(file, rope),
        norm_eps=_number(file, raw, "rms_norm_eps", 1e-6),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(tied),
        dtype=dtype,
    )
    if config.heads % config.kv_heads:
        raise ValueError(
            f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{config.kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"{file}: head_dim {config.head_dim} is odd; rotary angles need pairs")
    return config


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` 4 and 5 compute what the decoder computes.

    Raises:
      ValueError: no architecture of `transformers` does.
    """
    c = config
    if c.qkv_bias and c.qk_norm:
        raise ValueError("qkv_bias and qk_norm are both set: transformers has no such architecture")
    family = "qwen2" if c.qkv_bias else "qwen3" if c.qk_norm else "llama"
    if family == "llama" and c.width % c.heads:
        raise ValueError(f"width {c.width} is no multiple of heads {c.heads}, as Llama needs it")
    rope: dict[str, Any] = {"rope_type": "default"}
    longest = 32_768
    if (scaling := c.rope_scaling) is not None:
        longest = int(scaling.factor * scaling.original_max_position)
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": c.vocab,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": longest,
        # transformers 5 reads these two, 4 the three after them.
        "dtype": c.dtype,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},
        "torch_dtype": c.dtype,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope if c.rope_scaling else None,
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; a missing or malformed file is refused by its name."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{file} does not exist; expected a Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def check_dtype(dtype: str) -> None:
    """Refuses what parameters can't be stored in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise ValueError("dtype is 'float64', but jax computes in 32 bits: set JAX_ENABLE_X64=1")


def _number(file: Path, source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if source.get(key) is None else source[key]
    # Python reads NaN, Infinity and integers of any length as JSON; no float holds the longest.
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 0 < number <= sys.float_info.max:
        raise ValueError(f"{file}: {key} is {value!r}; expected a positive number")
    return float(number)


def _section(file: Path, source: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = source.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"{file}: {key} is {value!r}; expected an object with keys of its own")
    return value or {}


def _listed(file: Path, source: Mapping[str, Any], key: str) -> list[Any]:
    value = source.get(key)
    if not isinstance(value, list | None):
        raise ValueError(f"{file}: {key} is {value!r}; expected a list")
    return value or []


def eos_token_ids(file: Path, settings: Mapping[str, Any]) -> list[int]:
    """What `eos_token_id` of a `config.json` or `generation_config.json` names: an id, several or none.

    Raises:
      ValueError: anything else; names the file.
    """
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id_ in ids:
        if isinstance(id_, bool) or not isinstance(id_, int):
            raise ValueError(
                f"{file}: eos_token_id is {value!r}; expected a token id, a list of them, or null"
            )
    return ids


def _rope_scaling(file: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    # "type" is what transformers called it before 4.43.
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{file}: rope type {kind!r} is not supported; only default and llama3")
    scaling = RopeScaling(
        factor=_number(file, rope, "factor"),
        low_freq_factor=_number(file, rope, "low_freq_factor"),
        high_freq_factor=_number(file, rope, "high_freq_factor"),
        original_max_position=int(_number(file, rope, "original_max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"{file}: high_freq_factor {scaling.high_freq_factor} must exceed low_freq_factor "
            f"{scaling.low_freq_factor}"
        )
    return scaling
