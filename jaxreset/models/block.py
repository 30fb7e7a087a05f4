"""One layer of a `decoder.Decoder`, and the sizes that all of them have.

x ─▶ project ─▶ query, key, value ─▶ (the caller attends) ─▶ combine ─▶ x
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreset.models.lora import Adapter, LoRA
from jaxreset.models.rotary import RopeScaling, Rotation, rotate

Array = jax.Array


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`.

    `qkv_bias` is Qwen2's, `qk_norm` Qwen3's, `rope_scaling` Llama 3's. `dtype` is that of parameters
    and matrix products; norms, rotary angles and softmax are computed in float32 at least. `lora` puts
    adapters beside the blocks' matrices.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    dtype: str = "float32"
    lora: LoRA | None = None


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 at least."""

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape, dtype))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        rms = jnp.sqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide / rms).astype(x.dtype) * self.scale[...]


class Block(nnx.Module):
    """One layer, or a stack of `stack` layers whose parameters have leading axis `stack`.

    A stack is only sliced, never called. Attention itself stays outside:
    `project` gives queries, keys and values; the caller attends; `combine` finishes the layer.
    """

    def __init__(self, config: DecoderConfig, *, stack: int, rngs: nnx.Rngs):
        c, dtype = config, config.dtype
        init = jax.nn.initializers.truncated_normal(1.0)

        def matrix(fan_in: int, *shape: int, depth: int = 1) -> nnx.Param[Array]:
            scale = 1 / math.sqrt(fan_in * depth)
            return nnx.Param(
                init(rngs.params(), (stack, *shape), dtype) * jnp.asarray(scale, dtype)
            )

        self.config = config
        self.attention_norm = RMSNorm((stack, c.width), c.norm_eps, dtype)
        self.q = matrix(c.width, c.width, c.heads, c.head_dim)
        self.k = matrix(c.width, c.width, c.kv_heads, c.head_dim)
        self.v = matrix(c.width, c.width, c.kv_heads, c.head_dim)
        # Residual branches start small, so that depth doesn't set the scale of the stream.
        self.o = matrix(c.heads * c.head_dim, c.heads, c.head_dim, c.width, depth=2 * c.layers)
        if c.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((stack, c.heads, c.head_dim), dtype))
            self.k_bias = nnx.Param(jnp.zeros((stack, c.kv_heads, c.head_dim), dtype))
            self.v_bias = nnx.Param(jnp.zeros((stack, c.kv_heads, c.head_dim), dtype))
        if c.qk_norm:
            self.q_norm = RMSNorm((stack, c.head_dim), c.norm_eps, dtype)
            self.k_norm = RMSNorm((stack, c.head_dim), c.norm_eps, dtype)
        self.mlp_norm = RMSNorm((stack, c.width), c.norm_eps, dtype)
        self.gate = matrix(c.width, c.width, c.mlp)
        self.up = matrix(c.width, c.width, c.mlp)
        self.down = matrix(c.mlp, c.mlp, c.width, depth=2 * c.layers)
        if c.lora is not None:
            self.lora = nnx.Dict(
                {name: self._adapter(name, c.lora, rngs.params()) for name in c.lora.targets}
            )

    def _adapter(self, name: str, lora: LoRA, key: Array) -> Adapter:
        """Of the matrix of that name."""
        stack, *axes = getattr(self, name).shape
        inputs = 2 if name == "o" else 1  # axes
        sizes = math.prod(axes[:inputs]), tuple(axes[inputs:])
        return Adapter(lora, stack, *sizes, self.config.dtype, key)

    def _times(self, x: Array, name: str) -> Array:
        """`x` [..., inputs] times the matrix of that name and, if it has one, its adapter."""
        matrix = getattr(self, name)[...]
        if name == "o":  # contracting heads and widths as two axes makes XLA copy the matrix
            matrix = matrix.reshape(-1, matrix.shape[-1])
        product = jnp.tensordot(x, matrix, 1)
        lora = self.config.lora
        return product + self.lora[name](x) if lora and name in lora.targets else product

    def project(self, x: Array, turn: Rotation) -> tuple[Array, Array, Array]:
        """`x` [..., T, E], `turn` [..., T, D / 2] -> query [..., T, H, D], key and value [..., T, G, D]."""
        x = self.attention_norm(x)
        query, key, value = (self._times(x, name) for name in ("q", "k", "v"))
        if self.config.qkv_bias:
            query, key = query + self.q_bias[...], key + self.k_bias[...]
            value = value + self.v_bias[...]
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, turn), rotate(key, turn), value

    def combine(self, x: Array, attended: Array) -> Array:
        """`x` [..., T, E] and the attention's output [..., T, H, D] -> the layer's output [..., T, E]."""
        heads = attended.reshape(*x.shape[:-1], self.config.heads * self.config.head_dim)
        x = x + self._times(heads, "o")
        y = self.mlp_norm(x)
        return x + self._times(jax.nn.silu(self._times(y, "gate")) * self._times(y, "up"), "down")
