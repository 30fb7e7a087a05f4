from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import (
    FIXTURES,
    as_olmo3,
    assert_same_params,
    byte_tokenizer,
    edit_config,
    fixture_folder,
    random_policy,
    word_tokenizer,
)
from safetensors.numpy import load_file

from jaxreset.models import huggingface, policy
from jaxreset.models.block import DecoderConfig
from jaxreset.models.config_json import read_config
from jaxreset.models.policy import load_policy, new_policy
from jaxreset.models.rotary import RopeScaling, Yarn
from jaxreset.sampling.rounds import StopRules
from jaxreset.sampling.sampler import Sampler

NAMES = ("llama3", "olmo3", "qwen2", "qwen3")
TOLERANCE = 1e-4
TINY = DecoderConfig(vocab=40, layers=2, width=24, heads=4, kv_heads=2, head_dim=6, mlp=20)
LLAMA3 = RopeScaling(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
)
YARN = Yarn(factor=4.0, original_max_position=64, attention_factor=1.3)
YARN_KEYS = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


# Logits against PyTorch


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_recorded_ones_of_pytorch(tmp_path, name):
    loaded = load_policy(fixture_folder(tmp_path, name))
    reference = np.load(FIXTURES / name / "reference.npz")
    valid = np.arange(reference["tokens"].shape[1]) < reference["lengths"][:, None]
    assert np.ptp(reference["logits"][valid]) > 5  # far from flat
    padding = np.random.default_rng(0).integers(0, 64, valid.shape)
    for tokens in (reference["tokens"], np.where(valid, reference["tokens"], padding)):
        logits = np.asarray(loaded.logits(tokens))
        np.testing.assert_allclose(
            logits[valid], reference["logits"][valid], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("name", NAMES)
def test_config_of_transformers_4_reads_like_that_of_5(tmp_path, name):
    folder = fixture_folder(tmp_path, name)
    expected = read_config(folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    rope = rope.get("full_attention", rope)  # in those with a window, 4 kept it as it was
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    old = {"rope_theta": theta, "torch_dtype": "float32", "rope_parameters": ..., "dtype": ...}
    edit_config(folder, **old, rope_scaling=None if kind == "default" else rope)
    assert read_config(folder) == expected
    assert (expected.rope_scaling == LLAMA3) == (name == "llama3")
    assert (expected.rope_scaling == YARN) == (name == "olmo3")
    if kind != "default":  # as it was before 4.43
        edit_config(folder, rope_scaling={"type": rope.pop("rope_type"), **rope})
        assert read_config(folder) == expected


LIVE = {
    "qwen2": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen2_tied_mqa": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 12},
    "qwen3_tied": {"tie_word_embeddings": True, "head_dim": 6, "num_hidden_layers": 3},
    "llama_untied_wide_heads": {"tie_word_embeddings": False, "head_dim": 16},
    "llama_tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "qwen2_yarn": {"rope_parameters": YARN_KEYS},  # how large the angles' cosines are is inferred
    "qwen3_yarn_scaled": {"rope_parameters": YARN_KEYS | {"mscale": 0.7, "mscale_all_dim": 1.4}},
    "olmo3_without_yarn": {"num_hidden_layers": 5, "sliding_window": 3},
    "olmo3_yarn_in_both": {
        "num_hidden_layers": 5,
        "layer_types": [*["full_attention", "sliding_attention"] * 2, "sliding_attention"],
        "sliding_window": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": YARN_KEYS,
            "sliding_attention": YARN_KEYS | {"rope_theta": 100.0, "factor": 2.0, "beta_fast": 4},
        },
    },
    "olmo3_no_windows": {"layer_types": ["full_attention"] * 2, "head_dim": 12},
}


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_equal_pytorch(tmp_path, name, dtype):
    torch = pytest.importorskip("torch")
    import transformers
    from make_model_fixtures import SIZES, padded_batch, random_model, torch_logits

    sizes = SIZES | {"pad_token_id": None} | LIVE[name]
    config = transformers.AutoConfig.for_model(name.split("_")[0], **sizes)
    model = random_model(config, seed=3, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    word_tokenizer(64).save_pretrained(tmp_path)

    lengths = (40, 9, 2)
    tokens = padded_batch(64, lengths, seed=1)
    valid = tokens > 0
    logits = np.asarray(load_policy(tmp_path).logits(tokens))
    expected = torch_logits(tmp_path, tokens, lengths)
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=TOLERANCE)


# Export


FROM_SCRATCH = {
    "Qwen2ForCausalLM": dataclasses.replace(TINY, qkv_bias=True, rope_theta=1e6),
    "Qwen3ForCausalLM": dataclasses.replace(TINY, qk_norm=True, head_dim=8, norm_eps=1e-5),
    "LlamaForCausalLM": dataclasses.replace(TINY, rope_scaling=LLAMA3, tie_embeddings=False),
    "Olmo3ForCausalLM": as_olmo3(
        dataclasses.replace(TINY, rope_theta=5e5), window=6, rope_scaling=YARN
    ),
}


@pytest.mark.parametrize("architecture", FROM_SCRATCH)
@pytest.mark.parametrize("shard_bytes", [huggingface.SHARD_BYTES, 10_000], ids=["one", "shards"])
def test_what_is_exported_loads_again_bit_for_bit(tmp_path, architecture, shard_bytes):
    ours = random_policy(FROM_SCRATCH[architecture], word_tokenizer(40))
    folder = huggingface.export(
        tmp_path / "new" / "model",
        ours.config,
        ours.params,
        ours.tokenizer,
        eos_ids=(1, 5),
        shard_bytes=shard_bytes,
    )
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert (len(sizes) > 3 and max(sizes) < 12_000) if shard_bytes == 10_000 else len(sizes) == 1
    assert not list(folder.parent.glob("*.partial"))

    again = load_policy(folder)
    assert (again.graph, again.config, again.eos_ids) == (ours.graph, ours.config, (1, 5))
    assert_same_params(again.params, ours.params)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        ours.export(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_survives_a_round_trip(tmp_path, name):
    source = fixture_folder(tmp_path, name)
    dtype = "bfloat16" if name == "qwen3" else "float32"
    before = load_policy(source, dtype=dtype)
    folder = before.export(tmp_path / "export")
    stored, written = (load_file(f / "model.safetensors") for f in (source, folder))
    assert stored.keys() == written.keys()
    for tensor in stored:
        assert stored[tensor].dtype == written[tensor].dtype == dtype
        np.testing.assert_array_equal(stored[tensor], written[tensor])

    assert before.eos_ids == load_policy(folder).eos_ids == ((1, 2) if name == "llama3" else (1,))
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    for key in ("max_position_embeddings", "bos_token_id", "eos_token_id", "architectures"):
        assert old[key] == new[key]
    generation = [json.loads((f / "generation_config.json").read_text()) for f in (source, folder)]
    assert generation[0] == generation[1]


def test_bfloat16_parameters_are_the_rounded_float32_ones(tmp_path):
    folder = fixture_folder(tmp_path, "qwen2")
    wide, narrow = (load_policy(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert_same_params(narrow.params, jax.tree.map(lambda x: x.astype("bfloat16"), wide.params))
    assert narrow.logits([[1, 2, 3]]).dtype == jnp.float32


def test_a_byte_level_tokenizer_and_its_chat_template_survive_export(tmp_path):
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(TINY, vocab=320)  # padded beyond the tokenizer's, as Qwen's
    again = load_policy(random_policy(config, tokenizer).export(tmp_path / "model")).tokenizer
    text = "ten and ten\n\nmake ünïcode"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    chat = [{"role": "user", "content": "ten?"}]
    assert again.apply_chat_template(chat, tokenize=False) == "[user] ten?"
    assert again.eos_token_id == tokenizer.eos_token_id == 0


@pytest.mark.parametrize("architecture", FROM_SCRATCH)
@pytest.mark.parametrize("keys", ["all", "transformers 5", "transformers 4"])
def test_transformers_computes_what_we_exported(tmp_path, architecture, keys):
    torch = pytest.importorskip("torch")
    import transformers
    from make_model_fixtures import padded_batch, torch_logits

    ours = random_policy(FROM_SCRATCH[architecture], word_tokenizer(40), seed=1)
    folder = ours.export(tmp_path / "model")
    if keys == "transformers 4":
        edit_config(folder, dtype=..., rope_parameters=...)
    elif keys == "transformers 5":
        edit_config(folder, torch_dtype=..., rope_theta=..., rope_scaling=...)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(model).__name__ == architecture
    assert model.dtype == torch.float32
    assert not any(report.values())
    lengths = (20, 11)
    tokens = padded_batch(40, lengths, seed=2)
    expected = torch_logits(folder, tokens, lengths)[tokens > 0]
    logits = np.asarray(ours.logits(tokens))[tokens > 0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_what_transformers_cannot_compute_is_not_exported(tmp_path):
    both = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)
    odd = dataclasses.replace(TINY, width=26)
    other = dataclasses.replace(TINY, family="qwen2")
    windows = dataclasses.replace(TINY, window=3, windowed=(True, False))
    for config, message in (
        (both, "no family among llama, .* sets qkv_bias and qk_norm and nothing else"),
        (odd, "width 26 .* heads 4"),
        (other, "no family among qwen2 sets no switch"),
        (windows, "some layers have a window, and this family has none"),
    ):
        with pytest.raises(ValueError, match=message):
            huggingface.export(tmp_path / "model", config, nnx.State({}), word_tokenizer(40))
    assert not list(tmp_path.iterdir())


# Policies


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"new_policy: the tokenizer has 41 ids.*vocabulary 40"):
        new_policy(TINY, word_tokenizer(41), seed=0)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (1,)),
        ([4, 3], 2, (1, 2, 3, 4)),
        (5, [6], (1, 5, 6)),
        (1, 9_999, (1,)),
        ([], -1, (1,)),
    ],
)
def test_eos_ids_come_from_the_folder_and_the_tokenizer(tmp_path, generation, config, expected):
    folder = fixture_folder(tmp_path)
    edit_config(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_policy(folder).eos_ids == expected


def test_texts_leave_out_what_begins_ends_or_pads_them_and_keep_other_special_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</thought>", "<|im_end|>", "<|pad|>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    sizes = dataclasses.replace(TINY, vocab=320)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for eos_ids, shown in (((0,), "<|im_end|>"), ((0, im_end), "")):
        policy = dataclasses.replace(random_policy(sizes, tokenizer), eos_ids=eos_ids)
        tokens = policy.encode("ten</thought> and\n</thought><|im_end|><eos><|pad|><|pad|>")
        assert im_end in tokens
        assert policy.decode(tokens) == f"ten</thought> and\n</thought>{shown}"
        assert policy.decode([319, *tokens[:1]]) == policy.decode(
            tokens[:1]
        )  # an id without a token
        assert policy.decode([]) == ""
        sampler = Sampler.for_policy(policy, StopRules(99), delimiter="</thought>")
        response = policy.encode("ten</thought> and</thought>\n<eos>")
        steps = [policy.decode(response[a:b]) for a, b in sampler.steps(response)]
        assert steps == ["ten</thought>", " and</thought>"]


def test_policies_of_one_config_share_a_compiled_program():
    tokenizer = word_tokenizer(40)
    first, second = (random_policy(TINY, tokenizer, seed=seed) for seed in (0, 1))
    tokens = np.arange(12).reshape(2, 6)
    before = policy._logits._cache_size()
    a, b = first.logits(tokens), second.with_params(first.params, version=8).logits(tokens)
    assert policy._logits._cache_size() == before + 1
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - second.logits(tokens)).max() > 0.1
    np.testing.assert_allclose(first.decoder().logits(jnp.asarray(tokens)), a, atol=1e-5)
    assert (first.version, first.with_params(first.params, version=8).version) == (7, 8)


