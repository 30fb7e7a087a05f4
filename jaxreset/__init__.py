"""jaxreset: post-train language models on multi-step reasoning by resets, in JAX.

    import jaxreset
    policy = jaxreset.load_policy("Qwen/Qwen2.5-0.5B-Instruct")

`jaxreset.losses` and `jaxreset.steps` can be used alone: importing them loads nothing else of ours.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxreset.config_file import load_config
    from jaxreset.models.policy import Policy, load_policy
    from jaxreset.run.loop import train
    from jaxreset.sampling import Sampler, StopRules, Stream

_HOMES = {
    "Policy": "jaxreset.models.policy",
    "Sampler": "jaxreset.sampling",
    "StopRules": "jaxreset.sampling",
    "Stream": "jaxreset.sampling",
    "load_config": "jaxreset.config_file",
    "load_policy": "jaxreset.models.policy",
    "train": "jaxreset.run.loop",
}
__all__ = [
    "Policy",
    "Sampler",
    "StopRules",
    "Stream",
    "load_config",
    "load_policy",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a name's module when it is first asked for, so that `jaxreset.losses` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreset' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
