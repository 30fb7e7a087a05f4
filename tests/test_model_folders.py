"""Folders that `load_policy` refuses: by name, and before anything is computed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from model_helpers import (
    assert_same_params,
    edit_config,
    edit_weights,
    fixture_folder,
    word_tokenizer,
)
from safetensors.numpy import load_file, save_file

from jaxreset.models import reading
from jaxreset.models.policy import load_policy
from jaxreset.parallel import make_mesh
from jaxreset.run.compiles import compiles


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    placed = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "model.safetensors").unlink()


def lose_shard(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()


def truncate_shard(folder):
    shard(folder)
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-1])


def without(file):
    return lambda folder: (folder / file).unlink()


def overwritten(file, text):
    return lambda folder: (folder / file).write_text(text)


def configured(**changes):
    return lambda folder: edit_config(folder, **changes)


def generating(settings):
    return overwritten("generation_config.json", json.dumps(settings))


def mute(eos):
    """No other file names an end of a sequence."""

    def change(folder):
        edit_config(folder, eos_token_id=eos)
        (folder / "generation_config.json").unlink()
        tokenizer = word_tokenizer(60)
        tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)

    return change


def weights(change):
    return lambda folder: edit_weights(folder, change)


def rope(kind, **more):
    return configured(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more})


Q = "model.layers.1.self_attn.q_proj.weight"
LLAMA3_KEYS = {"factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 64}
REFUSED = [
    (shutil.rmtree, "qwen2.*no such folder"),
    (without("config.json"), "config.json does not exist"),
    (overwritten("config.json", "{"), "config.json is not valid JSON"),
    (overwritten("config.json", "[]"), "config.json holds a JSON list"),
    (configured(model_type="mistral"), "model_type 'mistral' is not supported.*Qwen3ForCausalLM"),
    (configured(architectures=["Qwen2ForSequenceClassification"]), "SequenceClassification"),
    (configured(hidden_act="gelu"), "config.json: hidden_act is 'gelu'; only 'silu'"),
    (configured(use_sliding_window=True), "use_sliding_window is True"),
    (configured(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (configured(attention_bias=True), "attention_bias is True"),
    (configured(mlp_bias=True), "mlp_bias is True"),
    (configured(quantization_config={"bits": 4}), "quantization_config"),
    (rope("dynamic", factor=4.0), "rope type 'dynamic' is not supported; only default, llama3 and"),
    (rope("yarn", factor="4"), "factor is '4'; expected a positive number"),
    (rope("yarn", factor=4.0, truncate=False), "truncate is False; only True is supported"),
    (configured(rope_parameters=..., rope_scaling={"type": "linear"}), "rope type 'linear'"),
    (rope("default", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (rope("llama3", **LLAMA3_KEYS), "low_freq_factor is None; expected a positive number"),
    (rope("llama3", **LLAMA3_KEYS, low_freq_factor=1.0), "high_freq_factor 1.0 must exceed"),
    (configured(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'; expected a positive number"),
    (configured(hidden_size=...), "hidden_size is None; expected a positive integer"),
    (configured(num_hidden_layers=0), "num_hidden_layers is 0"),
    (configured(num_hidden_layers=True), "num_hidden_layers is True; expected a positive integer"),
    (
        configured(num_attention_heads="4"),
        "num_attention_heads is '4'; expected a positive integer",
    ),
    (configured(hidden_size=32.0), r"hidden_size is 32\.0; expected a positive integer"),
    (configured(vocab_size=[64]), r"vocab_size is \[64\]; expected a positive integer"),
    *(
        (
            configured(rms_norm_eps=value),
            f"config.json: rms_norm_eps is {value}; expected a positive",
        )
        for value in (float("nan"), float("inf"), -1e-5, 0, 0.0, True)
    ),
    (configured(rms_norm_eps=10**400), "rms_norm_eps is 1000.*; expected a positive number"),
    (rope("llama3", **LLAMA3_KEYS, low_freq_factor=float("nan")), "low_freq_factor is nan"),
    (configured(rope_parameters={"rope_theta": "1e4"}), "rope_theta is '1e4'"),
    (configured(rope_parameters=[1e4]), r"rope_parameters is \[10000.0\]; expected an object"),
    (configured(rope_scaling="llama3"), "rope_scaling is 'llama3'; expected an object"),
    (configured(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; expected true or"),
    (configured(layer_types="full_attention"), "layer_types is 'full_attention'; expected a list"),
    (configured(architectures="Qwen2ForCausalLM"), "architectures is 'Qwen2For.*expected a list"),
    (configured(model_type=["qwen2"]), r"model_type \['qwen2'\] is not supported"),
    *(
        (
            change({"eos_token_id": value}),
            f"{file}: eos_token_id is .*; expected a token id, a list of",
        )
        for value in ("2", ["2"], [[1, 2]], 2.0, True, [1, None], {"id": 2})
        for file, change in (
            ("config.json", lambda changes: configured(**changes)),
            ("generation_config.json", lambda changes: generating(changes)),
        )
    ),
    (mute(64), r"config.json: eos_token_id is 64; expected ids from 0 to 63.*would ever end"),
    (mute([-1]), r"config.json: eos_token_id is \[-1\]; expected ids from 0 to 63"),
    (configured(num_key_value_heads=3), "num_attention_heads 4 .* num_key_value_heads 3"),
    (configured(head_dim=7), "head_dim 7 is odd"),
    (without("model.safetensors"), "neither model.safetensors nor model.safetensors.index.json"),
    (truncate, "model.safetensors is truncated or damaged"),
    (truncate_shard, "b.safetensors is truncated or damaged"),
    (lose_shard, "b.safetensors does not exist, but model.safetensors.index.json lists it"),
    (weights(lambda t: t.pop(Q)), f"asks for tensor {Q}, not in model.safetensors"),
    (
        configured(num_hidden_layers=3, layer_types=...),
        "layers.2.input_layernorm.weight and 11 more, not in",
    ),
    (
        configured(num_hidden_layers=1, layer_types=...),
        "tensor model.layers.1.* and 11 more not part of the model",
    ),
    (configured(tie_word_embeddings=False), "asks for tensor lm_head.weight"),
    (configured(head_dim=4), r"q_proj.weight is \[32, 32\]; config.json asks for \[16, 32\]"),
    (weights(lambda t: t.update({Q: t[Q][:8]})), rf"model.safetensors: tensor {Q} is \[8, 32\]"),
    (weights(lambda t: t.update({Q: t[Q].astype(np.int8)})), f"{Q} is stored as I8; expected"),
    (weights(lambda t: t.update({"lora.a": t[Q]})), "model.safetensors: tensor lora.a not part"),
    (
        weights(lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]})),
        "lm_head.weight differs .* set tie_word_embeddings to false",
    ),
    (without("tokenizer.json"), "holds no tokenizer"),
    (overwritten("tokenizer.json", "{}"), "tokenizer can't be read"),
    (lambda folder: word_tokenizer(70).save_pretrained(folder), "has 70 ids.*vocabulary 64"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_a_damaged_folder_is_refused_by_name_and_before_computing(
    tmp_path, monkeypatch, damage, message
):
    folder = fixture_folder(tmp_path)
    damage(folder)
    monkeypatch.setattr(reading, "place", lambda *_: pytest.fail("read before checking"))
    before = compiles()
    for mesh in (None, make_mesh(1, 4, 2)):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_policy(folder, mesh=mesh)
    assert compiles() == before


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(tmp_path, name, number):
    folder = fixture_folder(tmp_path)

    def spoil(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-3] = number

    edit_weights(folder, spoil)
    for dtype, mesh in (("float32", None), ("bfloat16", make_mesh(1, 4, 2))):
        with pytest.raises(ValueError, match=rf"model.safetensors: tensor {name} holds NaN or inf"):
            load_policy(folder, dtype=dtype, mesh=mesh)


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    folder = fixture_folder(tmp_path)
    edit_weights(folder, lambda t: t.update({Q: t[Q] + np.float32(1e6)}))
    load_policy(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"{Q} holds NaN or infinite numbers \(as float16\)"):
        load_policy(folder, dtype="float16")


def test_impossible_dtypes_are_refused(tmp_path):
    folder = fixture_folder(tmp_path)
    for dtype, message in (("int8", "dtype is 'int8'; expected one of"), ("float64", "ENABLE_X64")):
        with pytest.raises(ValueError, match=message):
            load_policy(folder, dtype=dtype)


def test_harmless_extra_tensors_are_accepted(tmp_path):
    folder = fixture_folder(tmp_path)
    before = load_policy(folder)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_weights(folder, lambda t: t.update(extra))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same_params(load_policy(folder).params, before.params)
