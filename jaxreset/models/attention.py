"""Attention of K rows over one shared prefix and over their own suffixes.

The sampler (T = 1 new token a row) and the update (T tokens a row) call the same function, so what
is sampled and what is trained on cannot drift apart. Shapes: N groups, K rows each, T queries a row,
P prefix slots, S suffix slots, H query heads, G key-value heads (H a multiple of G), D head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def shared_prefix_attention(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array,
    prefix_keys: Array | None = None,
    prefix_values: Array | None = None,
    prefix_lengths: Array | None = None,
) -> Array:
    """Softmax attention over the concatenation of a shared prefix and each row's own suffix.

    The prefix is read once per group: its scores are one matrix product of the K * T queries with
    the P keys, never K copies of the keys. Scores and softmax are in float32 at least.

    Args:
      query: `[N, K, T, H, D]`.
      keys, values: `[N, K, S, G, D]`, the row's own slots.
      mask: bool, broadcastable to `[N, K, T, S]`: which own slots each query sees; at least one.
      prefix_keys, prefix_values: `[N, P, G, D]`, seen by every row of the group, or None.
      prefix_lengths: `[N]` int: the slots of the prefix that exist.

    Returns:
      `[N, K, T, H, D]` in the dtype of `query`.
    """
    n, k, t, heads, width = query.shape
    groups = keys.shape[-2]
    query = (query * width**-0.5).reshape(n, k, t, groups, heads // groups, width)
    accumulate = jnp.promote_types(query.dtype, jnp.float32)

    def scores(equation: str, other: Array, visible: Array) -> Array:
        product = jnp.einsum(equation, query, other, preferred_element_type=accumulate)
        return jnp.where(visible, product, -jnp.inf)

    own = scores("nktgrd,nksgd->ngktrs", keys, mask[:, None, :, :, None, :])
    if prefix_keys is None or prefix_values is None or prefix_lengths is None:
        weights = jax.nn.softmax(own, axis=-1).astype(query.dtype)
        out = jnp.einsum("ngktrs,nksgd->nktgrd", weights, values)
        return out.reshape(n, k, t, heads, width)

    size = prefix_keys.shape[1]
    visible = jnp.arange(size) < prefix_lengths[:, None]  # [N, P]
    shared = scores("nktgrd,npgd->ngktrp", prefix_keys, visible[:, None, None, None, None, :])
    # One softmax over both parts: exact, and stable because its maximum is the joint one.
    weights = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1), axis=-1).astype(query.dtype)
    out = jnp.einsum("ngktrp,npgd->nktgrd", weights[..., :size], prefix_values)
    out += jnp.einsum("ngktrs,nksgd->nktgrd", weights[..., size:], values)
    return out.reshape(n, k, t, heads, width)
