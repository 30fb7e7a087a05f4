"""Checkpoints through Orbax: the train state, and the few numbers that a run must remember."""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxreset.config import Checkpoint
from jaxreset.disk import room
from jaxreset.errors import RunError
from jaxreset.json_text import dumps, loads
from jaxreset.learning.update import TrainState, filled
from jaxreset.models.precision import widened
from jaxreset.parallel.processes import fetch, gather, is_leader, wait_for_all
from jaxreset.run.checksums import checksum

logger = logging.getLogger(__name__)

ACCURACY = "eval/accuracy"  # what the best checkpoints are kept by
PARAMS = {"step": 0}  # stands where a checkpoint has its progress
WRITTEN_AT_ONCE = 2**27  # bytes; more are not compressed before others are on the disk


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


def saved_steps(path: Path) -> list[int]:
    """Steps of the checkpoints in the folder `path`, the oldest first; damaged ones among them."""
    if not path.is_dir():
        return []
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


class Checkpoints:
    """Saves `(TrainState, Progress)` by step, in the background; restores the newest that is whole.

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
        self, state: TrainState, progress: Progress, metrics: dict[str, Any] | None = None
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
        self._needed = sum(map(_bytes, jax.tree.leaves(state)))
        try:
            saving = self._opened().save_checkpointables_async(
                progress.step,
                _with_sums(state, progress._asdict()),
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

    def restore(self, like: TrainState, *, set_aside: bool = False) -> tuple[TrainState, Progress]:
        """The newest checkpoint that is whole; newer ones are named in a warning.

        Args:
          like: arrays, or `abstract` ones, whose layout it gets. Another one than it was saved with, on
            more or fewer devices or processes, is as good.
          set_aside: rename the damaged ones, so that their steps can be saved anew.

        Raises:
          FileNotFoundError: there is none.
          RunError: all are damaged.
        """
        return self._newest(like, whole=True, set_aside=set_aside)

    def restore_params(self, like: nnx.State) -> tuple[nnx.State, Progress]:
        """The trained parameters alone of what `restore` gives; the rest is looked at for damage, and at
        no time is more of it there than the largest parameter takes.

        Args:
          like: trained parameters, or `abstract` ones, in the dtype that they are trained in.
        """
        state, progress = self._newest(
            TrainState(like, nnx.State({}), nnx.State({})), whole=False, set_aside=False
        )
        return state.params, progress

    def _newest(
        self, like: TrainState, *, whole: bool, set_aside: bool
    ) -> tuple[TrainState, Progress]:
        damaged = {}
        for step in reversed(saved_steps(self.path)):
            loaded, reason = _load(self.path / str(step), like, Progress()._asdict(), whole=whole)
            if reason is not None:
                damaged[step] = reason
                continue
            if damaged and is_leader():
                logger.warning("%s; going back to step %d", self._tell(damaged), step)
            if set_aside:
                self._set_aside(list(damaged))
            self._last = step
            return _unnamed(loaded["state"], like), Progress(**loaded["progress"])
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
                context=_context(),
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
            f"the checkpoint of step {step} can't be written to {self.path}: {_reason(error)} ({known}). "
            "Make room there, and start the same command again"
        )


def _context() -> ocp.Context:
    """Orbax's settings for writing: by default all arrays are held in memory once more, compressed."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = WRITTEN_AT_ONCE
    return context


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
        with _alone():
            ocp.checkpointables_metadata(path / str(step))
        if metrics.exists():
            float(loads(metrics.read_bytes())[ACCURACY])
    except Exception as error:
        return _reason(error)
    return None


def _alone(*, partial: bool = False) -> ocp.Context:
    """Reads in each process by itself: one that fails doesn't keep the others waiting for it.

    `partial`: only those arrays that are named.
    """
    context, index = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = index
    context.multiprocessing.active_processes = {index}
    context.pytree_options.loading.partial_load = partial
    return context


def _reason(error: BaseException) -> str:
    """What was the matter in the first place, without the settings that TensorStore repeats."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        return _reason(cause)
    first_line = str(error).partition("\n")[0].partition(" [")[0]
    return f"{type(error).__name__}: {first_line}"


def _with_sums(state: Any, record: dict[str, Any]) -> dict[str, Any]:
    """What is saved: arrays, the record beside them, and checksums that tell of damage."""
    named = _named(state)
    return {"state": named, "progress": record, "checksums": _sums(named, record)}


def _sums(state: dict[str, Any], record: dict[str, Any]) -> np.ndarray:
    """Checksums of the arrays in their names' order, and of the record: uint32 `[arrays + 1]`."""
    return np.append([_sum(state[name]) for name in sorted(state)], _sum_of(record))


def _sum(array: jax.Array) -> np.uint32:
    """One at a time: those of one shape share a program, and a CPU holds the scrambled bits of an array."""
    return np.uint32(fetch(checksum(array)))


