"""The device mesh, and where each array lies on it."""

from jaxreset.parallel.mesh import (
    cache_sharding,
    decode_shardings,
    device_bytes,
    make_mesh,
    param_shardings,
    rows_sharding,
)

__all__ = [
    "cache_sharding",
    "decode_shardings",
    "device_bytes",
    "make_mesh",
    "param_shardings",
    "rows_sharding",
]
