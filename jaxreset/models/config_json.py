"""`config.json` of a Hugging Face folder, read into a `DecoderConfig` and written from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_keys import Keys
from jaxreset.models.families import family_of, named, names

FILE = "config.json"
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
    keys = Keys(file, read_json(file))
    family = _family(keys)
    keys.require(FIXED)
    width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    fields = {
        "vocab": keys.size("vocab_size"),
        "layers": keys.size("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": keys.size("num_key_value_heads", heads),
        "head_dim": keys.size("head_dim", width // heads),
        "mlp": keys.size("intermediate_size"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }
    module = named(family)
    switches = dict.fromkeys(module.SWITCHES, True)
    config = DecoderConfig(**fields | switches | module.read(keys), dtype=dtype, family=family)
    kinds = keys.listed("layer_types")
    if not config.windowed and any(kind != "full_attention" for kind in kinds):
        raise ValueError(
            f"{file}: layer_types holds more than 'full_attention', all that {family} has here"
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
    c, family = config, family_of(config)
    particular = named(family).write(config)
    return {
        "architectures": [named(family).ARCHITECTURE],
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
        # transformers 5 reads the first, 4 the second.
        "dtype": c.dtype,
        "torch_dtype": c.dtype,
        **particular,
    }


def _family(keys: Keys) -> str:
    """The family that a folder names.

    Raises:
      ValueError: there is no such module, or its class in `transformers` is another.
    """
    family, architectures = keys.values.get("model_type"), keys.listed("architectures")
    known = {name: named(name).ARCHITECTURE for name in names()}
    if not isinstance(family, str) or known.get(family) not in (architectures or known.values()):
        raise ValueError(
            f"{keys.file}: architectures {architectures}, model_type {family!r} is not supported; "
            f"expected one of {', '.join(known.values())}"
        )
    return family


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
