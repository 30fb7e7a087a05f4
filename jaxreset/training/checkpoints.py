"""Checkpoints through Orbax: the train state, and the few numbers that a run must remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxreset.training.update import TrainState


class Progress(NamedTuple):
    """What a run remembers beside its arrays.

    Attributes:
      step: training steps done.
      version: optimizer steps done.
      seed: every random number is named by it, the step and what it is for.
      data_position: prompts taken from the stream.
      signal_groups: groups with a gradient since the last optimizer step.
      normalizer: rollouts or tokens behind the gradients summed since then.
      nonfinite: gradients in a row that weren't finite.
    """

    step: int = 0
    version: int = 0
    seed: int = 0
    data_position: int = 0
    signal_groups: int = 0
    normalizer: float = 0.0
    nonfinite: int = 0


class Checkpoints:
    """Saves and restores `(TrainState, Progress)` by step; the latest `keep` are kept."""

    def __init__(self, path: Path, *, keep: int):
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            path, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves, and returns when the checkpoint is complete."""
        self._checkpointer.save_checkpointables(
            progress.step,
            {"state": _named(state), "progress": progress._asdict()},
            force=True,
        )

    def any(self) -> bool:
        """Whether there is a checkpoint to restore."""
        return self._checkpointer.latest is not None

    def restore(self, like: TrainState) -> tuple[TrainState, Progress]:
        """The latest checkpoint, laid out as `like` is.

        Raises:
          FileNotFoundError: there is none.
        """
        latest = self._checkpointer.latest
        if latest is None:
            raise FileNotFoundError("no checkpoint to restore")
        loaded = self._checkpointer.load_checkpointables(
            latest.step, {"state": _named(_abstract(like)), "progress": Progress()._asdict()}
        )
        leaves = [loaded["state"][name] for name in _named(like)]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return state, Progress(**loaded["progress"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def save_params(path: Path, params: Any) -> None:
    """Saves parameters once, in place of what a killed run left there."""
    ocp.save(path, _named(params), overwrite=True)


def load_params(path: Path, like: Any) -> Any:
    """What `save_params` saved, laid out as `like` is."""
    loaded = ocp.load(path, _named(_abstract(like)))
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in _named(like)])


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of the arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that a checkpoint can be read without our classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
