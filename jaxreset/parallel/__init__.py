"""The device mesh, where each array lies on it, and the processes that share it."""

from jaxreset.parallel.mesh import (
    AXES,
    DATA_AXES,
    cache_sharding,
    check_sizes,
    data_shards,
    device_bytes,
    embed_sharding,
    head_sharding,
    hidden_sharding,
    make_mesh,
    replicated,
    rows_sharding,
)
from jaxreset.parallel.processes import fetch, gather, is_leader, own_share, put

__all__ = [
    "AXES",
    "DATA_AXES",
    "cache_sharding",
    "check_sizes",
    "data_shards",
    "device_bytes",
    "embed_sharding",
    "fetch",
    "gather",
    "head_sharding",
    "hidden_sharding",
    "is_leader",
    "make_mesh",
    "own_share",
    "put",
    "replicated",
    "rows_sharding",
]
