"""Devices that a program can be compiled for although they are not attached.

slice_of("v5e:16x16")   256 chips of a TPU pod slice, known to the compiler alone
slice_of("cpu:8")       simulated devices of this machine
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxreset.parallel.mesh import device_bytes

GIB = 2**30
# Of one chip, where the compiler doesn't say what it grants a program.
TPU_MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
EXAMPLES = "v5e:16x16, v6e:8x8, v5p:4x4x4, v4:2x2x2 or cpu:8"
# What libtpu would ask of a metadata server or of the machine, and a lock that is for attached chips.
TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    r"\((?P<used>[\d.]+[KMGT]?)\) exceeds available HBM \((?P<granted>[\d.]+[KMGT]?)\)",
    r"Used (?P<used>[\d.]+[KMGT]?) of (?P<granted>[\d.]+[KMGT]?) hbm",
)


class Slice(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      kind: of the devices, as jax calls it.
      devices: all of them; on a TPU they hold no arrays.
      memory: bytes that a program may use on one of them.
    """

    name: str
    kind: str
    devices: list[jax.Device]
    memory: int


def slice_of(name: str) -> Slice:
    """The devices of a topology.

    Args:
      name: a TPU generation and the chips along each axis, or "cpu" and a count.

    Raises:
      ValueError: there is no such topology; says which there are.
      ImportError: a TPU's without its compiler.
    """
    kind, _, layout = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", layout):
        return _simulated(name, int(layout))
    if kind not in TPU_MEMORY or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", layout):
        raise ValueError(f"topology {name!r}: expected a kind and a layout, such as {EXAMPLES}")
    return _tpu(name, kind)


def _simulated(name: str, count: int) -> Slice:
    if jax.config.values["jax_num_cpu_devices"] < 1:  # nobody has said how many
        with suppress(RuntimeError):  # jax has them already
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"topology {name!r}: jax started with {len(devices)} CPU devices; ask in a new process"
        )
    # They share the machine's memory.
    return Slice(name, devices[0].device_kind, devices[:count], device_bytes() // count)


def _tpu(name: str, kind: str) -> Slice:
    for key, value in TPU_SETTINGS.items():
        os.environ.setdefault(key, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"topology {name!r} needs the TPU's compiler: pip install 'jaxreset[tpu]'"
        ) from error
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {name!r}: {reason}; known are such as {EXAMPLES}") from error
    device: Any = devices[0]
    return Slice(name, device.device_kind, list(devices), _granted(device) or TPU_MEMORY[kind])


def _granted(device: Any) -> int | None:
    """Memory of a device that isn't attached: its compiler names it when it refuses a program."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: jnp.full((2**20, 2**20), x)).lower(x).compile()
    except Exception as error:
        return refusal(error)[1] if is_refusal(error) else None
    return None


def is_refusal(error: Exception) -> bool:
    """Whether a compiler refused a program for its memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def refusal(error: Any) -> tuple[int | None, int | None]:
    """Bytes that a refused program needs and those that there are, where the compiler says them."""
    for pattern in _REFUSALS:
        if found := re.search(pattern, str(error)):
            return _bytes(found["used"]), _bytes(found["granted"])
    return None, None


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", text).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])
