"""A policy: a decoder's parameters, and the tokenizer and end-of-sequence ids that go with them.

    policy = load_policy("Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16")
    policy.logits(tokens)                      # [B, T] -> [B, T, V]
    policy = policy.with_params(params, version=policy.version + 1)
    policy.export("my-model")                  # a folder that transformers loads
    policy = policy.with_lora(rank=64, alpha=64)

It is immutable; training makes a new one at every step, which costs nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxreset.disk import refuse_existing
from jaxreset.models import adapters, huggingface
from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import check_dtype, eos_token_ids, read_config, read_json
from jaxreset.models.decoder import Decoder
from jaxreset.models.encoding import prompt_tokens
from jaxreset.models.lora import LINEAR, LoRA, Target
from jaxreset.models.placement import param_shardings
from jaxreset.models.precision import computing_decoder
from jaxreset.models.reading import weight_files
from jaxreset.parallel import check_sizes
from jaxreset.spelling import silent_ids

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Policy:
    """What samples, and what is trained.

    Attributes:
      graph: structure of the decoder; hashable, equal for equal configs, so a static argument.
      params: the decoder's parameters, those that are trained in float32 at least; see `precision`.
      config: sizes and switches of the decoder.
      tokenizer: a Hugging Face tokenizer with at most `config.vocab` ids.
      eos_ids: ids that end a response, ascending.
      version: optimizer steps behind the parameters.
      metadata: JSON files of the folder that it came from, written back by `export`.
    """

    graph: nnx.GraphDef[Decoder]
    params: nnx.State
    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    version: int = 0
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def decoder(self) -> Decoder:
        """The network as a module."""
        return computing_decoder(self.graph, self.params)

    def logits(self, tokens: ArrayLike) -> jax.Array:
        """`[B, T]` right-padded token ids -> `[B, T, V]` logits, float32 at least; jitted."""
        return _logits(self.graph, self.params, jnp.asarray(tokens))

    @property
    def weights(self) -> tuple[weakref.ReferenceType[Any], ...]:
        """Tells these parameters from any others, without keeping them: references to their arrays."""
        return tuple(weakref.ref(leaf) for leaf in jax.tree.leaves(self.params))

    def encode(self, text: str) -> np.ndarray:
        """A prompt's text -> token ids `[t]` int32 to continue from; see `encoding.prompt_tokens`."""
        return prompt_tokens(self.tokenizer, [text])[0]

    def decode(self, tokens: ArrayLike) -> str:
        """Token ids `[t]` -> text. Left out: `eos_ids`, and what is no text, see `spelling.silent_ids`."""
        ids = np.asarray(tokens)
        written = ids[~np.isin(ids, self._silent)]
        return str(self.tokenizer.decode(written, skip_special_tokens=False))

    @cached_property
    def _silent(self) -> list[int]:
        return sorted({*self.eos_ids, *silent_ids(self.tokenizer)})

    def with_params(self, params: nnx.State, version: int) -> Policy:
        """The same policy with other parameters."""
        return dataclasses.replace(self, params=params, version=version)

    def without_params(self) -> Policy:
        """What is left to encode and decode with, where the parameters live elsewhere."""
        return dataclasses.replace(self, params=nnx.State({}))

    def with_lora(
        self, rank: int, alpha: float, *, targets: Sequence[Target] = LINEAR, seed: int = 0
    ) -> Policy:
        """The same policy with an adapter beside each of these matrices; see `lora.LoRA`.

        Raises:
          ValueError: it has adapters already, or a target has another name.
        """
        lora = LoRA(rank, alpha, tuple(targets))
        graph, params, config = adapters.attach(self.params, self.config, lora, seed=seed)
        return dataclasses.replace(self, graph=graph, params=params, config=config)

    def merged(self) -> Policy:
        """The policy without adapters that computes the same, to rounding; itself if it has none."""
        if self.config.lora is None:
            return self
        config = dataclasses.replace(self.config, lora=None)
        graph, _ = huggingface.abstract_decoder(config)
        params = adapters.merge(self.params, graph=self.graph)
        return dataclasses.replace(self, graph=graph, params=params, config=config)

    def export(self, path: str | Path, *, dtype: str | None = None) -> Path:
        """Writes a folder that `transformers` loads, adapters merged; see `huggingface.export`.

        Args:
          path: a folder that doesn't exist or is empty.
          dtype: that tensors are rounded to and `config.json` names; None: the policy's. What is trained
            is float32 at least, so in "float32" nothing of it is lost; see `adapters.rounding_loss`.

        Raises:
          ValueError: an unknown dtype, and as `huggingface.export`, as other errors.
        """
        dtype = dtype or self.config.dtype
        check_dtype(dtype)
        refuse_existing(path)
        params = self.params
        if self.config.lora is not None:
            params = adapters.merge(params, graph=self.graph, dtype=dtype)
        return huggingface.export(
            path,
            dataclasses.replace(self.config, lora=None, dtype=dtype),
            params,
            self.tokenizer,
            eos_ids=self.eos_ids,
            metadata=self.metadata,
        )

    def export_adapters(self, path: str | Path, *, base: str) -> Path:
        """Writes a folder that `peft` loads upon `base`; see `adapters.export_adapters`."""
        return adapters.export_adapters(path, self.config, self.params, base=base)


