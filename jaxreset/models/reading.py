"""Tensors in safetensors files, read part by part, straight to the devices that hold the parts.

A tensor is mapped while a part of it is copied and unmapped before the next: pages of a mapped file
that were read count as the process's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from jaxreset.models.config_json import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "F64": np.float64}
COMPARED_BYTES = 64 << 20
CHECKED = 1 << 18  # numbers that stay in a core's cache

Index = tuple[slice, ...]


class Stored(NamedTuple):
    """A tensor of a safetensors file, of which only the header has been read.

    `dtype` is the header's name of it; `offset` is the tensor's first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Its rows `start` to `stop`, mapped: what isn't touched isn't read.

        Its dtype must be one of `STORED_DTYPES`.
        """
        rows = len(range(self.shape[0])[start:stop])
        dtype, shape = np.dtype(STORED_DTYPES[self.dtype]), (rows, *self.shape[1:])
        offset = self.offset + start * math.prod(self.shape[1:]) * dtype.itemsize
        return np.memmap(self.file, dtype, "r", offset, shape)


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
      FileNotFoundError: it has none, or lacks a shard of its index.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file():  # first, as in transformers, whatever an index says
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model as safetensors"
        )
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{folder / INDEX}: weight_map is {placed!r}; expected tensors and files")
    files = [folder / name for name in sorted(set(placed.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but {INDEX} lists it; copy it there")
    return files


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by name, from the headers of its files.

    Raises:
      FileNotFoundError: see `weight_files`.
      ValueError: a file is truncated, or its header doesn't describe it.
    """
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy"):
                pass  # that it opens means that its header describes all of its bytes
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); copy it again") from error
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            offset = 8 + size + tensor["data_offsets"][0]
            stored[name] = Stored(file, tensor["dtype"], tuple(tensor["shape"]), offset)
    return stored


def equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors hold the same values; some rows at a time are in memory."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= STORED_DTYPES.keys():
        return False
    row = math.prod(a.shape[1:]) * np.dtype(STORED_DTYPES[a.dtype]).itemsize
    step = max(1, COMPARED_BYTES // row)
    return all(
        np.array_equal(a.view(start, start + step), b.view(start, start + step))
        for start in range(0, a.shape[0], step)
    )


def all_finite(array: np.ndarray) -> bool:
    """Whether it holds neither NaN nor an infinity; some numbers at a time are looked at."""
    flat = array.reshape(-1)
    # Asking bfloat16 numbers themselves takes longer than making them float32.
    dtype = np.promote_types(array.dtype, np.float32)
    return all(
        np.isfinite(flat[start : start + CHECKED].astype(dtype, copy=False)).all()
        for start in range(0, len(flat), CHECKED)
    )


def place(
    shape: tuple[int, ...], read: Callable[[Index], np.ndarray], sharding: Sharding | None
) -> jax.Array:
    """An array whose parts are read when their devices' turn comes; one part is on the host at a time.

    Args:
      shape: of the whole array.
      read: the part of it at an index. It is called once for each distinct index among this
        process's devices, and what it returns is not kept.
      sharding: where the parts lie; None: whole on the default device.
    """
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    parts: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # None is for the devices of other processes
        part = tuple(range(n)[axis] for n, axis in zip(shape, index, strict=True))
        parts.setdefault(part, []).append(device)
    arrays: list[jax.Array] = []
    for part, devices in parts.items():
        buffer = read(tuple(slice(axis.start, axis.stop) for axis in part))
        # Waits for the copies, which hold the buffer, before there is another.
        arrays += jax.block_until_ready([jax.device_put(buffer, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
