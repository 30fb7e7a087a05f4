"""TensorBoard and Weights & Biases, as options. A tracker that fails is dropped; the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from jaxreset.config import Config
from jaxreset.json_text import dumps, loads
from jaxreset.parallel.processes import is_leader

Record = dict[str, Any]

logger = logging.getLogger(__name__)


class Trackers:
    """Sends metrics to the trackers that the config asks for, from one process.

    A run that goes on is the same run there. The steps that it does again come out as they did: TensorBoard
    is told to hide what it has of them, and to W&B, which takes nothing back, they aren't sent again.

    Args:
      config: its `run.tensorboard` and `run.wandb_project` say which.
      folder: the run folder.
      history: metrics that were sent before, where the run goes on.
      anew: what the folder holds of another start isn't gone on with.
    """

    def __init__(
        self, config: Config, folder: Path, history: Sequence[Record] = (), *, anew: bool = False
    ):
        self._sinks: dict[str, tuple[Callable[[Record], None], Callable[[], None]]] = {}
        self._sent = {line["step"]: line.keys() - {"step"} for line in history}
        self._done: int | None = None
        if not is_leader():
            return
        if config.run.tensorboard:
            self._try("run.tensorboard", lambda: self._open_tensorboard(folder / "tensorboard"))
        if config.run.wandb_project:
            file = folder / "wandb_run.json"
            if anew:
                file.unlink(missing_ok=True)
            self._try("run.wandb_project", lambda: self._open_wandb(config, folder, file))

    def go_on(self, step: int) -> None:
        """Before the first `log`: the step after which the run goes on; -1: it starts."""
        self._done = step

    def log(self, record: Record) -> None:
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

    def _open_tensorboard(self, events: Path) -> None:
        from tensorboardX import SummaryWriter

        writers: list[Any] = []  # made at the first step, when it is known where the run goes on

        def send(record: Record) -> None:
            done = -1 if self._done is None else self._done
            if not writers:
                again = done >= 0 or (self._done == -1 and events.exists())
                writers.append(SummaryWriter(str(events), purge_step=done + 1 if again else None))
            step = record["step"]
            known = self._sent.get(step, set()) if step <= done else set()
            for name in record.keys() - known - {"step"}:
                writers[0].add_scalar(name, record[name], step)

        def close() -> None:
            for writer in writers:
                writer.close()

        self._sinks["run.tensorboard"] = send, close

    def _open_wandb(self, config: Config, folder: Path, file: Path) -> None:
        import wandb

        def start(name: str) -> Any:
            return wandb.init(
                project=config.run.wandb_project,
                id=name,
                resume="allow",  # goes on with the run of that id, or makes one
                allow_val_change=True,  # such as of train.steps
                name=folder.name,
                dir=str(folder),
                config=config.model_dump(mode="json"),
            )

        run, sent, before = None, self._sent, _read(file)
        if before.get("project") == config.run.wandb_project and "id" in before:
            try:
                run = start(str(before["id"]))
            # Whatever it is, such as that the run was deleted, whose id isn't given again.
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                logger.warning("W&B run %s can't go on (%s); a new one does", before["id"], what)
        if run is None:
            name, sent = uuid4().hex[:12], {}
            run = start(name)
            file.write_text(dumps({"project": config.run.wandb_project, "id": name}) + "\n")
        first = getattr(run, "step", None)  # the next that it takes; lower ones it drops
        if not isinstance(first, int):
            first = None
        least = first or 0

        def send(record: Record) -> None:
            nonlocal least
            step = record["step"]
            known = sent.get(step, set()) if first is None or step < first else set()
            new = {key: value for key, value in record.items() if key not in known}
            if new.keys() == {"step"} or (step < least and not known):
                return
            least = max(least, step)  # an evaluation made up for stands with the next step
            run.log(new, step=least)

        self._sinks["run.wandb_project"] = send, run.finish


def _read(file: Path) -> Record:
    """A JSON file; nothing where there is none, or it is damaged."""
    try:
        value = loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
