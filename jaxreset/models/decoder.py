"""A decoder-only transformer in the Qwen2 / Qwen3 / Llama 3 family.

    tokens ─▶ embed ─▶ L × [ x + attend(norm x) ; x + mlp(norm x) ] ─▶ norm ─▶ hidden ─▶ head ─▶ logits

The parameters of the L blocks are stacked on a leading axis, and one block's code runs over them: a
`scan` in training, a `fori_loop` in decoding, where the cache is carried along. A row is always a
shared prefix and a suffix of its own, and the last prefix token is the *first input of the row*: the
hidden state of a row's slot t predicts its t-th suffix token, and the prefix holds one token less.

    prefix    [ p0 p1 p2 ]           positions 0 1 2      keys and values, once per group
    row input [ p3 s0 s1 s2 ]        positions 3 4 5 6    its own slots 0 1 2 3
    predicts  [ s0 s1 s2 s3 ]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreset.models.attention import causal_attention, shared_prefix_attention

Array = jax.Array


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling for contexts longer than the pretrained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`.

    `qkv_bias` is Qwen2's, `qk_norm` Qwen3's, `rope_scaling` Llama 3's. `dtype` is that of parameters
    and matrix products; norms, rotary angles and softmax are computed in float32 at least.
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


class KV(NamedTuple):
    """Keys `[L, ..., G, D, slots]` and values `[L, ..., G, slots, D]` of all layers; see `attention`."""

    keys: Array
    values: Array


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

    A stack is only sliced (`Decoder.block`), never called. Attention itself stays outside:
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

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """`x` [..., T, E], `positions` [..., T] -> query [..., T, H, D], key and value [..., T, G, D]."""
        x = self.attention_norm(x)
        query = jnp.einsum("...e,ehd->...hd", x, self.q[...])
        key = jnp.einsum("...e,ehd->...hd", x, self.k[...])
        value = jnp.einsum("...e,ehd->...hd", x, self.v[...])
        if self.config.qkv_bias:
            query, key = query + self.q_bias[...], key + self.k_bias[...]
            value = value + self.v_bias[...]
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        angles = rotary_angles(positions, self.config)
        return rotate(query, angles), rotate(key, angles), value

    def combine(self, x: Array, attended: Array) -> Array:
        """`x` [..., T, E] and the attention's output [..., T, H, D] -> the layer's output [..., T, E]."""
        x = x + jnp.einsum("...hd,hde->...e", attended, self.o[...])
        y = self.mlp_norm(x)
        return x + (jax.nn.silu(y @ self.gate[...]) * (y @ self.up[...])) @ self.down[...]


class Decoder(nnx.Module):
    """The whole network. Its methods are pure: split it with `nnx.split`, merge it inside `jax.jit`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Untied, a token enters the stream at the scale of what the blocks add to it.
        scale = 0.02 if config.tie_embeddings else 1.0
        init = jax.nn.initializers.normal
        shape = config.vocab, config.width
        self.embed = nnx.Param(init(scale)(rngs.params(), shape, config.dtype))
        self.blocks = Block(config, stack=config.layers, rngs=rngs)
        self.norm = RMSNorm((config.width,), config.norm_eps, config.dtype)
        if not config.tie_embeddings:
            self.output = nnx.Param(init(0.02)(rngs.params(), shape[::-1], config.dtype))

    @property
    def head(self) -> Array:
        """`[E, V]` output projection."""
        return self.embed[...].T if self.config.tie_embeddings else self.output[...]

    def logits(self, tokens: Array) -> Array:
        """`[B, T]` right-padded tokens -> `[B, T, V]` float32 logits; for inspection, not for training."""
        hidden, _ = self._causal(tokens)
        return jnp.dot(hidden, self.head, preferred_element_type=_wide(hidden))

    def hidden(self, tokens: Array) -> Array:
        """`[B, T]` right-padded tokens -> `[B, T, E]`; position t predicts token t + 1."""
        return self._causal(tokens)[0]

    def prefill(self, tokens: Array) -> KV:
        """`[N, P]` right-padded prefixes -> their keys and values, `[L, N, G, D, P]` and `[L, N, G, P, D]`.

        Slots at and after a prefix's end hold padding: attention masks them by length.
        """
        return self._causal(tokens)[1]

    def extend(self, tokens: Array, prefix: KV, prefix_lengths: Array) -> KV:
        """Keys and values of more tokens of each prefix; what the prefix holds isn't computed again.

        Args:
          tokens: `[N, Q]` right-padded; the first stands at position `prefix_lengths`.
          prefix: `[L, N, ...]` with P slots.
          prefix_lengths: `[N]` int, slots of `prefix` that exist.

        Returns:
          `[L, N, 1, G, D, Q]` and `[L, N, 1, G, Q, D]`: a suffix store of one row a group.
        """
        positions = prefix_lengths[:, None, None] + jnp.arange(tokens.shape[-1])
        causal = _causal_mask(tokens.shape[-1])

        def layer(x: Array, stacked: tuple[nnx.State, KV]) -> tuple[Array, KV]:
            params, shared = stacked
            block = nnx.merge(graph, params)
            query, keys, values = block.project(x, positions)
            own = KV(*_slots_inside(keys, values))
            attended = shared_prefix_attention(query, *own, causal, *shared, prefix_lengths)
            return block.combine(x, attended), own

        graph, stacked = nnx.split(self.blocks)
        return jax.lax.scan(layer, self.embed[tokens][:, None], (stacked, prefix))[1]

    def suffix_hidden(
        self, prefix: Array, prefix_lengths: Array, rows: Array, *, remat: bool = False
    ) -> Array:
        """Hidden states of K suffixes whose shared prefix runs through the network once.

        Args:
          prefix: `[N, P]` right-padded tokens, the last prefix token left out.
          prefix_lengths: `[N]` int, the tokens of `prefix` that exist.
          rows: `[N, K, S]` right-padded row inputs: the last prefix token, then the suffix but for its
            last token.
          remat: recompute activations in the backward pass instead of keeping them.

        Returns:
          `[N, K, S, E]`; slot t predicts the suffix's t-th token.
        """
        positions = prefix_lengths[:, None, None] + jnp.arange(rows.shape[-1])
        causal = _causal_mask(rows.shape[-1])
        prefix_positions = jnp.arange(prefix.shape[-1])[None]

        def layer(
            carry: tuple[Array, Array], params: nnx.State
        ) -> tuple[tuple[Array, Array], None]:
            shared, own = carry
            block = nnx.merge(graph, params)
            shared, keys, values = _self_attend(block, shared, prefix_positions)
            query, row_keys, row_values = block.project(own, positions)
            attended = shared_prefix_attention(
                query, *_slots_inside(row_keys, row_values), causal, keys, values, prefix_lengths
            )
            return (shared, block.combine(own, attended)), None

        graph, stacked = nnx.split(self.blocks)
        body = jax.checkpoint(layer) if remat else layer
        (_, own), _ = jax.lax.scan(body, (self.embed[prefix], self.embed[rows]), stacked)
        return self.norm(own)

    def decode(
        self, tokens: Array, slots: Array, prefix: KV, prefix_lengths: Array, suffix: KV
    ) -> tuple[Array, KV]:
        """One decoding step for K rows of N groups.

        Args:
          tokens: `[N, K]` the tokens fed.
          slots: `[N, K]` the row's own slot each is written to; slot 0 is the last prefix token's.
          prefix: keys and values shared by a group's rows, `[L, N, ...]` with P slots.
          prefix_lengths: `[N]` int, slots of `prefix` that exist.
          suffix: the rows' own keys and values, `[L, N, K, ...]` with S slots.

        Returns:
          `[N, K, E]` hidden states that predict the next tokens, and `suffix` with the slots written.
        """
        positions = (prefix_lengths[:, None] + slots)[..., None]  # [N, K, 1]
        mask = (jnp.arange(suffix.keys.shape[-1]) <= slots[..., None])[:, :, None]  # [N, K, 1, S]
        group, row = jnp.indices(tokens.shape)

        def layer(index: Array, carry: tuple[Array, KV]) -> tuple[Array, KV]:
            x, cache = carry
            block = self.block(index)
            query, key, value = block.project(x, positions)
            # Written per row: TPU copies a cache that is written at one shared slot.
            keys = cache.keys.at[index, group, row, :, :, slots].set(key[:, :, 0])
            values = cache.values.at[index, group, row, :, slots].set(value[:, :, 0])
            attended = shared_prefix_attention(
                query,
                keys[index],
                values[index],
                mask,
                prefix.keys[index],
                prefix.values[index],
                prefix_lengths,
            )
            return block.combine(x, attended), KV(keys, values)

        x = self.embed[tokens][:, :, None]  # [N, K, 1, E]
        x, suffix = jax.lax.fori_loop(0, self.config.layers, layer, (x, suffix))
        return self.norm(x)[:, :, 0], suffix

    def block(self, index: Array | int) -> Block:
        """Layer `index` of the stack."""
        graph, stacked = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda p: p[index], stacked))

    def _causal(self, tokens: Array) -> tuple[Array, KV]:
        positions = jnp.arange(tokens.shape[-1])[None]

        def layer(x: Array, params: nnx.State) -> tuple[Array, KV]:
            x, keys, values = _self_attend(nnx.merge(graph, params), x, positions)
            return x, KV(keys, values)

        graph, stacked = nnx.split(self.blocks)
        x, cache = jax.lax.scan(layer, self.embed[tokens], stacked)
        return self.norm(x), cache


