"""LoRA: adapters beside frozen matrices, merged, trained alone, written for peft."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from model_helpers import (
    FIXTURES,
    assert_same_params,
    fixture_folder,
    random_policy,
)
from safetensors.numpy import load_file

from jaxreset.models.adapters import rounding_loss, trained
from jaxreset.models.lora import LINEAR, LoRA
from jaxreset.models.placement import param_shardings
from jaxreset.models.policy import load_policy
from jaxreset.parallel import make_mesh
from jaxreset.sampling.rounds import Stream

TOKENS = np.random.default_rng(0).integers(0, 28, (2, 9))


def changed(policy, *, size=0.3):
    """With adapters as training leaves them: A and B both random."""
    rng = np.random.default_rng(1)
    adapters, base = trained(policy.params)
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype), adapters
    )
    return policy.with_params(nnx.merge_state(adapters, base), policy.version)


def by_hand(policy, lora):
    """The base's parameters with W + alpha / rank · A B written out in numpy, matrix by matrix."""
    flat = dict(nnx.to_flat_state(policy.params))
    base = {path: param for path, param in flat.items() if "lora" not in path}
    for name in lora.targets:
        a, b = (np.asarray(flat["blocks", "lora", name, part][...]) for part in "ab")
        path = "blocks", name
        matrix = np.asarray(base[path][...])
        for layer in range(len(matrix)):
            product = a[layer] @ b[layer].reshape(lora.rank, -1)
            matrix = matrix.copy()
            matrix[layer] += lora.alpha / lora.rank * product.reshape(matrix.shape[1:])
        base[path] = base[path].replace(jnp.asarray(matrix))
    return nnx.from_flat_state(base)


@pytest.mark.parametrize("targets", [LINEAR, ("o", "gate")], ids=len)
def test_adapters_compute_what_their_product_added_to_the_matrix_does(policy64, targets):
    lora = LoRA(3, 6.0, targets)
    fresh = policy64.with_lora(lora.rank, lora.alpha, targets=targets, seed=1)
    np.testing.assert_array_equal(fresh.logits(TOKENS), policy64.logits(TOKENS))
    ours = changed(fresh)
    expected = policy64.with_params(by_hand(ours, lora), 0)
    assert np.abs(ours.logits(TOKENS) - policy64.logits(TOKENS)).max() > 0.5
    np.testing.assert_allclose(ours.logits(TOKENS), expected.logits(TOKENS), atol=1e-11)
    merged = ours.merged()
    assert (merged.graph, merged.config) == (policy64.graph, policy64.config)
    np.testing.assert_allclose(merged.logits(TOKENS), ours.logits(TOKENS), atol=1e-11)


@pytest.mark.slow
def test_adapters_follow_their_seed_and_are_drawn_once(policy32):
    one, same, other = (policy32.with_lora(2, 2.0, seed=seed) for seed in (3, 3, 4))
    assert_same_params(one.params, same.params)
    a, b = (p.params["blocks"]["lora"]["q"]["a"][...] for p in (one, other))
    assert not np.array_equal(a, b)
    assert np.abs(a).max() <= TINY.width**-0.5
    with pytest.raises(ValueError, match="adapters of rank 2 already"):
        one.with_lora(2, 2.0)
    with pytest.raises(ValueError, match=r"no matrices \['kv'\]; there are q, k, v, o"):
        policy32.with_lora(2, 2.0, targets=("kv",))


@pytest.mark.slow
def test_adapters_beside_bfloat16_matrices_are_float32(tokenizer):
    policy = random_policy(dataclasses.replace(TINY, dtype="bfloat16"), tokenizer)
    ours = changed(policy.with_lora(4, 4.0), size=0.01)
    assert {x.dtype for x in jax.tree.leaves(trained(ours.params)[0])} == {jnp.dtype("float32")}
    assert ours.merged().params["blocks"]["q"][...].dtype == jnp.bfloat16
    assert np.abs(ours.logits(TOKENS) - policy.logits(TOKENS)).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [True, False])  # there, adapters are merged for decoding