def _sum_of(record: dict[str, Any]) -> np.uint32:
    return np.uint32(zlib.crc32(dumps(record, sort_keys=True).encode()))


def _load(
    path: Path, like: Any, record: dict[str, Any], *, whole: bool = True
) -> tuple[dict[str, Any], str | None]:
    """What was saved in `path`, laid out as `like` and `record` are; or what is wrong with it.

    `whole`: `like` names all arrays that were saved; else some of them, and the others are only looked at,
    a few at a time.
    """
    targets = _named(abstract(like))
    others, reason = ({}, None) if whole else _others(path, targets)
    names = sorted({**targets, **others})
    loaded: dict[str, Any] = {}
    for part in [*_portions(others, max(map(_bytes, targets.values()))), targets]:
        if (reason := _first(reason)) is not None:  # one process may read what another can't
            return {}, reason
        loaded = {}  # gone before the next ones come
        try:
            with _alone(partial=not whole):
                sums = np.zeros(len(names) + 1, np.uint32)
                wanted = {"state": part, "progress": record, "checksums": sums}
                loaded = ocp.load_checkpointables(path, wanted)
        except Exception as error:  # anything may be raised by bytes that are anything
            reason = _reason(error)
        reason = _first(reason) or _differing(loaded, names)
    return (loaded, None) if (reason := _first(reason)) is None else ({}, reason)


def _others(path: Path, targets: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The other arrays that were saved, each to lie as the target does whose name it ends in; or what
    is wrong."""
    try:
        with _alone():
            shapes = ocp.checkpointables_metadata(path).metadata["state"]
        if missing := sorted(targets.keys() - shapes.keys()):
            raise ValueError(f"no array {missing[0]}")
    except Exception as error:
        return {}, _reason(error)
    shardings = {name.partition(".")[2]: x.sharding for name, x in targets.items()}
    apart = next(iter(shardings.values()))
    if isinstance(apart, jax.sharding.NamedSharding):
        apart = jax.sharding.NamedSharding(apart.mesh, jax.sharding.PartitionSpec())

    def place(name: str) -> jax.sharding.Sharding:
        return next((s for end, s in shardings.items() if name.endswith(f".{end}")), apart)

    others = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(name))
        for name, x in shapes.items()
        if name not in targets
    }
    return others, None


def _portions(targets: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """The targets in portions of at most so many bytes, or of one."""
    portions: list[dict[str, Any]] = []
    room = -1
    for name, x in targets.items():
        if _bytes(x) > room:
            portions.append({})
            room = limit
        portions[-1][name] = x
        room -= _bytes(x)
    return portions


def _bytes(x: Any) -> int:
    return int(x.size) * int(x.dtype.itemsize)


def _differing(loaded: dict[str, Any], names: Sequence[str]) -> str | None:
    """What isn't as it was saved; `names`: of all arrays that were."""
    state, record = loaded["state"], loaded["progress"]
    saved = dict(zip([*names, "progress"], np.asarray(loaded["checksums"]), strict=True))
    found = {name: _sum(state[name]) for name in sorted(state)}
    found["progress"] = _sum_of(record)
    differ = [name for name, value in found.items() if value != saved[name]]
    return f"other bits than were saved: {', '.join(differ[:3])}" if differ else None


def _first(reason: str | None) -> str | None:
    """The first reason that any process has."""
    return next((r for r in gather([reason]) if r is not None), None)


def save_params(path: Path, params: Any) -> None:
    """Saves parameters once, in place of what a killed run left there.

    Raises:
      RunError: they can't be written.
    """
    try:
        with _context():
            ocp.save_checkpointables(path, _with_sums(params, PARAMS), overwrite=True)
    except Exception as error:  # Orbax's, of any kind
        needed = sum(map(_bytes, jax.tree.leaves(params)))
        raise RunError(
            f"parameters can't be written to {path}: {_reason(error)} ({room(path, needed)}). Make room "
            "there, and start the same command again"
        ) from error


def load_params(path: Path, like: Any) -> Any:
    """What `save_params` saved, laid out as `like` is.

    Raises:
      RunError: it is damaged.
    """
    loaded, reason = _load(path, like, PARAMS)
    if reason is not None:
        raise RunError(
            f"the parameters in {path} are damaged ({reason}), and the run can't go on without them: "
            "bring them back from a backup, or start anew with another run.dir"
        )
    return _unnamed(loaded["state"], like)


def abstract(tree: Any, *, wide: bool = False) -> Any:
    """Shapes, dtypes and shardings of the arrays; `wide`: the dtypes that they are trained in."""
    shapes = jax.eval_shape(widened, tree) if wide else tree
    return jax.tree.map(
        lambda shape, x: jax.ShapeDtypeStruct(x.shape, shape.dtype, sharding=x.sharding),
        shapes,
        tree,
    )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that a checkpoint can be read without our classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unnamed(named: dict[str, Any], like: Any) -> Any:
    """The other way round."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in _named(like)])
