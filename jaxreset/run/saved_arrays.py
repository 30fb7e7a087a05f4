"""Arrays on the disk, with checksums that tell of damage: what checkpoints are made of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxreset.disk import WRITTEN_AT_ONCE, room
from jaxreset.errors import RunError
from jaxreset.json_text import dumps
from jaxreset.models.precision import widened
from jaxreset.parallel.processes import fetch, gather
from jaxreset.run.checksums import checksum

PARAMS = {"step": 0}  # stands where a checkpoint has its progress


def writing_context() -> ocp.Context:
    """Orbax's settings for writing: by default all arrays are held in memory once more, compressed."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = WRITTEN_AT_ONCE
    return context


def reading_alone(*, partial: bool = False) -> ocp.Context:
    """Reads in each process by itself: one that fails doesn't keep the others waiting for it.

    `partial`: only those arrays that are named.
    """
    context, index = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = index
    context.multiprocessing.active_processes = {index}
    context.pytree_options.loading.partial_load = partial
    return context


def reason_of(error: BaseException) -> str:
    """What was the matter in the first place, without the settings that TensorStore repeats."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        return reason_of(cause)
    first_line = str(error).partition("\n")[0].partition(" [")[0]
    return f"{type(error).__name__}: {first_line}"


def with_sums(state: Any, record: dict[str, Any]) -> dict[str, Any]:
    """What is saved: arrays, the record beside them, and checksums that tell of damage."""
    by_name = named(state)
    return {"state": by_name, "progress": record, "checksums": _sums(by_name, record)}


def _sums(state: dict[str, Any], record: dict[str, Any]) -> np.ndarray:
    """Checksums of the arrays in their names' order, and of the record: uint32 `[arrays + 1]`."""
    return np.append([_sum(state[name]) for name in sorted(state)], _sum_of(record))


def _sum(array: jax.Array) -> np.uint32:
    """One at a time: those of one shape share a program, and a CPU holds the scrambled bits of an array."""
    return np.uint32(fetch(checksum(array)))


def _sum_of(record: dict[str, Any]) -> np.uint32:
    return np.uint32(zlib.crc32(dumps(record, sort_keys=True).encode()))


def load_saved(
    path: Path, like: Any, record: dict[str, Any], *, whole: bool = True
) -> tuple[dict[str, Any], str | None]:
    """What was saved in `path`, laid out as `like` and `record` are; or what is wrong with it.

    `whole`: `like` names all arrays that were saved; else some of them, and the others are only looked at,
    a few at a time.
    """
    targets = named(abstract(like))
    others, reason = ({}, None) if whole else _others(path, targets)
    names = sorted({**targets, **others})
    loaded: dict[str, Any] = {}
    for part in [*_portions(others, max(map(bytes_of_array, targets.values()))), targets]:
        if (reason := _first(reason)) is not None:  # one process may read what another can't
            return {}, reason
        loaded = {}  # gone before the next ones come
        try:
            with reading_alone(partial=not whole):
                sums = np.zeros(len(names) + 1, np.uint32)
                wanted = {"state": part, "progress": record, "checksums": sums}
                loaded = ocp.load_checkpointables(path, wanted)
        except Exception as error:  # anything may be raised by bytes that are anything
            reason = reason_of(error)
        reason = _first(reason) or _differing(loaded, names)
    return (loaded, None) if (reason := _first(reason)) is None else ({}, reason)


def other_shape(path: Path, like: Any) -> str | None:
    """An array that was saved in another shape than `like` has it; None: there is none, or no telling."""
    try:
        with reading_alone():
            saved = ocp.checkpointables_metadata(path).metadata["state"]
        pairs = [(name, saved[name].shape, x.shape) for name, x in named(like).items()]
    except Exception:  # it is damaged, and said to be by those who load it
        pairs = []
    differ = (
        f"{name} is {there} there, {here} here" for name, there, here in pairs if there != here
    )
    return _first(next(differ, None))


def _others(path: Path, targets: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The other arrays that were saved, each to lie as the target does whose name it ends in; or what
    is wrong."""
    try:
        with reading_alone():
            shapes = ocp.checkpointables_metadata(path).metadata["state"]
        if missing := sorted(targets.keys() - shapes.keys()):
            raise ValueError(f"no array {missing[0]}")
    except Exception as error:
        return {}, reason_of(error)
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
        if bytes_of_array(x) > room:
            portions.append({})
            room = limit
        portions[-1][name] = x
        room -= bytes_of_array(x)
    return portions


def bytes_of_array(x: Any) -> int:
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
        with writing_context():
            ocp.save_checkpointables(path, with_sums(params, PARAMS), overwrite=True)
    except Exception as error:  # Orbax's, of any kind
        needed = sum(map(bytes_of_array, jax.tree.leaves(params)))
        raise RunError(
            f"parameters can't be written to {path}: {reason_of(error)} ({room(path, needed)}). Make room "
            "there, and start the same command again"
        ) from error


def load_params(path: Path, like: Any) -> Any:
    """What `save_params` saved, laid out as `like` is.

    Raises:
      RunError: it is damaged.
    """
    loaded, reason = load_saved(path, like, PARAMS)
    if reason is not None:
        raise RunError(
            f"the parameters in {path} are damaged ({reason}), and the run can't go on without them: "
            "bring them back from a backup, or start anew with another run.dir"
        )
    return unnamed(loaded["state"], like)


def abstract(tree: Any, *, wide: bool = False) -> Any:
    """Shapes, dtypes and shardings of the arrays; `wide`: the dtypes that they are trained in."""
    shapes = jax.eval_shape(widened, tree) if wide else tree
    return jax.tree.map(
        lambda shape, x: jax.ShapeDtypeStruct(x.shape, shape.dtype, sharding=x.sharding),
        shapes,
        tree,
    )


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that a checkpoint can be read without our classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unnamed(by_name: dict[str, Any], like: Any) -> Any:
    """The other way round."""
    return jax.tree.unflatten(jax.tree.structure(like), [by_name[name] for name in named(like)])
