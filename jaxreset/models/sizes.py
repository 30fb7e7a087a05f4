"""Sizes of a model without its weights: of a folder, of models that we know, or from the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import FILE, read_config
from jaxreset.models.families import named, names
from jaxreset.models.policy import HUB_NAME


def model_sizes(path_or_name: str, *, dtype: str) -> DecoderConfig:
    """Sizes and switches of a model; its weights need not be anywhere.

    Args:
      path_or_name: a folder with a `config.json`, or a name on the Hugging Face Hub. Of the models that
        `families` know nothing is asked; of others, the Hub for their `config.json`.
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
    for family in map(named, names()):
        if (config := family.SIZES.get(name)) is not None:
            return dataclasses.replace(config, dtype=dtype)
    return None
