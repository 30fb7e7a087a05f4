"""Low-rank adapters beside frozen matrices (LoRA, arXiv 2106.09685).

y = x W + (alpha / rank) · (x A) B        A [inputs, rank] random, B [rank, *outputs] zero at first
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
LINEAR: tuple[Target, ...] = get_args(Target)  # the matrices of a block


@dataclass(frozen=True)
class LoRA:
    """Which matrices of every block have an adapter, and of what size.

    Attributes:
      rank: of the product A B.
      alpha: the product is scaled by alpha / rank.
      targets: names among `LINEAR`.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = LINEAR

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(LINEAR):
            raise ValueError(f"no matrices {sorted(unknown)}; there are {', '.join(LINEAR)}")
        if not self.targets or self.rank < 1:
            raise ValueError(f"LoRA needs a target and a rank of at least 1, got {self}")

    @property
    def scale(self) -> float:
        """That the product A B is multiplied by."""
        return self.alpha / self.rank


class AdapterParam(nnx.Param):
    """A parameter of an adapter: the type tells what is trained from what is frozen."""


class Adapter(nnx.Module):
    """A stack of A `[L, inputs, rank]` and B `[L, rank, *outputs]`, of which a layer's is applied.

    Both are float32 at least, whatever the matrix is: in bfloat16, small updates would be rounded away.
    """

    def __init__(
        self, lora: LoRA, stack: int, inputs: int, outputs: tuple[int, ...], dtype: str, key: Array
    ):
        self.scale = lora.scale
        wide = jnp.promote_types(dtype, jnp.float32)
        bound = 1 / math.sqrt(inputs)  # as in PEFT
        shape = stack, inputs, lora.rank
        self.a = AdapterParam(jax.random.uniform(key, shape, wide, -bound, bound))
        self.b = AdapterParam(jnp.zeros((stack, lora.rank, *outputs), wide))

    def __call__(self, x: Array) -> Array:
        """`[..., inputs]` -> `[..., *outputs]`, in the dtype of `x`."""
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return jnp.tensordot(x @ a, b, 1) * jnp.asarray(self.scale, x.dtype)

    @property
    def product(self) -> Array:
        """The scaled A B of every layer of the stack, `[L, inputs, *outputs]`."""
        return jnp.einsum("lir,lr...->li...", self.a[...], self.b[...]) * self.scale