def test_sampled_logps_are_those_of_the_policy_with_adapters(
    policy64, sampler, monkeypatch, on_cpu
):
    monkeypatch.setattr(sampler._programs, "_on_cpu", on_cpu)
    policy = changed(policy64.with_lora(3, 6.0, seed=1), size=0.1)
    prompts = [np.arange(3, 9), np.arange(4, 14)]
    drawn = sampler.sample(policy, prompts, rows=4, stream=Stream(seed=5))

    tokens = np.zeros((8, 36), np.int32)  # right-padded
    for row, (n, k) in zip(tokens, np.ndindex(2, 4), strict=True):
        whole = np.concatenate([prompts[n], drawn.response(n, k)])
        row[: len(whole)] = whole
    logps = jax.nn.log_softmax(policy.logits(tokens)).reshape(2, 4, *tokens.shape[1:], -1)
    for n, k in np.ndindex(2, 4):
        response, first = drawn.response(n, k), len(prompts[n]) - 1
        expected = logps[n, k, first + np.arange(len(response)), response]
        ours = drawn.behavior_logps[n, k, : len(response)]
        np.testing.assert_allclose(ours, expected, atol=1e-6)  # kept in float32


def test_adapters_lie_on_a_mesh_as_their_matrices_do(policy32):
    params = policy32.with_lora(4, 4.0).params
    mesh = make_mesh(1, 2, 4)
    specs = {
        path[2:]: tuple(p.get_value().spec) if hasattr(p, "get_value") else tuple(p.spec)
        for path, p in nnx.to_flat_state(param_shardings(mesh, params))
        if "lora" in path
    }
    assert specs["q", "a"] == (None, "fsdp")  # whole along the axes that follow
    assert specs["q", "b"] == (None, None, "tensor")
    assert specs["o", "a"] == (None, "tensor")
    assert specs["o", "b"] == (None, None, "fsdp")
    assert specs["down", "a"] == (None, "tensor")
    assert specs["gate", "b"] == (None, None, "tensor")


# Folders


def test_an_export_is_merged(tmp_path, policy32):
    ours = changed(policy32.with_lora(3, 6.0))
    again = load_policy(ours.export(tmp_path / "model"))
    assert again.config == policy32.config
    np.testing.assert_allclose(again.logits(TOKENS), ours.logits(TOKENS), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def narrow(tokenizer):
    """A bfloat16 policy with adapters that have learnt little."""
    policy = random_policy(dataclasses.replace(TINY, dtype="bfloat16"), tokenizer)
    return changed(policy.with_lora(4, 8.0, targets=("q", "o", "down")), size=0.03)


def wide_sums(policy):
    """W and alpha / rank · A B of every matrix with an adapter, in float64."""
    lora, flat = policy.config.lora, dict(nnx.to_flat_state(policy.params))
    for name in lora.targets:
        matrix, a, b = (
            np.asarray(flat[path][...], np.float64)
            for path in (("blocks", name), *(("blocks", "lora", name, part) for part in "ab"))
        )
        product = np.einsum("lir,lr...->li...", a, b).reshape(matrix.shape) * lora.scale
        yield name, matrix, product


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_an_export_is_rounded_once_to_the_dtype_that_it_names(tmp_path, narrow, dtype):
    folder = narrow.export(tmp_path / "model", dtype=dtype)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == (dtype or "bfloat16")
    again = load_policy(folder, dtype="float32")
    assert {str(x.dtype) for x in load_file(folder / "model.safetensors").values()} == {
        dtype or "bfloat16"
    }
    errors = updates = 0.0
    for name, matrix, product in wide_sums(narrow):
        found = np.asarray(again.params["blocks"][name][...], np.float64)
        once = jnp.asarray(matrix + product, jnp.float32).astype(dtype or "bfloat16")
        np.testing.assert_allclose(found, once.astype(jnp.float32), rtol=0, atol=1e-3)
        errors += np.square(found - matrix - product).sum()
        updates += np.square(product).sum()
    loss = rounding_loss(narrow.params, narrow.config, dtype or "bfloat16")
    np.testing.assert_allclose(loss, np.sqrt(errors / updates), rtol=0.02, atol=1e-6)
    expected = {
        None: (0.02, 1),
        "bfloat16": (0.02, 1),
        "float16": (1e-3, 0.1),
        "float32": (0, 1e-5),
    }
    low, high = expected[dtype]
    assert low <= loss <= high


def test_a_float32_export_computes_what_was_trained_in_pytorch(tmp_path, narrow):
    torch = pytest.importorskip("torch")
    import transformers

    base = {name: matrix + product for name, matrix, product in wide_sums(narrow)}
    config = dataclasses.replace(narrow.config, lora=None, dtype="float32")
    exact = random_policy(config, narrow.tokenizer)
    flat = dict(nnx.to_flat_state(narrow.params))
    for path, param in (state := dict(nnx.to_flat_state(exact.params))).items():
        value = base[path[1]] if path[-1] in base else flat[path][...]
        state[path] = param.replace(jnp.asarray(value, jnp.float32))
    exact = exact.with_params(nnx.from_flat_state(state), 0)

    def theirs(dtype):
        folder = narrow.export(tmp_path / dtype, dtype=dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.tensor(TOKENS)).logits.numpy()

    np.testing.assert_allclose(theirs("float32"), exact.logits(TOKENS), rtol=0, atol=1e-5)
    assert np.abs(theirs("bfloat16") - exact.logits(TOKENS)).max() > 1e-3


def test_what_rounding_takes_from_trained_parameters(policy32):
    """All of them in float32, from a start in bfloat16: small changes are lost."""
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy32.params)

    def loss(relative, dtype="bfloat16"):
        params = jax.tree.map(lambda x: x.astype(jnp.float32) * (1 + relative), start)
        return rounding_loss(params, policy32.config, dtype, start)

    assert loss(0.0) == 0.0
    np.testing.assert_allclose(loss(1e-5), 1.0, atol=0.05)  # all is lost
    assert 0.001 < loss(0.3) < 0.02
    assert loss(1e-3, "float32") < 1e-3
    assert loss(1e-3, "float16") < loss(1e-3)


