"""Sizes of a model without its weights: of a folder, of models that we know, or from the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import FILE, read_config
from jaxreset.models.policy import HUB_NAME
from jaxreset.models.rotary import RopeScaling

QWEN = 1e6  # rope_theta
LLAMA_VOCAB, LLAMA = 128_256, 5e5

# Vocabulary, layers, width, heads, key-value heads, head width, hidden units, tied embeddings.
_QWEN25 = {
    "0.5B": (151_936, 24, 896, 14, 2, 64, 4_864, True),
    "1.5B": (151_936, 28, 1_536, 12, 2, 128, 8_960, True),
    "3B": (151_936, 36, 2_048, 16, 2, 128, 11_008, True),
    "7B": (152_064, 28, 3_584, 28, 4, 128, 18_944, False),
    "14B": (152_064, 48, 5_120, 40, 8, 128, 13_824, False),
    "32B": (152_064, 64, 5_120, 40, 8, 128, 27_648, False),
}
_QWEN3 = {
    "0.6B": (151_936, 28, 1_024, 16, 8, 128, 3_072, True),
    "1.7B": (151_936, 28, 2_048, 16, 8, 128, 6_144, True),
    "4B": (151_936, 36, 2_560, 32, 8, 128, 9_728, True),
    "8B": (151_936, 36, 4_096, 32, 8, 128, 12_288, False),
    "14B": (151_936, 40, 5_120, 40, 8, 128, 17_408, False),
    "32B": (151_936, 64, 5_120, 64, 8, 128, 25_600, False),
}
_LLAMA3 = {
    "3.1-8B": (LLAMA_VOCAB, 32, 4_096, 32, 8, 128, 14_336, False),
    "3.2-1B": (LLAMA_VOCAB, 16, 2_048, 32, 8, 64, 8_192, True),
    "3.2-3B": (LLAMA_VOCAB, 28, 3_072, 24, 8, 128, 8_192, True),
}


def model_sizes(path_or_name: str, *, dtype: str) -> DecoderConfig:
    """Sizes and switches of a model; its weights need not be anywhere.

    Args:
      path_or_name: a folder with a `config.json`, or a name on the Hugging Face Hub. Of the models in the
        tables above nothing is asked; of others, the Hub for their `config.json`.
      dtype: of the parameters.

    Raises:
      FileNotFoundError: no such folder, and the Hub did not give it.
      ValueError: a model that we don't compute.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return read_config(folder, dtype=dtype)
    if (known := known_sizes(path_or_name, dtype=dtype)) is not None:
        return known
    if not HUB_NAME.fullmatch(path_or_name):
        raise FileNotFoundError(f"model {path_or_name!r}: no such folder")
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(path_or_name, FILE)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model {path_or_name!r}: no such folder, and the Hugging Face Hub did not give its "
            f"{FILE}: {error}"
        ) from error
    return read_config(Path(file).parent, dtype=dtype)


def known_sizes(name: str, *, dtype: str) -> DecoderConfig | None:
    """Sizes of a model that we know by its name on the Hub; None of another."""
    owner, _, model = name.partition("/")
    model = model.removesuffix("-Instruct")
    if owner == "Qwen" and (sizes := _QWEN25.get(model.removeprefix("Qwen2.5-"))):
        config = DecoderConfig(*sizes[:7], rope_theta=QWEN, qkv_bias=True, dtype=dtype)
    elif owner == "Qwen" and (
        sizes := _QWEN3.get(model.removeprefix("Qwen3-").removesuffix("-Base"))
    ):
        config = DecoderConfig(*sizes[:7], rope_theta=QWEN, qk_norm=True, dtype=dtype)
    elif owner == "meta-llama" and (sizes := _LLAMA3.get(model.removeprefix("Llama-"))):
        scaling = RopeScaling(8.0 if model == "Llama-3.1-8B" else 32.0, 1.0, 4.0, 8192)
        config = DecoderConfig(*sizes[:7], rope_theta=LLAMA, rope_scaling=scaling, dtype=dtype)
    else:
        return None
    return dataclasses.replace(config, tie_embeddings=sizes[7])
