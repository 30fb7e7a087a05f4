"""Which numbers are kept in which precision, and the casts between them.

    parameters of a policy, keys and values, matrix products, hidden states      `model.dtype`
    parameters that are trained, their gradients, the optimizer's moments        float32 at least
    norms, rotary angles, attention scores and softmax                           float32 at least
    logits, log-probabilities, advantages, losses                                float32 at least

Matrix products of bfloat16 are summed in float32. What is trained is every parameter, or only adapters;
an update computes with a copy of it in `model.dtype`, and so does sampling, so both are one policy. In
bfloat16 itself an update smaller than 1/256 of a parameter would be rounded away.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreset.models.decoder import Decoder
from jaxreset.models.low_rank import AdapterParam

Tree = TypeVar("Tree")


def widened(tree: Tree) -> Tree:
    """Arrays in float32 at least, those that are already as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def computing_decoder(graph: nnx.GraphDef[Decoder], *params: nnx.State) -> Decoder:
    """The decoder with its parameters in the dtype that it computes in; adapters cast their own."""
    dtype = nnx.merge(graph, *params).config.dtype

    def cast(state: nnx.State) -> nnx.State:
        adapters, others = nnx.split_state(state, AdapterParam, ...)
        return nnx.merge_state(adapters, jax.tree.map(lambda x: x.astype(dtype), others))

    return nnx.merge(graph, *map(cast, params))
