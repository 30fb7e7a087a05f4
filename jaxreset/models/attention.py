"""Attention of K rows over one shared prefix and over their own suffixes.

The sampler (T = 1 new token a row) and the update (T tokens a row) call the same function, so what
is sampled and what is trained on cannot drift apart. Shapes: N groups, K rows each, T queries a row,
P prefix slots, S suffix slots, H query heads, G key-value heads (H a multiple of G), D head width.

Keys lie as `[..., G, D, slots]` and values as `[..., G, slots, D]`: so both matrix products of a
decoding step read them in order, and neither is transposed at every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array
Attend = Callable[..., Array]  # with the arguments of `shared_prefix_attention`

LEAST_BLOCK = 256  # queries of `causal_attention`; smaller products don't fill the machine
MOST_BLOCKS = 8  # each is compiled


class Prefix(NamedTuple):
    """What the lanes of a group read besides their own tokens.

    Attributes:
      keys, values: `[N, G, D, P]` and `[N, G, P, D]`.
      groups: `[N, P]` int, which group a slot is of.
      readers: int, broadcastable to `[N, K, T]`: the group of each token, which sees those slots only.
      positions, reader_positions: int, likewise, of slots and of tokens in their sequences; for a window.
    """

    keys: Array
    values: Array
    groups: Array
    readers: Array
    positions: Array | None = None
    reader_positions: Array | None = None


class Part(NamedTuple):
    """Attention over some of the slots: sum of weights times values, sum of weights, largest score."""

    weighted: Array
    total: Array
    top: Array


def shared_prefix_attention(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array,
    prefix_keys: Array | None = None,
    prefix_values: Array | None = None,
    prefix_mask: Array | None = None,
) -> Array:
    """Softmax attention over the concatenation of a shared prefix and each row's own suffix.

    The prefix is read once per group: its scores are one matrix product of the K * T queries with
    the P keys, never K copies of the keys. Scores and softmax are in float32 at least.

    Args:
      query: `[N, K, T, H, D]`.
      keys, values: `[N, K, G, D, S]` and `[N, K, G, S, D]`, the row's own slots.
      mask: bool, broadcastable to `[N, K, T, S]`: which own slots each query sees; at least one.
      prefix_keys, prefix_values: `[N, G, D, P]` and `[N, G, P, D]`, shared by the K rows, or None.
      prefix_mask: bool, broadcastable to `[N, K, T, P]`: which slots of the prefix each query sees.

    Returns:
      `[N, K, T, H, D]` in the dtype of `query`.
    """
    n, k, t, heads, width = query.shape
    groups = keys.shape[2]
    query = (query * width**-0.5).reshape(n, k, t, groups, heads // groups, width)
    visible = mask[:, :, None, :, None]  # [N, K, 1, T, 1, S]
    part = _attend("nktgrd,nkgds->nkgtrs", "nkgtrs,nkgsd->nkgtrd", query, keys, values, visible)
    if prefix_keys is not None and prefix_values is not None and prefix_mask is not None:
        visible = prefix_mask[:, None, :, :, None]  # [N, 1, K, T, 1, P]
        equations = "nktgrd,ngdp->ngktrp", "ngktrp,ngpd->ngktrd"
        shared = _attend(*equations, query, prefix_keys, prefix_values, visible)
        part = _merge(part, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), shared))
    out = part.weighted / part.total[..., None]
    return jnp.moveaxis(out, 2, 3).reshape(n, k, t, heads, width).astype(query.dtype)


def attend_by_heads(mesh: Mesh) -> Attend:
    """`shared_prefix_attention` where heads are split over tensor: each device attends with its own.

    Left to itself XLA may exchange parts of the heads' scores. Inside `shard_map` over the data axes; where
    `tensor` doesn't divide the key-value heads, it is XLA's to see to.
    """

    def attend(query: Array, keys: Array, values: Array, mask: Array, *prefix: Array) -> Array:
        args = query, keys, values, mask, *prefix
        if keys.shape[2] % mesh.shape["tensor"]:
            return shared_prefix_attention(*args)
        whole, heads = PartitionSpec(), PartitionSpec(None, None, None, "tensor")
        own, shared = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")
        return jax.shard_map(
            shared_prefix_attention,
            in_specs=(heads, own, own, whole, shared, shared, whole)[: len(args)],
            out_specs=heads,
            axis_names={"tensor"},
            check_vma=False,
        )(*args)

    return attend


def causal_attention(
    query: Array,
    keys: Array,
    values: Array,
    segments: Array | None = None,
    prefix: Prefix | None = None,
    *,
    window: Array | int | None = None,
    recompute: bool = False,
) -> Array:
    """Attention of the tokens of lanes to themselves, to those before them, and to a shared prefix.

    Queries are taken in blocks. A block reads no key after its last one, which leaves out almost half of
    the scores.

    Args:
      query: `[N, K, T, H, D]`.
      keys, values: `[N, K, G, D, T]` and `[N, K, G, T, D]`.
      segments: `[N, K, T]` int: tokens see those of their own segment only; None: all of a lane are of one.
      prefix: what the K lanes of a group share, if anything.
      window: tokens see those fewer than so many positions before them; None: all. The tokens of a segment
        lie side by side.
      recompute: the backward pass computes scores anew, a block at a time, instead of keeping them.

    Returns:
      `[N, K, T, H, D]` in the dtype of `query`.
    """
    size = query.shape[2]
    length = max(LEAST_BLOCK, -(-size // MOST_BLOCKS))

    def block(first: int, query: Array, keys: Array, values: Array, *others: Any) -> Array:
        segments, prefix, window = others
        end = min(first + length, size)
        mask = (jnp.arange(end) <= jnp.arange(first, end)[:, None])[None, None]
        if window is not None:
            mask &= within(window, jnp.arange(first, end), jnp.arange(end))
        if segments is not None:
            mask &= same_segment(segments[..., first:end], segments[..., :end])
        own = query[:, :, first:end], keys[..., :end], values[..., :end, :], mask
        if prefix is None:
            return shared_prefix_attention(*own)
        seen = same_segment(prefix.readers[..., first:end], prefix.groups[:, None])
        if window is not None:
            assert prefix.reader_positions is not None
            assert prefix.positions is not None
            seen &= within(
                window, prefix.reader_positions[..., first:end], prefix.positions[:, None]
            )
        return shared_prefix_attention(*own, prefix.keys, prefix.values, seen)

    if recompute:  # the arrays are sliced inside, so that they are kept once and not once a block
        block = jax.checkpoint(block, static_argnums=0)
    firsts = range(0, max(size, 1), length)  # once even where there are no tokens
    attended = [block(first, query, keys, values, segments, prefix, window) for first in firsts]
    return jnp.concatenate(attended, axis=2)


def same_segment(queries: Array, keys: Array) -> Array:
    """`[..., T]` and `[..., S]` segments of tokens -> bool `[..., T, S]`."""
    return queries[..., :, None] == keys[..., None, :]


def within(window: Array | int, queries: Array, keys: Array) -> Array:
    """`[..., T]` and `[..., S]` positions -> bool `[..., T, S]`: which keys are not too far behind."""
    return queries[..., :, None] - keys[..., None, :] < window


def _attend(
    scores_of: str, values_of: str, query: Array, keys: Array, values: Array, visible: Array
) -> Part:
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum(scores_of, query, keys, preferred_element_type=accumulate)
    # Finite, so that a part of which nothing is visible merges with a weight of 0 and not as NaN.
    least = jnp.finfo(accumulate).min / 2
    scores = jnp.where(visible, scores, least)
    top = jax.lax.stop_gradient(scores.max(axis=-1, initial=least))
    weights = jnp.exp(scores - top[..., None])
    weighted = jnp.einsum(
        values_of, weights.astype(values.dtype), values, preferred_element_type=accumulate
    )
    return Part(weighted, weights.sum(axis=-1), top)


def _merge(one: Part, other: Part) -> Part:
    """Attention over the slots of both; exact, and stable because the larger maximum is taken out."""
    top = jnp.maximum(one.top, other.top)
    first, second = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Part(
        one.weighted * first[..., None] + other.weighted * second[..., None],
        one.total * first + other.total * second,
        top,
    )
