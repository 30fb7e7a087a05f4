"""Hugging Face folders: read a checkpoint into stacked parameters, write one `transformers` loads.

    config.json        ◀──▶  DecoderConfig
    model.safetensors  ◀──▶  nnx.State        (or several shards and their index)

One table, `tensor_table`, says which tensors of a folder hold which parameter; reading and writing
both follow it. What a folder can get wrong is refused by the name of its file and tensor, from JSON
and from the shards' headers, before a tensor is read or anything is compiled.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxreset.models import config_json
from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import read_config, read_json
from jaxreset.models.decoder import Decoder
from jaxreset.parallel import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION = config_json.FILE, "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
STORED_DTYPES = ("F32", "BF16", "F16", "F64")
# What a folder's config.json says besides the decoder's sizes, and an export of it says again.
KEPT = ("max_position_embeddings", "bos_token_id", "pad_token_id")

__all__ = [
    "abstract_decoder",
    "export",
    "load_params",
    "new_folder",
    "read_config",
    "read_metadata",
    "tensor_table",
    "weight_files",
    "write_json",
]

# Parameters and tensors


class Tensor(NamedTuple):
    """Where a parameter lives in a folder.

    `path` leads to our parameter in the `nnx.State`; `name` and `shape` are the tensor's in the
    folder. A name with "{}" stands for one tensor a layer, which we stack. `transposed`: a linear
    layer's matrix, [outputs, inputs] in the folder and [inputs, outputs] here.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    def names(self, layers: int) -> list[str]:
        return [self.name.format(i) for i in range(layers)] if "{}" in self.name else [self.name]


