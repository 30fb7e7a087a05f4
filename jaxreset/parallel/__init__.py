"""The device mesh, and where each array lies on it."""

from jaxreset.parallel.mesh import (
    AXES,
    cache_sharding,
    data_shards,
    decode_shardings,
    device_bytes,
    head_sharding,
    make_mesh,
    param_shardings,
    rows_sharding,
)

__all__ = [
    "AXES",
    "cache_sharding",
    "data_shards",
    "decode_shardings",
    "device_bytes",
    "head_sharding",
    "make_mesh",
    "param_shardings",
    "rows_sharding",
]
