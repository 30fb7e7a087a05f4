"""Compiling programs before there is anything to run them on, several at a time.

with SideBySide() as compiled:
    shapes = compiled(function, *args, **static)   # what it would return; another call may take these
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

Compile = Callable[..., Any]  # as `SideBySide`


def run(function: Any, *args: Any, **static: Any) -> Any:
    """`function(*args, **static)`."""
    return function(*args, **static)


class SideBySide:
    """Compiles jitted functions in threads while others are traced, and runs none: no buffer is made.

    A later call of a function with such arrays finds its program. What a compiler refuses is raised at the
    end of the `with` statement, if not before.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._tasks: list[Future[Any]] = []
        self._made: dict[Hashable, Any] = {}

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for task in self._tasks:
                task.result()

    def __call__(self, function: Any, *args: Any, **static: Any) -> Any:
        """Shapes, dtypes and places of what the function would return.

        Args:
          function: jitted.
          args: trees of arrays, or of `jax.ShapeDtypeStruct`: what this returned for another function, say.
          static: its static arguments.
        """
        leaves, tree = jax.tree.flatten(args)
        kinds = tuple((np.shape(x), jax.dtypes.result_type(x), _place(x)) for x in leaves)
        name = function, tree, kinds, tuple(sorted(static.items(), key=lambda item: item[0]))
        if name not in self._made:
            self._made[name] = self._make(function, args, static, {place for *_, place in kinds})
        return self._made[name]

    def _make(self, function: Any, args: Any, static: Any, places: set[Any]) -> Any:
        lowered = function.lower(*args, **static)
        task = self._pool.submit(lowered.compile)
        self._tasks.append(task)
        # Results lie anywhere unless an argument is bound to its devices; a program is compiled for either.
        bound = places - {None}
        if all(len(place.device_set) == 1 for place in bound):
            place = next(iter(bound), None)
            return jax.tree.map(lambda x: _shape(x, place), lowered.out_info)
        return jax.tree.map(_shape, lowered.out_info, task.result().output_shardings)


def _shape(x: Any, place: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _place(x: Any) -> jax.sharding.Sharding | None:
    """Where an array has to lie, if that is settled."""
    if isinstance(x, jax.Array):
        return x.sharding if x.committed else None
    return getattr(x, "sharding", None)
