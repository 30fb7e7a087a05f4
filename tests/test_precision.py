"""A policy that computes in bfloat16 and is trained in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from flax import nnx
from model_helpers import random_policy
from safetensors import safe_open

from jaxreset.learning.update import apply, init_state
from jaxreset.models.decoding_copy import decodes_as_it_is, decoding_copy
from jaxreset.models.precision import widened

CONFIG = dataclasses.replace(TINY, dtype="bfloat16")


@pytest.fixture(scope="module")
def half(tokenizer):
    return random_policy(CONFIG, tokenizer, seed=5)


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def test_updates_too_small_for_bfloat16_add_up(half):
    """One of 1e-3 is nothing to a bfloat16 of 1, sixteen in float32 are 0.016."""
    optimizer = optax.sgd(1e-3)
    state = init_state(jax.tree.map(jnp.ones_like, half.params), optimizer)
    assert dtypes(state) == {"float32"}
    for _ in range(16):
        gradients = jax.tree.map(jnp.ones_like, state.gradients)
        state, _ = apply(state._replace(gradients=gradients), np.float32(1), optimizer=optimizer)
    for param in jax.tree.leaves(state.params):
        np.testing.assert_allclose(1 - param, 0.016, rtol=1e-3)
    one = jnp.ones((), jnp.bfloat16)
    assert one - jnp.bfloat16(1e-3) == one


def test_all_compute_with_the_rounded_parameters(half):
    noise = jax.tree.map(lambda x: 1e-4 * jnp.ones_like(x), widened(half.params))
    trained = jax.tree.map(jnp.add, widened(half.params), noise)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
    tokens = np.arange(12)[None]
    ours, theirs = (half.with_params(p, 8).logits(tokens) for p in (trained, rounded))
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, theirs)
    copy = decoding_copy(trained, graph=half.graph, unstacked=False, mesh=None)
    for one, other in zip(jax.tree.leaves(copy), jax.tree.leaves(rounded), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other)
    assert decodes_as_it_is(rounded, CONFIG, None)
    assert not decodes_as_it_is(trained, CONFIG, None)


def test_a_folder_is_written_in_the_dtype_of_the_model(half, tmp_path):
    trained = half.with_params(widened(half.params), 8)
    file = trained.export(tmp_path / "model") / "model.safetensors"
    with safe_open(file, framework="numpy") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.slow
def test_gradients_of_rounded_parameters_are_wide(half):
    def loss(params: nnx.State) -> jax.Array:
        return half.with_params(params, 8).logits(np.arange(6)[None]).sum()

    assert dtypes(jax.grad(loss)(widened(half.params))) == {"float32"}