def tensor_table(config: DecoderConfig) -> list[Tensor]:
    """Every parameter of a decoder and the tensors that hold it."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table = [Tensor(("embed",), "model.embed_tokens.weight", (c.vocab, c.width))]

    def block(path: str, name: str, *shape: int, transposed: bool = False) -> None:
        name = f"model.layers.{{}}.{name}"
        table.append(Tensor(("blocks", *path.split(".")), name, shape, transposed))

    block("attention_norm.scale", "input_layernorm.weight", c.width)
    block("q", "self_attn.q_proj.weight", queries, c.width, transposed=True)
    block("k", "self_attn.k_proj.weight", keys, c.width, transposed=True)
    block("v", "self_attn.v_proj.weight", keys, c.width, transposed=True)
    block("o", "self_attn.o_proj.weight", c.width, queries, transposed=True)
    if c.qkv_bias:
        block("q_bias", "self_attn.q_proj.bias", queries)
        block("k_bias", "self_attn.k_proj.bias", keys)
        block("v_bias", "self_attn.v_proj.bias", keys)
    if c.qk_norm:
        block("q_norm.scale", "self_attn.q_norm.weight", c.head_dim)
        block("k_norm.scale", "self_attn.k_norm.weight", c.head_dim)
    block("mlp_norm.scale", "post_attention_layernorm.weight", c.width)
    block("gate", "mlp.gate_proj.weight", c.mlp, c.width, transposed=True)
    block("up", "mlp.up_proj.weight", c.mlp, c.width, transposed=True)
    block("down", "mlp.down_proj.weight", c.width, c.mlp, transposed=True)
    table.append(Tensor(("norm", "scale"), "model.norm.weight", (c.width,)))
    if not c.tie_embeddings:
        table.append(Tensor(("output",), "lm_head.weight", (c.vocab, c.width), transposed=True))
    return table


def abstract_decoder(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Graph and parameter shapes of a decoder; nothing is allocated or drawn."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graph, state


# Reading


def load_params(path: str | Path, config: DecoderConfig) -> nnx.State:
    """Parameters of a folder, stacked over layers, in `config.dtype`.

    Tensors are read one by one: at most one stacked parameter is on the host besides the result.

    Args:
      path: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.
      config: as `read_config` gives it.

    Raises:
      FileNotFoundError: no weights, or a shard of the index is not there.
      ValueError: a truncated file; a missing, unknown, misshapen or non-float tensor.
    """
    config_json.check_dtype(config.dtype)
    folder = Path(path)
    stored = _open_tensors(folder)
    table = tensor_table(config)
    _check_tensors(folder, stored, table, config)

    flat = dict(nnx.to_flat_state(abstract_decoder(config)[1]))
    for tensor in table:
        param = flat[tensor.path]
        array = np.empty(param.shape, param.dtype)
        slots = array if "{}" in tensor.name else array[None]
        for slot, name in zip(slots, tensor.names(config.layers), strict=True):
            source = stored[name].reader.get_tensor(name)
            slot[...] = (source.T if tensor.transposed else source).reshape(slot.shape)
        flat[tensor.path] = param.replace(jnp.asarray(array))
    return nnx.from_flat_state(flat)


def read_metadata(path: str | Path) -> dict[str, dict[str, Any]]:
    """`config.json` and, if any, `generation_config.json`: what is kept of them is written back."""
    files = [Path(path) / name for name in (CONFIG, GENERATION)]
    return {file.name: read_json(file) for file in files if file.name == CONFIG or file.is_file()}


class _Stored(NamedTuple):
    """A tensor in an open safetensors file, of which only the header has been read."""

    file: Path
    reader: Any  # safetensors.safe_open


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
      FileNotFoundError: it has none, or lacks a shard of its index.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file():  # first, as in transformers, whatever an index says
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model as safetensors"
        )
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{folder / INDEX}: weight_map is {placed!r}; expected tensors and files")
    files = [folder / name for name in sorted(set(placed.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but {INDEX} lists it; copy it there")
    return files


def _open_tensors(folder: Path) -> dict[str, _Stored]:
    """All tensors of a folder by name."""
    stored: dict[str, _Stored] = {}
    for file in weight_files(folder):
        try:
            reader = safe_open(file, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); copy it again") from error
        stored |= dict.fromkeys(reader.keys(), _Stored(file, reader))
    return stored


def _check_tensors(
    folder: Path, stored: Mapping[str, _Stored], table: Sequence[Tensor], config: DecoderConfig
) -> None:
    """Refuses a folder whose tensors are not those of the table, in name, shape or kind."""
    expected = {name: tensor.shape for tensor in table for name in tensor.names(config.layers)}
    if missing := [name for name in expected if name not in stored]:
        files = ", ".join(sorted({tensor.file.name for tensor in stored.values()}))
        raise ValueError(f"{folder}: {CONFIG} asks for {_some(missing)}, not in {files}")
    for name, shape in expected.items():
        file, reader = stored[name]
        found = tuple(reader.get_slice(name).get_shape())
        if found != shape:
            raise ValueError(
                f"{file}: tensor {name} is {list(found)}; {CONFIG} asks for {list(shape)}"
            )
        if (dtype := reader.get_slice(name).get_dtype()) not in STORED_DTYPES:
            raise ValueError(
                f"{file}: tensor {name} is stored as {dtype}; expected one of "
                f"{', '.join(STORED_DTYPES)}"
            )
    # Older Llama checkpoints store the rotary frequencies, which follow from the config.
    extra = sorted(stored.keys() - expected.keys())
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    embed, head = table[0].name, "lm_head.weight"
    if config.tie_embeddings and head in extra:
        extra.remove(head)
        if not np.array_equal(*(stored[name].reader.get_tensor(name) for name in (head, embed))):
            raise ValueError(
                f"{stored[head].file}: tensor {head} differs from {embed}, but {CONFIG} ties them; "
                "set tie_word_embeddings to false"
            )
    if extra:
        raise ValueError(f"{stored[extra[0]].file}: {_some(extra)} not part of the model")


def _some(names: Sequence[str]) -> str:
    return f"tensor {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# Writing


def export(
    path: str | Path,
    config: DecoderConfig,
    params: nnx.State,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: Sequence[int] = (),
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Args:
      path: a folder that does not exist or is empty; see `new_folder`.
      config, params: the decoder's; tensors are stored in `config.dtype`.
      tokenizer: saved with the weights.
      eos_ids: the tokens that end a response.
      metadata: as `read_metadata` gives it: maximum length, special tokens, generation settings.
      shard_bytes: weights larger than this are split over several files.

    Returns:
      `path`, absolute.

    Raises:
      FileExistsError: something is at `path`.
      ValueError: no architecture of `transformers` computes this config.
    """
    metadata = metadata or {}
    source = metadata.get(CONFIG, {})
    description = {
        **config_json.config_json(config),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        **{key: source[key] for key in KEPT if key in source},
    }

    with new_folder(path) as folder:
        _write_weights(folder, config, params, shard_bytes)
        tokenizer.save_pretrained(str(folder))
        write_json(folder / CONFIG, description)
        if GENERATION in metadata:
            write_json(folder / GENERATION, metadata[GENERATION])
    return Path(path).expanduser().absolute()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write to, which stands beside `path` and in the end becomes it: whole or not at all.

    Raises:
      FileExistsError: something is at `path`.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another name")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():
        path.rmdir()
    partial.rename(path)


def _write_weights(folder: Path, config: DecoderConfig, params: nnx.State, limit: int) -> None:
    itemsize = jnp.dtype(config.dtype).itemsize
    shards: list[dict[str, int]] = [{}]
    for tensor in tensor_table(config):
        size = math.prod(tensor.shape) * itemsize
        for name in tensor.names(config.layers):
            if shards[-1] and sum(shards[-1].values()) + size > limit:
                shards.append({})
            shards[-1][name] = size

    arrays = _stored_arrays(config, params)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        placed |= dict.fromkeys(shard, file)
        save_file(dict(islice(arrays, len(shard))), folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(size for shard in shards for size in shard.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _stored_arrays(config: DecoderConfig, params: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name and contents in the folder's layout, in the order of the table."""
    flat = dict(nnx.to_flat_state(params))
    for tensor in tensor_table(config):
        array = fetch(flat[tensor.path][...].astype(config.dtype))
        slots = array if "{}" in tensor.name else array[None]
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        for slot, name in zip(slots, tensor.names(config.layers), strict=True):
            target = slot.reshape(shape)
            yield name, np.ascontiguousarray(target.T if tensor.transposed else target)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes it as Hugging Face does."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
