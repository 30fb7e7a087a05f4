"""Hugging Face folders: read a checkpoint into stacked parameters, write one `transformers` loads.

    config.json        ◀──▶  DecoderConfig
    model.safetensors  ◀──▶  nnx.State        (or several shards and their index)

One table, `tensor_table`, says which tensors of a folder hold which parameter; reading and writing
both follow it. What a folder can get wrong is refused by the name of its file and tensor, from JSON
and from the shards' headers, before a tensor is read or anything is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxreset.disk import new_folder
from jaxreset.json_text import dumps
from jaxreset.models import config_json, reading
from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import read_json
from jaxreset.models.decoder import Decoder
from jaxreset.models.families import family_of, named
from jaxreset.models.reading import INDEX, WEIGHTS, Stored
from jaxreset.parallel import fetch, is_leader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION = config_json.FILE, "generation_config.json"
SHARD_BYTES = 4 << 30
# What a folder's config.json says besides the decoder's sizes, and an export of it says again.
KEPT = ("max_position_embeddings", "bos_token_id", "pad_token_id")
# Parameters of a block and their tensors, where a family doesn't name them otherwise.
TENSORS = {
    "attention_norm.scale": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm.scale": "self_attn.q_norm.weight",
    "k_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


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
    """Every parameter of a decoder and the tensors that hold it.

    Raises:
      ValueError: no family has such parameters.
    """
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table = [Tensor(("embed",), "model.embed_tokens.weight", (c.vocab, c.width))]

    names = {**TENSORS, **named(family_of(config)).TENSORS}

    def block(path: str, *shape: int, transposed: bool = False) -> None:
        name = f"model.layers.{{}}.{names[path]}"
        table.append(Tensor(("blocks", *path.split(".")), name, shape, transposed))

    block("attention_norm.scale", c.width)
    block("q", queries, c.width, transposed=True)
    block("k", keys, c.width, transposed=True)
    block("v", keys, c.width, transposed=True)
    block("o", c.width, queries, transposed=True)
    if c.qkv_bias:
        block("q_bias", queries)
        block("k_bias", keys)
        block("v_bias", keys)
    if c.qk_norm or c.joint_qk_norm:
        block("q_norm.scale", queries if c.joint_qk_norm else c.head_dim)
        block("k_norm.scale", keys if c.joint_qk_norm else c.head_dim)
    block("mlp_norm.scale", c.width)
    block("gate", c.mlp, c.width, transposed=True)
    block("up", c.mlp, c.width, transposed=True)
    block("down", c.width, c.mlp, transposed=True)
    table.append(Tensor(("norm", "scale"), "model.norm.weight", (c.width,)))
    if not c.tie_embeddings:
        table.append(Tensor(("output",), "lm_head.weight", (c.vocab, c.width), transposed=True))
    return table


def abstract_decoder(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Graph and parameter shapes of a decoder; nothing is allocated or drawn."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graph, state


# Reading


def load_params(
    path: str | Path, config: DecoderConfig, shardings: nnx.State | None = None
) -> nnx.State:
    """Parameters of a folder, stacked over layers, in `config.dtype`.

    Each device's part of a parameter is read on its own: the host holds one part and the pages of
    one tensor at a time, and a process reads only what its own devices hold.

    Args:
      path: a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.
      config: as `read_config` gives it.
      shardings: of each parameter, a tree like the result; None: all on the default device.

    Raises:
      FileNotFoundError: no weights, or a shard of the index is not there.
      ValueError: a truncated file; a missing, unknown, misshapen or non-float tensor; one that
        holds NaN or an infinity.
    """
    config_json.check_dtype(config.dtype)
    folder = Path(path)
    stored = reading.stored_tensors(folder)
    table = tensor_table(config)
    _check_tensors(folder, stored, table, config)

    flat = dict(nnx.to_flat_state(abstract_decoder(config)[1]))
    where = {} if shardings is None else dict(nnx.to_flat_state(shardings))
    # The largest first, while most memory is free.
    for tensor in sorted(table, key=lambda tensor: math.prod(tensor.shape), reverse=True):
        param = flat[tensor.path]
        sources = {name: stored[name] for name in tensor.names(config.layers)}
        sharding = where[tensor.path].get_value() if where else None
        read = partial(_read, tensor, sources, param.shape, param.dtype)
        flat[tensor.path] = param.replace(reading.place(param.shape, read, sharding))
    return nnx.from_flat_state(flat)


def _read(
    tensor: Tensor,
    sources: Mapping[str, Stored],
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: reading.Index,
) -> np.ndarray:
    """The part at `index` of a parameter of that shape, from the tensors that hold its layers.

    Raises:
      ValueError: NaN or an infinity in it; names file and tensor.
    """
    tensors = list(sources.items())
    part = np.empty([len(range(n)[axis]) for n, axis in zip(shape, index, strict=True)], dtype)
    slots = part[None]
    if "{}" in tensor.name:
        tensors, shape, index, slots = tensors[index[0]], shape[1:], index[1:], part
    for slot, (name, source) in zip(slots, tensors, strict=True):
        whole = source.view()
        # Splitting an axis into heads copies nothing, so only what the index takes is read.
        with np.errstate(over="ignore"):  # what the dtype can't hold becomes infinite
            slot[...] = (whole.T if tensor.transposed else whole).reshape(shape)[index]
        if not reading.all_finite(slot):
            raise ValueError(
                f"{source.file}: tensor {name} holds NaN or infinite numbers (as {part.dtype}); the "
                "checkpoint is damaged, or its training had diverged"
            )
    return part


def read_metadata(path: str | Path) -> dict[str, dict[str, Any]]:
    """`config.json` and, if any, `generation_config.json`: what is kept of them is written back."""
    files = [Path(path) / name for name in (CONFIG, GENERATION)]
    return {file.name: read_json(file) for file in files if file.name == CONFIG or file.is_file()}


def _check_tensors(
    folder: Path, stored: Mapping[str, Stored], table: Sequence[Tensor], config: DecoderConfig
) -> None:
    """Refuses a folder whose tensors are not those of the table, in name, shape or kind."""
    expected = {name: tensor.shape for tensor in table for name in tensor.names(config.layers)}
    if missing := [name for name in expected if name not in stored]:
        files = ", ".join(sorted({tensor.file.name for tensor in stored.values()}))
        raise ValueError(f"{folder}: {CONFIG} asks for {_some(missing)}, not in {files}")
    for name, shape in expected.items():
        file, dtype, found, _ = stored[name]
        if found != shape:
            raise ValueError(
                f"{file}: tensor {name} is {list(found)}; {CONFIG} asks for {list(shape)}"
            )
        if dtype not in reading.STORED_DTYPES:
            raise ValueError(
                f"{file}: tensor {name} is stored as {dtype}; expected one of "
                f"{', '.join(reading.STORED_DTYPES)}"
            )
    # Older Llama checkpoints store the rotary frequencies, which follow from the config.
    extra = sorted(stored.keys() - expected.keys())
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    embed, head = table[0].name, "lm_head.weight"
    if config.tie_embeddings and head in extra:
        extra.remove(head)
        if not reading.equal(stored[head], stored[embed]):
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

    Of several processes, which all call it, one writes.

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
      ValueError: no architecture of `transformers` computes this config, or float16 can't hold a weight.
      RunError: there is no room on the disk, or it can't be written; nothing is left there.
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

    if not is_leader():
        for _ in _stored_arrays(config, params):  # each process has a part of every array
            pass
        return Path(path).expanduser().absolute()
    with new_folder(path, bytes_of(config)) as folder:
        _write_weights(folder, config, params, shard_bytes)
        tokenizer.save_pretrained(str(folder))
        write_json(folder / CONFIG, description)
        if GENERATION in metadata:
            write_json(folder / GENERATION, metadata[GENERATION])
    return Path(path).expanduser().absolute()


def bytes_of(config: DecoderConfig) -> int:
    """Bytes of all tensors of a folder."""
    itemsize = jnp.dtype(config.dtype).itemsize
    return sum(
        math.prod(tensor.shape) * itemsize * len(tensor.names(config.layers))
        for tensor in tensor_table(config)
    )


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
        if config.dtype == "float16" and not np.isfinite(array).all():
            raise ValueError(
                f"{tensor.name}: a weight is larger than float16 can hold; choose bfloat16 or float32"
            )
        slots = array if "{}" in tensor.name else array[None]
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        for slot, name in zip(slots, tensor.names(config.layers), strict=True):
            target = slot.reshape(shape)
            yield name, np.ascontiguousarray(target.T if tensor.transposed else target)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes it as Hugging Face does."""
    file.write_text(dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
