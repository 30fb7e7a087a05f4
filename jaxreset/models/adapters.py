"""The LoRA adapters of a whole decoder: put in, told from the rest, merged, written as a PEFT folder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxreset.disk import new_folder
from jaxreset.models.block import Block, DecoderConfig
from jaxreset.models.decoder import Decoder
from jaxreset.models.huggingface import abstract_decoder, tensor_table, write_json
from jaxreset.models.lora import LoRA
from jaxreset.models.low_rank import AdapterParam
from jaxreset.parallel import fetch, is_leader

Array = jax.Array


def attach(
    params: nnx.State, config: DecoderConfig, lora: LoRA, *, seed: int
) -> tuple[nnx.GraphDef[Decoder], nnx.State, DecoderConfig]:
    """A decoder with adapters that don't change what it computes yet: graph, parameters and config.

    Args:
      params, config: of a decoder without adapters.
      lora: what is put in.
      seed: the same seed draws the same adapters.

    Raises:
      ValueError: the decoder has adapters.
    """
    if config.lora is not None:
        raise ValueError(f"the policy has adapters of rank {config.lora.rank} already; merge them")
    config = dataclasses.replace(config, lora=lora)
    graph, _ = abstract_decoder(config)

    @jax.jit
    def draw(key: Array) -> nnx.State:
        return trained(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))[0]

    return graph, nnx.merge_state(params, draw(jax.random.key(seed))), config


def trained(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Those that training changes and those that stay: adapters and their base, or all and none."""
    adapters, base = nnx.split_state(params, AdapterParam, ...)
    return (adapters, base) if jax.tree.leaves(adapters) else (base, adapters)


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def merge(
    params: nnx.State, *, graph: nnx.GraphDef[Decoder], dtype: str | None = None
) -> nnx.State:
    """Parameters of the decoder without adapters that computes the same: W + alpha / rank · A B.

    The sum is in the adapters' dtype and rounded to `dtype`; None: to that of W.
    """
    decoder = nnx.merge(graph, params)
    for block in decoder.stacks:
        _merge_block(block, dtype)
    return trained(nnx.state(decoder))[1]


def _merge_block(block: Block, dtype: str | None) -> None:
    for name, adapter in block.lora.items():
        matrix: Array = getattr(block, name)[...]
        merged = matrix + adapter.product.reshape(matrix.shape)
        setattr(block, name, nnx.Param(merged.astype(dtype or matrix.dtype)))


def rounding_loss(
    params: nnx.State, config: DecoderConfig, dtype: str, start: nnx.State | None = None
) -> float:
    """What rounding to `dtype` takes from what training changed: norm of its error / norm of the change.

    Args:
      params, config: of the trained decoder.
      dtype: of an export.
      start: parameters before training; not needed with adapters, which are the change.
    """
    flat = dict(nnx.to_flat_state(params))
    errors = updates = 0.0
    if config.lora is not None:
        for name in config.lora.targets:
            a, b = (flat["blocks", "lora", name, part][...] for part in "ab")
            matrix = flat["blocks", name][...]
            error, update = _squares_of_product(matrix, a, b, config.lora.scale, dtype=dtype)
            errors, updates = errors + float(error), updates + float(update)
    for path, before in nnx.to_flat_state(start) if start is not None else ():
        error, update = _squares(before[...], flat[path][...], dtype=dtype)
        errors, updates = errors + float(error), updates + float(update)
    return (errors / updates) ** 0.5 if updates else 0.0


@functools.partial(jax.jit, static_argnames="dtype")
def _squares_of_product(
    matrix: Array, a: Array, b: Array, scale: float, *, dtype: str
) -> tuple[Array, Array]:
    product = jnp.einsum("lir,lr...->li...", a, b) * scale
    return _squares(matrix, matrix + product.reshape(matrix.shape), dtype=dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _squares(before: Array, after: Array, *, dtype: str) -> tuple[Array, Array]:
    """Squared norms of the error of rounding `after`, and of what it has changed."""
    to = jnp.finfo(dtype)
    # Not a cast there and back, which a compiler may leave out.
    rounded = jax.lax.reduce_precision(after, to.nexp, to.nmant)
    return jnp.sum(jnp.square(rounded - after)), jnp.sum(jnp.square(after - before))


def export_adapters(
    path: str | Path, config: DecoderConfig, params: nnx.State, *, base: str
) -> Path:
    """Writes the adapters as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
      path: a folder that does not exist or is empty.
      config, params: of a decoder with adapters.
      base: folder or Hub name of the model that they belong to.

    Returns:
      `path`, absolute.

    Raises:
      FileExistsError: something is at `path`.
      ValueError: the decoder has no adapters.
      RunError: there is no room on the disk, or it can't be written; nothing is left there.
    """
    if (lora := config.lora) is None:
        raise ValueError("the policy has no adapters; export the whole model")
    linear = {tensor.path[-1]: tensor for tensor in tensor_table(config) if len(tensor.path) == 2}
    modules = {name: linear[name].name.removesuffix(".weight") for name in lora.targets}
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(module.rpartition(".")[2] for module in modules.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    flat = dict(nnx.to_flat_state(params))
    tensors = {}
    for name, module in modules.items():
        for part in "ab":
            stacked = fetch(flat["blocks", "lora", name, part][...])
            for layer, matrix in enumerate(stacked.reshape(*stacked.shape[:2], -1)):
                tensor = f"base_model.model.{module.format(layer)}.lora_{part.upper()}.weight"
                tensors[tensor] = np.ascontiguousarray(matrix.T)
    if not is_leader():
        return Path(path).expanduser().absolute()
    with new_folder(path, sum(x.nbytes for x in tensors.values())) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", description)
    return Path(path).expanduser().absolute()
