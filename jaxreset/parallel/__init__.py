"""The device mesh, and where each array lies on it."""

from jaxreset.parallel.mesh import make_mesh, param_shardings, rows_sharding

__all__ = ["make_mesh", "param_shardings", "rows_sharding"]
