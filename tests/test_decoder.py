"""The decoder's ways to compute one thing agree: plain, shared prefix, cached; in float64."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from model_helpers import as_olmo3, random_params

from jaxreset.models.attention import Prefix, causal_attention, shared_prefix_attention
from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import KV
from jaxreset.models.decoding_copy import decoding_copy, unstacked_graph
from jaxreset.models.packing import one_group_each
from jaxreset.models.rotary import RopeScaling
from jaxreset.sampling.prefilling import ChunkShape, plan_chunks, prefill
from jaxreset.sampling.stores import empty, layout_for

WIDE = DecoderConfig(
    vocab=19,
    layers=2,
    width=12,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp=10,
    rope_theta=100.0,
    rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16),
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=False,
    dtype="float64",
)
CONFIGS = {"wide": WIDE, "windows": as_olmo3(WIDE, window=3)}
SHAPES = [(2, 3, 5, 4), (3, 1, 1, 2), (1, 2, 0, 3)]  # groups, rows, prefix slots, row slots
# Compiling takes most of the time here.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shared_hidden(graph, params, prefix, lengths, rows):
    packing = one_group_each(lengths, prefix, rows)
    return nnx.merge(graph, params).suffix_hidden(prefix, rows, packing)


def plain_hidden(graph, params, sequences, lengths, rows):
    """Each row as a sequence of its own, then cut to its own slots: [N, K, S, E]."""
    n, k, s = rows.shape
    hidden = nnx.merge(graph, params).hidden(sequences)
    slots = jnp.repeat(lengths, k)[:, None] + jnp.arange(s)
    return jnp.take_along_axis(hidden, slots[..., None], axis=1).reshape(n, k, s, -1)


def prefilled(graph, params, prefix, lengths, *, chunk):
    """Their keys and values, computed `chunk` tokens of two prefixes at a time."""
    n, p = prefix.shape
    like = layout_for(WIDE, stacked=len(nnx.merge(graph, params).stacks) == 1)
    store = empty(jnp.float32(0), like=like, groups=n, rows=None, size=p)
    if p == 0:
        return store
    shape = ChunkShape(n * p, min(n, 2), min(chunk, p))
    chunks = plan_chunks(range(n), [(0, end) for end in lengths], shape, groups=n, prefix=p)
    return prefill(params, store, prefix, chunks, graph=graph, size=shape.tokens)


def decode(graph, params, tokens, slots, prefix, lengths, cache):
    return nnx.merge(graph, params).decode(tokens, slots, prefix, lengths, cache)


jitted_shared, jitted_plain, jitted_decode = (
    quick_jit(function, static_argnums=0) for function in (shared_hidden, plain_hidden, decode)
)


def random_groups(shape, seed):
    """Prefixes, rows with junk as padding, which slots count, and each row as one sequence."""
    n, k, p, s = shape
    rng = np.random.default_rng(seed)
    prefix, rows = rng.integers(0, WIDE.vocab, (n, p)), rng.integers(0, WIDE.vocab, (n, k, s))
    lengths = rng.integers(0, p + 1, n)
    valid = np.arange(s) < rng.integers(1, s + 1, (n, k))[..., None]
    sequences = rng.integers(0, WIDE.vocab, (n, k, p + s))
    for i, length in enumerate(lengths):
        sequences[i, :, :length] = prefix[i, :length]
        sequences[i, :, length : length + s] = rows[i]
    return prefix, lengths, rows, valid, sequences.reshape(n * k, p + s)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_shared_prefix_gives_the_hidden_states_of_plain_sequences(name, shape, seed):
    with jax.enable_x64(True):
        graph, params = random_params(CONFIGS[name], seed=5)
        prefix, lengths, rows, valid, sequences = random_groups(shape, seed)
        shared = jitted_shared(graph, params, prefix, lengths, rows)
        plain = jitted_plain(graph, params, sequences, lengths, rows)
        assert shared.dtype == jnp.float64
        np.testing.assert_allclose(shared[valid], plain[valid], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), stacked=st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_decoding_with_a_cache_gives_the_hidden_states_of_the_update(name, shape, seed, stacked):
    n, k, p, s = shape
    with jax.enable_x64(True):
        graph, params = random_params(CONFIGS[name], seed=5)
        prefix, lengths, rows, _, _ = random_groups(shape, seed)
        expected = jitted_shared(graph, params, prefix, lengths, rows)
        if not stacked:
            params = decoding_copy(params, graph=graph, unstacked=True, mesh=None)
            graph = unstacked_graph(CONFIGS[name])
        rng = np.random.default_rng(seed)
        # What lies beyond a prefix, or beyond a row's slot, is junk that nobody may see.
        beyond = (np.arange(p) >= lengths[:, None])[None, :, None]  # [1, N, 1, P]
        shared = tuple(
            KV(
                jnp.where(beyond[..., None, :], 9.0, keys),
                jnp.where(beyond[..., None], 9.0, values),
            )
            for keys, values in prefilled(graph, params, prefix, lengths, chunk=1 + seed % 3)
        )
        assert len(shared) == (1 if stacked else WIDE.layers)

        def junk(*shape):
            return jnp.asarray(rng.normal(size=(WIDE.layers // len(shared), n, k, 2, *shape)))

        cache = tuple(KV(junk(WIDE.head_dim, s), junk(s, WIDE.head_dim)) for _ in shared)
        # Rows start late by different delays: meanwhile, and when done, they feed a slot again.
        delays = rng.integers(0, 3, (n, k))
        for step in range(s + 2):
            slots = np.clip(step - delays, 0, s - 1)
            at = (*np.indices((n, k)), slots)
            hidden, cache = jitted_decode(graph, params, rows[at], slots, shared, lengths, cache)
            np.testing.assert_allclose(hidden, expected[at], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "remats"),
    [
        ("wide", SHAPES[0], (False, True)),
        ("wide", SHAPES[2], (False,)),
        ("windows", SHAPES[0], (False, True)),
    ],
)
def test_gradient_through_a_shared_prefix_equals_the_unshared_one(name, shape, remats):
    with jax.enable_x64(True):
        graph, params = random_params(CONFIGS[name], seed=5)
        prefix, lengths, rows, valid, sequences = random_groups(shape, seed=11)
        weights = np.random.default_rng(1).normal(size=(*rows.shape, WIDE.vocab))

        def loss(hidden, decoder):
            return jnp.where(valid[..., None], weights * (hidden @ decoder.head), 0).sum()

        def shared(params, remat):
            decoder, packing = nnx.merge(graph, params), one_group_each(lengths, prefix, rows)
            return loss(decoder.suffix_hidden(prefix, rows, packing, remat=remat), decoder)

        def unshared(params):
            decoder = nnx.merge(graph, params)
            return loss(plain_hidden(graph, params, sequences, lengths, rows), decoder)

        expected = jax.tree.leaves(quick_jit(jax.grad(unshared))(params))
        for remat in remats:
            gradient = quick_jit(jax.grad(shared), static_argnums=1)(params, remat)
            for ours, plain in zip(jax.tree.leaves(gradient), expected, strict=True):
                scale = np.abs(plain).max()
                assert scale > 0
                np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-9 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alone", "recompute"), [(True, False), (False, False), (False, True)], ids=str
)
@pytest.mark.parametrize(
    ("size", "window"), [(1, None), (128, None), (129, 7), (300, None), (300, 140), (1100, None)]
)
def test_causal_attention_in_blocks_equals_that_in_one(size, window, alone, recompute):
    """`alone`: of lanes of one segment, without a prefix."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(size)
        n, lanes, heads, kv_heads, width, slots = 2, 2, 4, 2, 8, 9
        query = jnp.asarray(rng.normal(size=(n, lanes, size, heads, width)))
        keys = jnp.asarray(rng.normal(size=(n, lanes, kv_heads, width, size)))
        values = jnp.asarray(rng.normal(size=(n, lanes, kv_heads, size, width)))
        prefix_keys = jnp.asarray(rng.normal(size=(n, kv_heads, width, slots)))
        prefix_values = jnp.asarray(rng.normal(size=(n, kv_heads, slots, width)))
        weights = jnp.asarray(rng.normal(size=query.shape))
        segments = np.sort(rng.integers(0, 3, (n, lanes, size)))
        groups, readers = np.sort(rng.integers(0, 3, (n, slots))), segments
        # Of slots in their prefix, and of tokens behind it.
        positions = np.broadcast_to(np.arange(slots), groups.shape)
        reader_positions = np.broadcast_to(np.arange(size), segments.shape) + slots

        def blocks(query, keys, values, *shared):
            if alone:
                return causal_attention(query, keys, values, window=window)
            prefix = Prefix(*shared, groups, readers, positions, reader_positions)
            options = {"window": window, "recompute": recompute}
            return causal_attention(query, keys, values, segments, prefix, **options)

        def plain(query, keys, values, *shared):
            mask = np.tril(np.ones((size, size), bool))
            mask &= ~np.tril(mask, -(window or size))
            if alone:
                return shared_prefix_attention(query, keys, values, mask[None, None])
            mask = mask & (segments[..., :, None] == segments[..., None, :])
            seen = readers[..., :, None] == groups[:, None, None]
            far = reader_positions[..., :, None] >= positions[:, None, None] + (
                window or 2 * size + 9
            )
            seen = seen & ~far
            return shared_prefix_attention(query, keys, values, mask, *shared, seen)

        def with_gradients(attention):
            def loss(*args):
                return (attention(*args) * weights).sum()

            arguments = query, keys, values, prefix_keys, prefix_values
            return jax.jit(jax.value_and_grad(loss, range(5)))(*arguments)

        ours, theirs = with_gradients(blocks), with_gradients(plain)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), ours, theirs)
