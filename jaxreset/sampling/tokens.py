"""Drawing one token a row inside jit: random numbers named by the row, temperature, top-k, top-p."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxreset.sampling.truncation import in_blocks, least_kept

Array = jax.Array
Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit


class Draws(NamedTuple):
    """How tokens are drawn; scalars, traced, so that changing one compiles nothing.

    temperature: 0 takes the most likely token.
    top_p: in (0, 1]; 1 keeps all.  top_k: 0 keeps all.  max_new: tokens per row in this call.
    seed, step, phase: see `rounds.Stream`.
    """

    temperature: Leaf
    top_p: Leaf
    top_k: Leaf
    max_new: Leaf
    seed: Leaf
    step: Leaf
    phase: Leaf


def row_uniforms(
    draws: Draws, ids: Array, numbers: Array, positions: Array, dtype: jnp.dtype
) -> Array:
    """Random numbers in [0, 1) named by prompt, row and position, whatever the batch; two a token.

    Args:
      draws: seed, step and phase.
      ids: `[M]` int, of the prompts.
      numbers: `[M, K]` int, of the rows.
      positions: `[M, K, B]` int, in the response.

    Returns:
      `[M, K, B, 2]`.
    """
    key = jax.random.key(draws.seed)
    names = draws.step, ids[:, None, None], draws.phase, numbers[..., None], positions
    every = jnp.stack([jnp.broadcast_to(name, positions.shape).ravel() for name in names])

    def fold(keys: Array, names: Array) -> tuple[Array, None]:
        return jax.vmap(jax.random.fold_in)(keys, names), None

    # A loop and not one call a name: compiling the generator takes as long as compiling a layer.
    keys, _ = jax.lax.scan(fold, jnp.broadcast_to(key, every.shape[1:]), every.astype(jnp.uint32))
    uniforms = jax.vmap(partial(jax.random.uniform, shape=(2,), dtype=dtype))(keys)
    return uniforms.reshape(*positions.shape, 2)


def draw_token(logits: Array, uniforms: Array, draws: Draws) -> tuple[Array, Array, Array]:
    """Draws one token a row.

    Args:
      logits: `[N, K, V]` float32.
      uniforms: `[N, K, 2]` the rows' random numbers, in [0, 1).

    Returns:
      `[N, K]` int32 tokens, their log-softmax(logits / T), and the same after top-k and top-p. For a
      temperature of 0, the most likely token, and its log-probabilities at temperature 1.
    """
    greedy = draws.temperature <= 0
    scaled = logits / jnp.where(greedy, 1, draws.temperature)
    logps = jax.nn.log_softmax(scaled, axis=-1)
    probabilities = jnp.exp(logps)

    def cut() -> tuple[Array, Array]:
        return least_kept(probabilities, draws.top_k, draws.top_p)

    def uncut() -> tuple[Array, Array]:
        whole = jnp.ones(logps.shape[:-1], logps.dtype)
        return jnp.zeros_like(whole), whole

    least, mass = jax.lax.cond((draws.top_k > 0) | (draws.top_p < 1), cut, uncut)

    def drawn() -> Array:
        kept = jnp.where(probabilities >= least[..., None], probabilities, 0)
        return invert_cdf(kept, uniforms)

    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
    logp = jnp.take_along_axis(logps, token[..., None], axis=-1)[..., 0]
    return token, logp, logp - jnp.log(mass)


def draw_token_apart(
    mesh: Mesh, logits: Array, uniforms: Array, draws: Draws
) -> tuple[Array, Array, Array]:
    """`draw_token` where the vocabulary is split over tensor: each device draws whole rows, some of them.

    One exchange, where sorting rows of which each device has a part would take many. Where `tensor` divides
    neither groups nor rows, each device draws all of them. Inside `shard_map` over the data axes.
    """
    parts = mesh.shape["tensor"]
    if logits.shape[-1] % parts:  # the vocabulary isn't split
        return draw_token(logits, uniforms, draws)
    axis = next((axis for axis in (0, 1) if logits.shape[axis] % parts == 0), None)

    def on_device(logits: Array, uniforms: Array, draws: Draws) -> tuple[Array, Array, Array]:
        if axis is None:
            whole = jax.lax.all_gather(logits, "tensor", axis=2, tiled=True)
            return draw_token(whole, uniforms, draws)
        rows = jax.lax.all_to_all(logits, "tensor", split_axis=axis, concat_axis=2, tiled=True)
        count = rows.shape[axis]
        first = jax.lax.axis_index("tensor") * count
        uniforms = jax.lax.dynamic_slice_in_dim(uniforms, first, count, axis)
        drawn = draw_token(rows, uniforms, draws)
        return jax.lax.all_gather(drawn, "tensor", axis=axis, tiled=True)

    everywhere = PartitionSpec()
    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(None, None, "tensor"), everywhere, everywhere),
        out_specs=everywhere,
        axis_names={"tensor"},
        check_vma=False,
    )(logits, uniforms, draws)


def invert_cdf(weights: Array, uniforms: Array) -> Array:
    """Indices drawn with probabilities proportional to `weights`.

    Two numbers a row, where the Gumbel trick takes one for each token: the first picks a block of
    tokens, the second a token in it. Both cumulative sums are short, so rounding doesn't pile up.

    Args:
      weights: `[..., V]`, not all 0.
      uniforms: `[..., 2]` in [0, 1).
    """
    size = weights.shape[-1]
    block = math.isqrt(size - 1) + 1
    blocks = in_blocks(weights, block)

    def pick(weights: Array, uniform: Array) -> Array:
        sums = jnp.cumsum(weights, axis=-1)
        total = sums[..., -1]
        # Below the total even when the product is rounded up: an index of weight 0 is never drawn.
        target = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
        return (sums <= target[..., None]).sum(axis=-1)

    which = pick(blocks.sum(axis=-1), uniforms[..., 0])
    chosen = jnp.take_along_axis(blocks, which[..., None, None], axis=-2)[..., 0, :]
    return which * block + pick(chosen, uniforms[..., 1])
