"""What is particular to a family of models: one module a `model_type` of `config.json`.

To add a family, add a file here, named as its `model_type`, that defines what `Family` lists. Nothing else
names it: folders, exports, plans and sizes find it by that name. What it computes must be in `block`: a
new switch there is off for all other families.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from jaxreset.models.block import SWITCHES, DecoderConfig
from jaxreset.models.config_keys import Keys


class Family(Protocol):
    """What a module defines.

    Attributes:
      ARCHITECTURE: name of its class in `transformers`.
      SWITCHES: of `block.SWITCHES` those that are on.
      TENSORS: parameters of a block whose tensors are not named as in `huggingface.TENSORS`, and their
        names there; mostly empty.
      SIZES: of models that we know by their names on the Hub, in float32.
    """

    ARCHITECTURE: str
    SWITCHES: frozenset[str]
    TENSORS: Mapping[str, str]
    SIZES: Mapping[str, DecoderConfig]

    def read(self, keys: Keys) -> dict[str, Any]:
        """Fields of `DecoderConfig` from `config.json`, as transformers 4 or 5 wrote it.

        At least `rope_theta` and `rope_scaling`; it goes before what `config_json` reads for all.

        Raises:
          ValueError: a value that we don't compute; names file and key.
        """

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of `config.json` that `read` reads, and `max_position_embeddings`.

        Raises:
          ValueError: the family has no such model; says why.
        """


def names() -> list[str]:
    """Every `model_type` that there is a module of."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def named(model_type: str) -> Family:
    """The module of a `model_type` among `names()`."""
    return cast(Family, importlib.import_module(f"{__name__}.{model_type}"))


def family_of(config: DecoderConfig) -> str:
    """The family of a config: what it names, else the first one that has its switches.

    Raises:
      ValueError: none has them, or the one that it names has others.
    """
    on = [switch for switch in SWITCHES if getattr(config, switch)]
    candidates = names() if config.family is None else [config.family]
    for name in candidates:
        if set(on) == named(name).SWITCHES:
            return name
    has = " and ".join(on) or "no switch"
    raise ValueError(f"no family among {', '.join(candidates)} sets {has} and nothing else")