def test_a_dtype_that_cannot_hold_a_weight_is_refused(tmp_path, narrow):
    flat = dict(nnx.to_flat_state(narrow.params))
    flat["embed",] = flat["embed",].replace(flat["embed",][...].at[3, 5].set(7e4))
    large = narrow.with_params(nnx.from_flat_state(flat), 0)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: a weight is larger than float16"):
        large.export(tmp_path / "model", dtype="float16")
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of float32"):
        narrow.export(tmp_path / "model", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_adapters_are_exported_as_peft_names_them(tmp_path):
    """Names and shapes as in a folder that peft wrote."""
    loaded = load_policy(fixture_folder(tmp_path, "qwen2"))
    ours = changed(loaded.with_lora(3, 6.0))
    folder = ours.export_adapters(tmp_path / "adapters", base="some/model")
    written, expected = (
        {name: x.shape for name, x in load_file(f / "adapter_model.safetensors").items()}
        for f in (folder, FIXTURES / "qwen2_lora")
    )
    assert written == expected
    settings, theirs = (
        json.loads((f / "adapter_config.json").read_text())
        for f in (folder, FIXTURES / "qwen2_lora")
    )
    assert settings["base_model_name_or_path"] == "some/model"
    for key in ("r", "lora_alpha", "peft_type", "task_type", "bias", "fan_in_fan_out"):
        assert settings[key] == theirs[key]
    assert {t.rpartition(".")[2] for t in theirs["target_modules"]} == set(
        settings["target_modules"]
    )
    with pytest.raises(ValueError, match="no adapters"):
        loaded.export_adapters(tmp_path / "other", base="some/model")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "olmo3"])
def test_peft_computes_what_we_exported(tmp_path, name):
    torch, peft = (pytest.importorskip(module) for module in ("torch", "peft"))
    import transformers

    base = fixture_folder(tmp_path, name)
    loaded = load_policy(base)
    ours = changed(loaded.with_lora(3, 6.0, targets=("q", "o", "down")))
    folder = ours.export_adapters(tmp_path / "adapters", base=str(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        theirs = tuned(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(theirs - loaded.logits(TOKENS)).max() > 0.1
    np.testing.assert_allclose(ours.logits(TOKENS), theirs, rtol=0, atol=1e-4)
