"""A policy's parameters as decoding wants them: in the dtype of computing, laid out for reading them whole.

A decoding step reads every parameter, so on a mesh they are gathered along `fsdp` once for all steps. On a
CPU each layer has a stack of its own, since slicing a stack there is a copy at every token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxreset.models.adapters import merge, trained
from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import Decoder
from jaxreset.models.huggingface import abstract_decoder
from jaxreset.models.placement import decode_shardings
from jaxreset.models.precision import computing_decoder
from jaxreset.parallel.compiling import run

Layout = tuple[nnx.GraphDef[Decoder], nnx.State]


def decoding_layout(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    config: DecoderConfig,
    mesh: Mesh | None,
    *,
    on_cpu: bool,
    run: Callable[..., Any] = run,
) -> Layout:
    """The policy as it decodes: graph and parameters; the same arrays where a copy would be no other.

    Args:
      graph, params, config: of the stacked decoder.
      mesh: that the result lies on, see `placement.decode_shardings`; None: one device.
      on_cpu: whether the devices are a machine's cores.
      run: calls a jitted function, or does so in shapes alone; see `parallel.compiling`.
    """
    if not on_cpu:
        if decodes_as_it_is(params, config, mesh):
            return graph, params
        return graph, run(decoding_copy, params, graph=graph, unstacked=False, mesh=mesh)
    # Adapters cost time at every token, but merged in bfloat16 they would be rounded away.
    if config.lora is not None and jnp.finfo(config.dtype).bits >= 32:
        params = run(merge, params, graph=graph)
        config = dataclasses.replace(config, lora=None)
        graph, _ = abstract_decoder(config)
    copy = run(decoding_copy, params, graph=graph, unstacked=True, mesh=mesh)
    return unstacked_graph(config), copy


@functools.partial(jax.jit, static_argnames=("graph", "unstacked", "mesh"))
def decoding_copy(
    params: nnx.State, *, graph: nnx.GraphDef[Decoder], unstacked: bool, mesh: Mesh | None
) -> nnx.State:
    """Parameters of a stacked decoder -> those that decode.

    Args:
      params, graph: of the stacked decoder.
      unstacked: give each layer a stack of its own; `unstacked_graph` is theirs then.
      mesh: that the result lies on, see `placement.decode_shardings`; None: one device.
    """
    decoder = computing_decoder(graph, params)
    if unstacked:
        decoder.unstack()
    params = nnx.state(decoder)
    if mesh is None:
        return params
    return jax.lax.with_sharding_constraint(params, decode_shardings(mesh, params))


def decodes_as_it_is(params: nnx.State, config: DecoderConfig, mesh: Mesh | None) -> bool:
    """Whether a copy, stacked as they are, would be the parameters themselves."""
    changing, frozen = trained(params)
    base = changing if config.lora is None else frozen  # adapters are cast where they are used
    cast = any(x.dtype != config.dtype for x in jax.tree.leaves(base))
    if cast or mesh is None:
        return not cast
    places = zip(
        jax.tree.leaves(params), jax.tree.leaves(decode_shardings(mesh, params)), strict=True
    )
    return all(x.sharding.is_equivalent_to(place, x.ndim) for x, place in places)


@functools.cache
def unstacked_graph(config: DecoderConfig) -> nnx.GraphDef[Decoder]:
    """Structure of an unstacked decoder of these sizes."""

    def make() -> Decoder:
        decoder = Decoder(config, rngs=nnx.Rngs(0))
        decoder.unstack()
        return decoder

    return nnx.split(nnx.eval_shape(make))[0]
