"""Where a decoder's parameters lie on a mesh, while they learn and while they decode."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Axes of each parameter by its name; stacked blocks have the layers first. Others are replicated.
PARAM_AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("tensor", "fsdp"),
    "output": ("fsdp", "tensor"),
    "q": (None, "fsdp", "tensor", None),
    "k": (None, "fsdp", "tensor", None),
    "v": (None, "fsdp", "tensor", None),
    "o": (None, "tensor", None, "fsdp"),
    "gate": (None, "fsdp", "tensor"),
    "up": (None, "fsdp", "tensor"),
    "down": (None, "tensor", "fsdp"),
}


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A tree of shardings like `params`, from `PARAM_AXES`.

    An axis that its mesh axis doesn't divide is left whole: few key-value heads on many tensor shards.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        axes = next((PARAM_AXES[name] for name in reversed(names) if name in PARAM_AXES), ())
        if "lora" in names:  # A lies as the matrix's inputs, B as its outputs; the rank is whole
            axes = (None, axes[1], None) if "a" in names else (None, None, *axes[2 - leaf.ndim :])
        fitting = [
            axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        # As XLA names it: what an update returns would else have another name, and be compiled for anew.
        while fitting and fitting[-1] is None:
            fitting.pop()
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree_util.tree_map_with_path(place, params)


def decode_shardings(mesh: Mesh, params: Any) -> Any:
    """As `param_shardings`, but whole along `fsdp`: a decode step reads every parameter.

    Gathering them once for a rollout phase saves gathering them at every token.
    """

    def gather(sharding: NamedSharding) -> NamedSharding:
        axes = (None if axis == "fsdp" else axis for axis in sharding.spec)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(gather, param_shardings(mesh, params))
