"""jaxreset: post-train language models on multi-step reasoning by resets, in JAX.

    import jaxreset
    policy = jaxreset.load_policy("Qwen/Qwen2.5-0.5B-Instruct")
    experiment = jaxreset.Experiment(jaxreset.load_config("configs/quickstart.yaml"))
    run = jaxreset.open_run("runs/quickstart")

`jaxreset.losses` and `jaxreset.steps` can be used alone: importing them loads nothing else of ours.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxreset.config_file import load_config
    from jaxreset.groups import Group
    from jaxreset.models.policy import Policy, load_policy
    from jaxreset.resets.objectives import Objective
    from jaxreset.resets.rules import Failure
    from jaxreset.run.experiment import Experiment
    from jaxreset.run.loop import train
    from jaxreset.run.opened import open_run
    from jaxreset.sampling.rounds import StopRules, Stream
    from jaxreset.sampling.sampler import Sampler
    from jaxreset.sampling.values import step_values
    from jaxreset.tasks.base import Problem, Scores, Task

_HOMES = {
    "Experiment": "jaxreset.run.experiment",
    "Failure": "jaxreset.resets.rules",
    "Group": "jaxreset.groups",
    "Objective": "jaxreset.resets.objectives",
    "Policy": "jaxreset.models.policy",
    "Problem": "jaxreset.tasks.base",
    "Sampler": "jaxreset.sampling.sampler",
    "Scores": "jaxreset.tasks.base",
    "StopRules": "jaxreset.sampling.rounds",
    "Stream": "jaxreset.sampling.rounds",
    "Task": "jaxreset.tasks.base",
    "load_config": "jaxreset.config_file",
    "load_policy": "jaxreset.models.policy",
    "open_run": "jaxreset.run.opened",
    "step_values": "jaxreset.sampling.values",
    "train": "jaxreset.run.loop",
}
__all__ = [
    "Experiment",
    "Failure",
    "Group",
    "Objective",
    "Policy",
    "Problem",
    "Sampler",
    "Scores",
    "StopRules",
    "Stream",
    "Task",
    "load_config",
    "load_policy",
    "open_run",
    "step_values",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a name's module when it is first asked for, so that `jaxreset.losses` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreset' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
