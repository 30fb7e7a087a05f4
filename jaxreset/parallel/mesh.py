"""One mesh of three axes, and how every array lies on it.

                                    data      fsdp              tensor
parameters, gradients, moments      whole     as their model has it, both: `models.placement`
parameters that decode              whole     whole             likewise
keys and values                     groups    groups            key-value heads
microbatches, lanes of a round      groups    groups            whole
hidden states inside a layer        groups    groups            whole; heads, hidden units in between
hidden states between layers        groups    groups            lanes, else slots
logits of an update                 groups    groups            vocabulary
logits that tokens are drawn from   groups    groups            rows
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreset.parallel.processes import gather

AXES = ("data", "fsdp", "tensor")
DATA_AXES = ("data", "fsdp")


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, those of this job or others that programs are compiled for.

    Raises:
      ValueError: the product isn't the number of devices, with the arithmetic.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = (data, fsdp, tensor), len(devices)
    if math.prod(sizes) != count:
        raise ValueError(
            f"mesh.data {data} × mesh.fsdp {fsdp} × mesh.tensor {tensor} = {math.prod(sizes)}, but "
            f"there are {count} devices ({devices[0].device_kind}); change one of the three"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_sizes(mesh: Mesh, *, heads: int, mlp: int, width: int) -> None:
    """Refuses a mesh over which a decoder's largest arrays can't be split.

    Few key-value heads are no hindrance, nor is an odd vocabulary: they are left whole.

    Raises:
      ValueError: an axis that doesn't divide heads, the MLP or the width, with the arithmetic.
    """
    for axis, name, size in (
        ("tensor", "attention heads", heads),
        ("tensor", "hidden units of an MLP", mlp),
        ("fsdp", "numbers of a hidden state", width),
    ):
        parts = mesh.shape[axis]
        if size % parts:
            good = [n for n in range(1, 2 * parts) if size % n == 0]
            raise ValueError(
                f"mesh.{axis} {parts} does not divide the model's {size} {name} ({size} / {parts} = "
                f"{size / parts:.2f}); {', '.join(map(str, good))} would"
            )


def data_shards(mesh: Mesh | None) -> int:
    """Into how many parts groups are split; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first axis is groups or sequences: split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """For what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def hidden_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """For hidden states `[N, ..., E]` between layers: groups as by `rows_sharding`, tokens over tensor.

    Inside a layer every device of the tensor axis reads all tokens of its groups. Between layers, where
    they are kept for the backward pass, each has a part: the first axis between N and E that tensor
    divides is split, a group's lanes or else their slots.
    """
    axes: list[Any] = [("data", "fsdp"), *(None for _ in shape[1:])]
    for axis, size in enumerate(shape[1:-1], 1):
        if size % mesh.shape["tensor"] == 0:
            axes[axis] = "tensor"
            break
    return NamedSharding(mesh, PartitionSpec(*axes))


def head_sharding(mesh: Mesh, vocab: int) -> NamedSharding:
    """For the output projection `[E, V]` where logits are made: split over tensor only.

    Left to itself, XLA may gather the logits of all shards instead.
    """
    axis = "tensor" if vocab % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, axis))


def embed_sharding(mesh: Mesh, vocab: int) -> NamedSharding:
    """For the embedding `[V, E]` where tokens are looked up: as `head_sharding`.

    Split along fsdp too, it would be looked up for the tokens of all shards.
    """
    axis = "tensor" if vocab % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(axis))


def cache_sharding(mesh: Mesh, shape: tuple[int, ...], head_axis: int) -> NamedSharding:
    """For keys or values `[L, N, ...]`: groups split as by `rows_sharding`, heads over tensor.

    Heads that the tensor axis doesn't divide are left whole, as their projections are.
    """
    axes: list[Any] = [None] * len(shape)
    axes[1] = DATA_AXES
    if shape[head_axis] % mesh.shape["tensor"] == 0:
        axes[head_axis] = "tensor"
    return NamedSharding(mesh, PartitionSpec(*axes))


def device_bytes() -> int:
    """Memory that programs on a device may use, the least of all processes; for a CPU, the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return min(gather([int(stats.get("bytes_limit", _machine_bytes()))]))


def _machine_bytes() -> int:
    """Memory of this machine, or what a container grants of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = Path("/sys/fs/cgroup/memory.max")
    text = granted.read_text().strip() if granted.is_file() else "max"
    return min(machine, int(text)) if text.isdecimal() else machine
