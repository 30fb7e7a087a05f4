"""A run's folder, opened to look at: its config, its history, its reset trees, its policies."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxreset.config import Config
from jaxreset.config_file import parse_config, saved_values
from jaxreset.errors import ConfigError
from jaxreset.json_text import loads
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.planning.shapes import choose_mesh
from jaxreset.run.checkpoints import Checkpoints, saved_steps
from jaxreset.run.folder import RunFolder, read_metrics
from jaxreset.run.parts import adapted, starting_policy
from jaxreset.run.saved_arrays import abstract, load_params


class OpenRun:
    """What a run has written so far; it may be running still. Nothing is changed.

    Args:
      path: of the run's folder.

    Attributes:
      path: absolute.

    Raises:
      ConfigError: no run is there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(f"{self.path}: no run is there; expected a folder with config.yaml")

    @cached_property
    def config(self) -> Config:
        """Resolved, as the run has it.

        Raises:
          ConfigError: it isn't a run's, or names what can't be imported here.
        """
        values = saved_values(self.path / "config.yaml")
        values["run"]["dir"] = str(self.path)
        return parse_config(values)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics, one object a step."""
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def steps(self) -> list[int]:
        """Steps whose checkpoints are there."""
        return saved_steps(self.path / "checkpoints")

    @property
    def tree_steps(self) -> list[int]:
        """Steps whose reset trees are there."""
        names = (file.stem for file in (self.path / "rollouts").glob("step_*.jsonl"))
        return sorted(int(re.sub(r"\D", "", name)) for name in names)

    def trees(self, step: int | None = None) -> list[dict[str, Any]]:
        """The reset trees of a step, one a prompt; None: of the latest.

        Raises:
          ConfigError: they aren't there.
        """
        known = self.tree_steps
        step = known[-1] if step is None and known else step
        if step not in known:
            raise ConfigError(f"{self.path}: no rollouts of step {step}; there are {known}")
        file = self.path / "rollouts" / f"step_{step:06d}.jsonl"
        return [loads(line) for line in file.read_text().splitlines()]

    def policy(self, step: int | None = None) -> Policy:
        """The policy after a step that has a checkpoint; None: the latest; 0 is the start.

        Raises:
          ConfigError: there is no such checkpoint.
          RunError: it is damaged.
        """
        known = self.steps
        step = known[-1] if step is None and known else step
        if step not in known:
            raise ConfigError(f"{self.path}: no checkpoint of step {step}; there are {known}")
        config = self.config
        mesh = choose_mesh(config)
        spread = mesh if mesh.size > 1 else None
        policy = starting_policy(config, spread)
        folder = RunFolder(config)
        if folder.start.is_dir():
            policy = policy.with_params(load_params(folder.start, policy.params), 0)
        policy = adapted(config, policy, spread)
        start, frozen = trained(policy.params)
        like = abstract(start, wide=True)
        for leaf in jax.tree.leaves(start):
            leaf.delete()  # there may not be room for both
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        params, progress = checkpoints.restore_params(like, step=step)
        return policy.with_params(nnx.merge_state(params, frozen), progress.version)


def open_run(path: str | Path) -> OpenRun:
    """Opens a run's folder to look at; see `OpenRun`."""
    return OpenRun(path)