# Here and not a method: one compilation serves every policy of the same graph.
@partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef[Decoder], params: nnx.State, tokens: jax.Array) -> jax.Array:
    return computing_decoder(graph, params).logits(tokens)


def load_policy(
    path_or_name: str | Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> Policy:
    """Reads a checkpoint of a family that there is a module of in `families`.

    Args:
      path_or_name: a local folder, or a name on the Hugging Face Hub; its local copy is preferred.
      dtype: of the parameters: "float32", "bfloat16", "float16" or "float64".
      mesh: parameters are read straight to where `param_shardings` puts them on it; None: to the
        default device.

    Raises:
      FileNotFoundError: no such folder or Hub name, or one of its files is missing.
      ValueError: an unsupported model, damaged or non-finite weights, or a tokenizer or
        end-of-sequence ids that don't fit.
    """
    folder = _folder(path_or_name)
    config = read_config(folder, dtype=dtype)
    metadata = huggingface.read_metadata(folder)
    tokenizer = _load_tokenizer(folder)
    _check_tokenizer(tokenizer, config, str(folder))
    eos_ids = _eos_ids(config, tokenizer, metadata, folder)
    if mesh is not None:
        check_sizes(mesh, heads=config.heads, mlp=config.mlp, width=config.width)
    graph, abstract = huggingface.abstract_decoder(config)
    shardings = None if mesh is None else param_shardings(mesh, abstract)
    params = huggingface.load_params(folder, config, shardings)
    return Policy(graph, params, config, tokenizer, eos_ids, metadata=metadata)


def new_policy(config: DecoderConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Policy:
    """A policy with random parameters; the same ones for the same config and seed.

    Raises:
      ValueError: the tokenizer has more ids than `config.vocab`.
    """
    _check_tokenizer(tokenizer, config, "new_policy")
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))
    return Policy(graph, params, config, tokenizer, _eos_ids(config, tokenizer, {}))


def _folder(path_or_name: str | Path) -> Path:
    """The local folder of a path or of a Hub name."""
    folder, name = Path(path_or_name).expanduser(), str(path_or_name)
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"model {name!r}: no such folder")

    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        weight_files(folder)  # another program may have fetched only the tokenizer
        return folder
    except FileNotFoundError:
        pass  # not fetched yet, or not all of it
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model {name!r}: no such folder, and the Hugging Face Hub did not give it: {error}"
        ) from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Without any of its files, transformers makes up a tokenizer with an empty vocabulary.
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's there"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    # AutoTokenizer replaces a generic tokenizer by the one that the model's type usually has.
    generic = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = PreTrainedTokenizerFast if generic else AutoTokenizer
    try:
        return loader.from_pretrained(str(folder), local_files_only=True)
    # The tokenizers library raises bare Exceptions.
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer can't be read: {error}") from error


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: DecoderConfig, source: str
) -> None:
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if size > config.vocab:
        raise ValueError(
            f"{source}: the tokenizer has {size} ids, the model's vocabulary {config.vocab}; "
            "is it another model's tokenizer?"
        )


def _eos_ids(
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    metadata: Mapping[str, Mapping[str, Any]],
    folder: Path = Path(),
) -> tuple[int, ...]:
    """All that the folder calls an end of sequence; ids beyond the vocabulary can't be sampled.

    Raises:
      ValueError: a value that is no id, or ids of which none can be sampled; names file and key.
    """
    own = tokenizer.eos_token_id
    named = {name: eos_token_ids(folder / name, values) for name, values in metadata.items()}
    every = {*(() if own is None else (own,)), *itertools.chain.from_iterable(named.values())}
    ids = tuple(sorted(i for i in every if 0 <= i < config.vocab))
    if every and not ids:
        name = next(name for name, values in named.items() if values)
        raise ValueError(
            f"{folder / name}: eos_token_id is {metadata[name]['eos_token_id']!r}; expected ids from 0 "
            f"to {config.vocab - 1}, the vocabulary: no response would ever end"
        )
    return ids
