"""A run's folder, opened to look at: its config, its history, its reset trees, its policies."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from jaxreset.config import Config
from jaxreset.config_file import parse_config, saved_values
from jaxreset.errors import ConfigError
from jaxreset.json_text import loads
from jaxreset.models.policy import Policy
from jaxreset.planning.shapes import choose_mesh
from jaxreset.run.checkpoints import saved_steps
from jaxreset.run.finished import started_from, trained_to
from jaxreset.run.folder import RunFolder, read_metrics
from jaxreset.run.parts import starting_policy


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
        files = (self.path / "rollouts").glob("step_*.jsonl")
        return sorted(int(file.stem.removeprefix("step_")) for file in files)

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
        """The policy after a step that has a checkpoint; None: the latest.

        Raises:
          ConfigError: there is no such checkpoint.
          RunError: it is damaged.
        """
        known = self.steps
        step = known[-1] if step is None and known else step
        if step not in known:
            raise ConfigError(f"{self.path}: no checkpoint of step {step}; there are {known}")
        mesh = choose_mesh(self.config)
        spread = mesh if mesh.size > 1 else None
        folder = RunFolder(self.config)
        start = started_from(folder, starting_policy(self.config, spread), spread)
        return trained_to(folder, start, step=step)[1]


def open_run(path: str | Path) -> OpenRun:
    """Opens a run's folder to look at; see `OpenRun`."""
    return OpenRun(path)
