"""One layer of a `decoder.Decoder`, and the sizes that all of them have.

x ─▶ project ─▶ query, key, value ─▶ (the caller attends) ─▶ combine ─▶ x
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreset.models.lora import LoRA
from jaxreset.models.low_rank import Adapter
from jaxreset.models.rotary import Rope, RopeScaling, Rotation, Yarn, rotate

Array = jax.Array

SWITCHES = ("qkv_bias", "qk_norm", "joint_qk_norm", "post_norm")  # what families differ in
# Axes that each matrix of a stack sums over, and those that it gives; axis 0 is the layer.
MATRICES = {
    "q": ((1,), (2, 3)),
    "k": ((1,), (2, 3)),
    "v": ((1,), (2, 3)),
    "o": ((1, 2), (3,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`; which family sets which switch is in `families`.

    Norms, rotary angles and softmax are computed in float32 at least.

    Attributes:
      rope_theta, rope_scaling: of rotary angles.
      qkv_bias: queries, keys and values have biases.
      qk_norm, joint_qk_norm: queries and keys are normed, each head for itself or all heads together.
      post_norm: norms stand behind attention and MLP, before what they give is added, and not before them.
      window: tokens, itself and those before it, that a token sees in the layers that are `windowed`.
      windowed: of each layer, whether it has a window; empty: none has.
      window_rope: of layers with a window, where they rotate otherwise; None: as the others.
      dtype: of parameters and matrix products.
      lora: adapters beside the blocks' matrices.
      family: module of `families`, whose names an export has; None: the first with these switches.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | Yarn | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    post_norm: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    window_rope: Rope | None = None
    tie_embeddings: bool = True
    dtype: str = "float32"
    lora: LoRA | None = None
    family: str | None = field(default=None, compare=False)  # computes nothing

    def __post_init__(self) -> None:
        if self.windowed and len(self.windowed) != self.layers:
            raise ValueError(f"windowed names {len(self.windowed)} layers of {self.layers}")
        if any(self.windowed) and (self.window or 0) < 1:
            raise ValueError(f"layers have a window, but it is of {self.window} tokens")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axes, as many as the scale has; in float32 at least."""

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape, dtype))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        rms = jnp.sqrt(jnp.square(wide).mean(axes, keepdims=True) + self.eps)
        return (wide / rms).astype(x.dtype) * scale


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
        if c.qk_norm or c.joint_qk_norm:
            heads, kv_heads = ((c.heads,), (c.kv_heads,)) if c.joint_qk_norm else ((), ())
            self.q_norm = RMSNorm((stack, *heads, c.head_dim), c.norm_eps, dtype)
            self.k_norm = RMSNorm((stack, *kv_heads, c.head_dim), c.norm_eps, dtype)
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
        if not self.config.post_norm:
            x = self.attention_norm(x)
        query, key, value = (self._times(x, name) for name in ("q", "k", "v"))
        if self.config.qkv_bias:
            query, key = query + self.q_bias[...], key + self.k_bias[...]
            value = value + self.v_bias[...]
        if self.config.qk_norm or self.config.joint_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, turn), rotate(key, turn), value

    def combine(self, x: Array, attended: Array) -> Array:
        """`x` [..., T, E] and the attention's output [..., T, H, D] -> the layer's output [..., T, E]."""
        heads = attended.reshape(*x.shape[:-1], self.config.heads * self.config.head_dim)
        if self.config.post_norm:
            x = x + self.attention_norm(self._times(heads, "o"))
            return x + self.mlp_norm(self._mlp(x))
        x = x + self._times(heads, "o")
        return x + self._mlp(self.mlp_norm(x))

    def _mlp(self, x: Array) -> Array:
        return self._times(jax.nn.silu(self._times(x, "gate")) * self._times(x, "up"), "down")
