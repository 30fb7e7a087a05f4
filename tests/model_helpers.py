"""Small tokenizers, random parameters and checkpoint folders for the tests of models."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxreset.models import huggingface
from jaxreset.models.policy import Policy
from jaxreset.models.rotary import Rope, Yarn

FIXTURES = Path(__file__).parent / "fixtures"


def word_tokenizer(size):
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(size - 3))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def byte_tokenizer():
    """Byte-level BPE with a chat template, as Qwen's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(["ten and ten and a ten\nmake thirty\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    return tokenizer


def as_olmo3(config, *, window, **changes):
    """A config of these sizes as OLMo 3 has it: a window in the even layers, YaRN in the others."""
    fields = {
        "qkv_bias": False,
        "qk_norm": False,
        "joint_qk_norm": True,
        "post_norm": True,
        "window": window,
        "windowed": tuple(layer % 2 == 0 for layer in range(config.layers)),
        "rope_scaling": Yarn(4.0, 64, attention_factor=1.2),
        "window_rope": Rope(config.rope_theta),
        "tie_embeddings": False,
        "family": "olmo3",
    }
    return dataclasses.replace(config, **fields | changes)


def random_params(config, *, seed=0):
    """Graph and parameters, norm scales and biases as random as the rest; nothing to compile."""
    graph, abstract = huggingface.abstract_decoder(config)
    rng = np.random.default_rng(seed)
    flat = {
        path: param.replace(
            jnp.asarray((path[-1] == "scale") + 0.3 * rng.normal(size=param.shape), param.dtype)
        )
        for path, param in nnx.to_flat_state(abstract)
    }
    return graph, nnx.from_flat_state(flat)


def random_policy(config, tokenizer, *, seed=0):
    graph, params = random_params(config, seed=seed)
    return Policy(graph, params, config, tokenizer, eos_ids=(1,), version=7)


def assert_same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def fixture_folder(tmp_path, name="qwen2"):
    """A copy of a fixture with a tokenizer: a whole checkpoint, to be broken."""
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    word_tokenizer(60).save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_weights(folder, change):
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
