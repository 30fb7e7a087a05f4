"""Checkpoints through Orbax: the train state, and the few numbers that a run must remember."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxreset.config import Checkpoint
from jaxreset.disk import room
from jaxreset.errors import RunError
from jaxreset.json_text import loads
from jaxreset.learning.learner import TrainProgress
from jaxreset.learning.update import TrainState, filled
from jaxreset.parallel.processes import is_leader, wait_for_all
from jaxreset.run.saved_arrays import (
    bytes_of_array,
    load_saved,
    other_shape,
    reading_alone,
    reason_of,
    unnamed,
    with_sums,
    writing_context,
)

logger = logging.getLogger(__name__)

ACCURACY = "eval/accuracy"  # what the best checkpoints are kept by


def saved_steps(path: Path) -> list[int]:
    """Steps of the checkpoints in the folder `path`, the oldest first; damaged ones among them."""
    if not path.is_dir():
        return []
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


class Checkpoints:
    """Saves `(TrainState, TrainProgress)` by step, in the background; restores the newest that is whole.

    With several processes, each calls every method.

    Args:
      path: holds a folder a step. Nothing there is touched before the first `save`.
      config: which are kept.
    """

    def __init__(self, path: Path, config: Checkpoint):
        self.path, self._config = path, config
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._saving: tuple[int, Any] | None = None  # a step, and Orbax's word on it
        self._last: int | None = None  # step saved or restored
        self._needed = 0  # bytes of a checkpoint, at most

    def any(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return bool(saved_steps(self.path))

    def save(
        self, state: TrainState, progress: TrainProgress, metrics: dict[str, Any] | None = None
    ) -> None:
        """Takes a copy off the devices and writes it in the background, unless this step was last.

        Args:
          state: may be donated as soon as this returns.
          progress: its `step` names the checkpoint.
          metrics: of the step; its accuracy, if there is one, decides on the best.

        Raises:
          RunError: this save can't begin, or the one before has failed.
        """
        self.wait()
        if progress.step == self._last:
            return
        state, accuracy = filled(state), (metrics or {}).get(ACCURACY)
        self._needed = sum(map(bytes_of_array, jax.tree.leaves(state)))
        try:
            saving = self._opened().save_checkpointables_async(
                progress.step,
                with_sums(state, progress._asdict()),
                force=True,
                metrics=None if accuracy is None else {ACCURACY: accuracy},
            )
        except Exception as error:  # Orbax's, of any kind
            raise self._failed(progress.step, error) from error
        self._saving, self._last = (progress.step, saving), progress.step

    def wait(self) -> None:
        """Returns when what is being written is complete.

        Raises:
          RunError: it could not be written.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Waits as `wait` does, and ends the background's threads."""
        self.wait()
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None

    def restore(
        self, like: TrainState, *, set_aside: bool = False
    ) -> tuple[TrainState, TrainProgress]:
        """The newest checkpoint that is whole; newer ones are named in a warning.

        Args:
          like: arrays, or `abstract` ones, whose layout it gets. Another one than it was saved with, on
            more or fewer devices or processes, is as good.
          set_aside: rename the damaged ones, so that their steps can be saved anew.

        Raises:
          FileNotFoundError: there is none.
          RunError: all are damaged, or the newest has other shapes.
        """
        return self._newest(like, whole=True, set_aside=set_aside)

    def restore_params(
        self, like: nnx.State, *, step: int | None = None
    ) -> tuple[nnx.State, TrainProgress]:
        """The trained parameters alone of what `restore` gives; the rest is looked at for damage, and at
        no time is more of it there than the largest parameter takes.

        Args:
          like: trained parameters, or `abstract` ones, in the dtype that they are trained in.
          step: of that checkpoint; None: the newest that is whole.
        """
        alone = TrainState(like, nnx.State({}), nnx.State({}))
        state, progress = self._newest(alone, whole=False, set_aside=False, only=step)
        return state.params, progress

    def _newest(
        self, like: TrainState, *, whole: bool, set_aside: bool, only: int | None = None
    ) -> tuple[TrainState, TrainProgress]:
        damaged = {}
        for step in reversed(saved_steps(self.path)) if only is None else [only]:
            loaded, reason = load_saved(
                self.path / str(step), like, TrainProgress()._asdict(), whole=whole
            )
            if reason is not None:
                if (other := other_shape(self.path / str(step), like)) is not None:
                    raise RunError(
                        f"checkpoint {self.path / str(step)} is of another policy, or of a version of "
                        f"jaxreset with another vocabulary ({other}): name another run.dir"
                    )
                damaged[step] = reason
                continue
            if damaged and is_leader():
                logger.warning("%s; going back to step %d", self._tell(damaged), step)
            if set_aside:
                self._set_aside(list(damaged))
            self._last = step
            return unnamed(loaded["state"], like), TrainProgress(**loaded["progress"])
        if not damaged:
            raise FileNotFoundError(f"no checkpoint in {self.path}")
        raise RunError(
            f"{self._tell(damaged)}. There is no other to go back to: bring one back from a backup, or "
            "start anew with another run.dir"
        )

    def _opened(self) -> ocp.training.Checkpointer:
        """Orbax's, which removes what a kill left half-written."""
        if self._checkpointer is None:
            unreadable = {s: r for s in saved_steps(self.path) if (r := _unreadable(self.path, s))}
            if unreadable and is_leader():
                logger.warning("%s; set aside", self._tell(unreadable))
            self._set_aside(list(unreadable))
            self._checkpointer = ocp.training.Checkpointer(
                self.path,
                context=writing_context(),
                preservation_policy=_kept(self._config),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints: they are neither found nor in the way, and nothing is lost."""
        if steps and is_leader():
            for step in steps:
                aside = self.path / f"{step}.damaged"
                if aside.exists():
                    shutil.rmtree(aside)
                os.rename(self.path / str(step), aside)
        wait_for_all("damaged checkpoints are set aside")

    def _tell(self, damaged: dict[int, str]) -> str:
        each = [f"checkpoint {self.path / str(s)} is damaged ({r})" for s, r in damaged.items()]
        return "; ".join(each)

    def _failed(self, step: int, error: Exception) -> RunError:
        self._checkpointer = None  # closing it would raise the same once more
        known = room(self.path, self._needed)  # before what is left of it makes room
        if is_leader():
            for left in self.path.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        return RunError(
            f"the checkpoint of step {step} can't be written to {self.path}: {reason_of(error)} ({known}). "
            "Make room there, and start the same command again"
        )


def _kept(config: Checkpoint) -> Any:
    """Which checkpoints stay."""
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_best:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[ACCURACY],
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    if config.keep_every_hours is not None:
        kept.append(policies.EveryNSeconds(round(3600 * config.keep_every_hours)))
    return policies.AnyPreservationPolicy(kept)


def _unreadable(path: Path, step: int) -> str | None:
    """Why Orbax's list of checkpoints, or the choice among them, would break at this one."""
    metrics = path / str(step) / "metrics" / "metrics"
    try:
        with reading_alone():
            ocp.checkpointables_metadata(path / str(step))
        if metrics.exists():
            float(loads(metrics.read_bytes())[ACCURACY])
    except Exception as error:
        return reason_of(error)
    return None
