"""The modules of LoRA adapters; `lora` says which there are."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreset.models.lora import LoRA

Array = jax.Array


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