def _self_attend(block: Block, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """One causal layer over `x` [N, T, E]; right padding can't be seen from before it."""
    query, keys, values = block.project(x, positions)
    keys, values = _slots_inside(keys, values)
    return block.combine(x, causal_attention(query, keys, values)), keys, values


def _slots_inside(keys: Array, values: Array) -> tuple[Array, Array]:
    """`[..., slots, G, D]` both -> `[..., G, D, slots]` and `[..., G, slots, D]`."""
    return jnp.moveaxis(keys, -3, -1), jnp.moveaxis(values, -3, -2)


def _causal_mask(size: int) -> Array:
    return jnp.tril(jnp.ones((size, size), bool))[None, None]


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def rotary_angles(positions: Array, config: DecoderConfig) -> Array:
    """`positions` [..., T] -> rotary angles [..., T, D / 2], float32 (float64 under x64 parameters)."""
    half = config.head_dim // 2
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=dtype) / half)
    if (scaling := config.rope_scaling) is not None:
        # Llama 3: long wavelengths are slowed by `factor`, short ones kept, those between blended.
        wavelengths = 2 * math.pi / frequencies
        span = scaling.high_freq_factor - scaling.low_freq_factor
        ratio = scaling.original_max_position / wavelengths
        kept = jnp.clip((ratio - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return positions[..., None].astype(dtype) * frequencies


def rotate(x: Array, angles: Array) -> Array:
    """Rotary embedding of `x` [..., T, heads, D] by `angles` [..., T, D / 2] (halves, not pairs)."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
