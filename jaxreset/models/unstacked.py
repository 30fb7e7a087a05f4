"""The decoder as a CPU wants it when it decodes: each layer in a stack of its own."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import Decoder


@functools.cache
def unstacked_graph(config: DecoderConfig) -> nnx.GraphDef[Decoder]:
    """Structure of an unstacked decoder of these sizes."""

    def make() -> Decoder:
        decoder = Decoder(config, rngs=nnx.Rngs(0))
        decoder.unstack()
        return decoder

    return nnx.split(nnx.eval_shape(make))[0]


@functools.partial(jax.jit, static_argnames="graph")
def unstack(params: nnx.State, *, graph: nnx.GraphDef[Decoder]) -> nnx.State:
    """Parameters of a stacked decoder -> those of the unstacked one."""
    decoder = nnx.merge(graph, params)
    decoder.unstack()
    return nnx.state(decoder)
