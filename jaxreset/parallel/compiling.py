"""Compiling a program before there is anything to run it on."""

from __future__ import annotations

from typing import Any

import jax


def run(function: Any, *args: Any, **static: Any) -> Any:
    """`function(*args, **static)`."""
    return function(*args, **static)


def compiled(function: Any, *args: Any, **static: Any) -> Any:
    """Compiles a jitted function and doesn't run it: no buffer is made.

    Args:
      function: jitted; a later call with such arrays finds its program.
      args: trees of arrays, or of `jax.ShapeDtypeStruct`: what this returned for another function, say.
      static: its static arguments.

    Returns:
      The shapes, dtypes and places of what it would return.
    """
    lowered = function.lower(*args, **static)
    program = lowered.compile()
    # Results lie anywhere unless an argument is bound to its devices; a program is compiled for either.
    bound = any(_bound(x) for x in jax.tree.leaves(args))

    def like(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if bound else None)

    return jax.tree.map(like, lowered.out_info, program.output_shardings)


def _bound(x: Any) -> bool:
    if isinstance(x, jax.Array):
        return x.committed
    return getattr(x, "sharding", None) is not None
