"""TensorBoard and Weights & Biases, as options. A tracker that fails is dropped; the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxreset.config import Config
from jaxreset.parallel.processes import is_leader

logger = logging.getLogger(__name__)


class Trackers:
    """Sends metrics to the trackers that the config asks for, from one process.

    Args:
      config: its `run.tensorboard` and `run.wandb_project` say which.
      folder: the run folder.
    """

    def __init__(self, config: Config, folder: Path):
        self._sinks: dict[str, tuple[Callable[[dict[str, Any]], None], Callable[[], None]]] = {}
        if not is_leader():
            return
        if config.run.tensorboard:
            self._try("run.tensorboard", lambda: self._open_tensorboard(folder))
        if config.run.wandb_project:
            self._try("run.wandb_project", lambda: self._open_wandb(config, folder))

    def log(self, record: dict[str, Any]) -> None:
        """Sends one step's metrics."""
        for name, (send, _) in list(self._sinks.items()):
            self._try(name, lambda send=send: send(record))  # type: ignore[misc]

    def close(self) -> None:
        """Flushes and closes all."""
        for name, (_, end) in list(self._sinks.items()):
            self._try(name, end)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        # A tracker may raise anything, and none of it is worth a training run.
        except Exception as error:
            logger.warning("%s is switched off: %s: %s", name, type(error).__name__, error)
            self._sinks.pop(name, None)

    def _open_tensorboard(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def send(record: dict[str, Any]) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, record["step"])

        self._sinks["run.tensorboard"] = send, writer.close

    def _open_wandb(self, config: Config, folder: Path) -> None:
        import wandb

        run = wandb.init(
            project=config.run.wandb_project,
            name=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        self._sinks["run.wandb_project"] = (lambda r: run.log(r, step=r["step"])), run.finish