def test_random_policies_follow_their_seed():
    one, same, other = (new_policy(TINY, word_tokenizer(40), seed=seed) for seed in (3, 3, 4))
    assert_same_params(one.params, same.params)
    assert not np.array_equal(one.decoder().embed[...], other.decoder().embed[...])


def test_a_hub_name_prefers_the_whole_local_copy(tmp_path, monkeypatch):
    whole = fixture_folder(tmp_path)
    part = Path(shutil.copytree(whole, tmp_path / "part"))
    (part / "model.safetensors").unlink()
    copies, calls = {}, []

    def snapshot_download(name, *, local_files_only=False, allow_patterns=None):
        calls.append("local" if local_files_only else "hub")
        if copies[calls[-1]] is None:
            raise FileNotFoundError(f"nothing {calls[-1]}")
        return str(copies[calls[-1]])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for local, hub, expected in (
        (whole, None, ["local"]),
        (part, whole, ["local", "hub"]),
        (None, whole, ["local", "hub"]),
    ):
        copies.update(local=local, hub=hub)
        calls.clear()
        assert load_policy("someone/tiny-model").config.vocab == 64
        assert calls == expected
    copies.update(local=None, hub=None)
    with pytest.raises(FileNotFoundError, match=r"'someone/tiny-model'.*give it: nothing hub"):
        load_policy("someone/tiny-model")
