"""Layers with a window, norms behind the blocks and angles of two kinds: OLMo 3 from folder to folder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from model_helpers import (
    as_olmo3,
    edit_config,
    fixture_folder,
    random_params,
    random_policy,
    word_tokenizer,
)
from test_decoder import quick_jit
from test_sampling import (
    CUTS,
    all_rows,
    assert_rounds_equal,
    random_prompts,
    random_snapshots,
    teacher_forced,
)

from jaxreset.models.activations import prefill_bytes, update_bytes
from jaxreset.models.adapters import trained
from jaxreset.models.config_json import read_config
from jaxreset.models.families import named, names
from jaxreset.models.flops import prefill_flops, update_flops
from jaxreset.models.huggingface import abstract_decoder
from jaxreset.models.packing import Packing
from jaxreset.models.placement import param_shardings
from jaxreset.models.policy import load_policy
from jaxreset.models.rotary import Rope, Yarn
from jaxreset.models.sizes import known_sizes
from jaxreset.parallel import make_mesh
from jaxreset.sampling.rounds import Shape, StopRules, Stream
from jaxreset.sampling.sampler import Sampler

WINDOW = 5
OLMO3 = as_olmo3(dataclasses.replace(TINY, layers=3, dtype="float64"), window=WINDOW)
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture(scope="module")
def olmo3(tokenizer):
    with jax.enable_x64(True):
        policy = random_policy(OLMO3, tokenizer, seed=3)
        return policy.with_params(jax.device_put(policy.params, jax.devices()[0]), policy.version)


@pytest.fixture(autouse=True)
def wide_numbers():
    with jax.enable_x64(True):
        yield


# Windows


@pytest.mark.parametrize("layers", [1, 3])
def test_a_token_sees_as_many_as_its_windows_reach(layers):
    """Through L layers with a window of W, a token tells of the L (W - 1) before it, and of no other."""
    config = dataclasses.replace(OLMO3, layers=layers, windowed=(True,) * layers)
    graph, params = random_params(config)
    tokens = jnp.arange(20)[None]  # all different, so that each has an embedding of its own

    def last(params):
        return nnx.merge(graph, params).hidden(tokens)[0, -1].sum()

    slopes = jax.jit(jax.grad(last))(params)["embed"][...][:20]
    seen = np.abs(slopes).max(axis=-1) > 0
    reach = layers * (WINDOW - 1)
    np.testing.assert_array_equal(seen, np.arange(20) >= 19 - reach)


def test_windows_and_angles_matter_beyond_a_window_only(olmo3):
    tokens = np.random.default_rng(1).integers(0, 28, (2, 30))
    ours = np.asarray(olmo3.logits(tokens))
    for changes, from_first in (
        ({"windowed": (), "window": None}, False),
        ({"window_rope": Rope(TINY.rope_theta, OLMO3.rope_scaling)}, True),
        ({"rope_scaling": None}, True),
    ):
        config = dataclasses.replace(OLMO3, **changes)
        if not config.windowed:  # all layers then rotate as those with a window did
            config = dataclasses.replace(config, window_rope=None)
        other = nnx.merge(abstract_decoder(config)[0], olmo3.params).logits(jnp.asarray(tokens))
        differs = np.abs(ours - other).max(axis=(0, 2)) > 1e-9
        assert differs[WINDOW:].all()
        assert differs[1] or not from_first


PACKED = Packing(
    # Two groups in one bin, and one in another.
    prefix_groups=np.array([[1] * 7 + [2] * 4 + [0], [3] * 9 + [0] * 3]),
    prefix_positions=np.array([[*range(7), *range(4), 0], [*range(9), 0, 0, 0]]),
    groups=np.array([[[1] * 8 + [2] * 3, [2] * 9 + [0] * 2], [[3] * 6 + [3] * 5, [0] * 11]]),
    suffixes=np.array([[[1] * 8 + [2] * 3, [3] * 9 + [0] * 2], [[4] * 6 + [5] * 5, [0] * 11]]),
    positions=np.array(
        [
            [[*range(7, 15), *range(4, 7)], [*range(4, 13), 0, 0]],
            [[*range(9, 15), *range(9, 14)], [0] * 11],
        ]
    ),
)


@pytest.mark.slow
def test_packed_groups_equal_their_rows_alone_with_gradients():
    """Prefixes and suffixes longer than the window; several of them in a bin and in a lane."""
    graph, params = random_params(OLMO3, seed=5)
    rng = np.random.default_rng(2)
    prefix, rows = (rng.integers(0, 28, x.shape) for x in (PACKED.prefix_groups, PACKED.groups))
    weights = rng.normal(size=(*rows.shape, OLMO3.vocab))

    def packed(params, remat):
        decoder = nnx.merge(graph, params)
        hidden = decoder.suffix_hidden(prefix, rows, PACKED, remat=remat)
        return jnp.where(
            (PACKED.suffixes > 0)[..., None], hidden @ decoder.head * weights, 0
        ).sum(), hidden

    sequences = []  # of each suffix: its tokens behind its prefix's, and which slots they are of
    for suffix in range(1, 6):
        at = np.nonzero(PACKED.suffixes == suffix)
        group = PACKED.groups[at][0]
        sequences.append((np.concatenate([prefix[PACKED.prefix_groups == group], rows[at]]), at))
    whole = np.zeros((5, max(len(tokens) for tokens, _ in sequences)), int)
    for row, (tokens, _) in zip(whole, sequences, strict=True):
        row[: len(tokens)] = tokens

    def alone(params):
        decoder = nnx.merge(graph, params)
        hidden = decoder.hidden(jnp.asarray(whole))
        own = [
            hidden[n, len(tokens) - len(at[0]) : len(tokens)]
            for n, (tokens, at) in enumerate(sequences)
        ]
        weighted = [
            (o @ decoder.head * weights[at]).sum()
            for o, (_, at) in zip(own, sequences, strict=True)
        ]
        return sum(weighted), own

    (_, own), theirs = quick_jit(jax.value_and_grad(alone, has_aux=True))(params)
    with_gradients = quick_jit(jax.value_and_grad(packed, has_aux=True), static_argnums=1)
    for remat in (False, True):
        (_, hidden), ours = with_gradients(params, remat)
        for (_, at), expected in zip(sequences, own, strict=True):
            np.testing.assert_allclose(hidden[at], expected, rtol=0, atol=1e-11)
        for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            scale = np.abs(other).max()
            assert scale > 0
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * scale)


# Sampling


@pytest.mark.slow
def test_a_greedy_resume_equals_a_fresh_prompt(olmo3, sampler):
    base = sampler.sample(olmo3, random_prompts(), rows=4, stream=Stream(1))
    snapshots = random_snapshots(base, CUTS, seed=2)
    assert max(s.length for s in snapshots) > 4 * WINDOW
    resumed = sampler.resume(olmo3, snapshots, rows=1, stream=Stream(0), temperature=0)
    kept = [s.length - int(s.round.prompt_lengths[s.group]) for s in snapshots]
    prompts = [s.tokens for s in snapshots]
    fresh = sampler.sample(olmo3, prompts, kept=kept, rows=1, stream=Stream(0), temperature=0)
    assert_rounds_equal(resumed, fresh, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [True, False])  # there each layer is a stack of its own
def test_sampled_logps_are_those_of_one_causal_pass(olmo3, sampler, monkeypatch, on_cpu):
    monkeypatch.setattr(sampler._programs, "_on_cpu", on_cpu)
    draw = {"temperature": 0.7, "top_p": 0.9}
    base = sampler.sample(olmo3, random_prompts(), rows=4, stream=Stream(5), **draw)
    resumed = sampler.resume(
        olmo3, random_snapshots(base, CUTS, seed=6), rows=1, stream=Stream(7), **draw
    )
    for round_ in (base, resumed):
        forced = teacher_forced(olmo3, round_, temperature=0.7)
        for (group, row), logps in zip(all_rows(round_), forced, strict=True):
            tokens = round_.suffix(group, row)
            behavior = round_.behavior_logps[group, row, : len(tokens)]
            expected = logps[np.arange(len(tokens)), tokens]
            np.testing.assert_allclose(behavior, expected, rtol=0, atol=1e-6)  # kept in float32


def test_a_question_behind_a_snapshot_equals_one_prompt(olmo3, sampler, automaton):
    questions = [np.arange(3, 3 + size) for size in (1, 8, 2, 7)]
    asked = Shape(4, 2, 44, 10)
    rules = {"eos_ids": (1,), "question_tokens": 8}
    asks = Sampler(
        automaton,
        StopRules(max_response=10),
        shapes=[asked],
        forks=[(sampler.shapes[0], asked)],
        **rules,
    )
    base = sampler.sample(olmo3, random_prompts(), rows=4, stream=Stream(1))
    snapshots = random_snapshots(base, 4, seed=2)
    draw = {"rows": 2, "stream": Stream(3), "temperature": 0.7}
    answers = asks.resume(olmo3, snapshots, questions=questions, **draw)
    whole = [np.concatenate([s.tokens, q]) for s, q in zip(snapshots, questions, strict=True)]
    ids = [int(base.ids[s.group]) for s in snapshots]
    assert_rounds_equal(answers, asks.sample(olmo3, whole, ids=ids, **draw), atol=1e-6)


# Adapters, folders and sizes


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_adapters_are_merged_into_what_transformers_loads(tmp_path, sizes):
    pytest.importorskip("torch")
    from make_model_fixtures import padded_batch, torch_logits

    config = dataclasses.replace(
        OLMO3, dtype="float32", vocab=40, rope_theta=5e5, window_rope=Rope(5e5)
    )
    policy = random_policy(config, word_tokenizer(40)).with_lora(3, 6.0, seed=1)
    rng = np.random.default_rng(1)
    adapters, base = trained(policy.params)
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapters
    )
    params = nnx.merge_state(adapters, base)
    if sizes is not None:
        params = jax.device_put(params, param_shardings(make_mesh(*sizes), params))
    policy = policy.with_params(params, 0)
    tokens = padded_batch(40, (40, 11), seed=2)
    ours, valid = np.asarray(policy.logits(tokens)), tokens > 0
    folder = policy.export(tmp_path / "model")
    np.testing.assert_allclose(
        ours[valid], torch_logits(folder, tokens, (40, 11))[valid], rtol=0, atol=2e-4
    )
    again = load_policy(folder)
    assert (again.config, again.config.family) == (config, "olmo3")
    np.testing.assert_allclose(ours[valid], again.logits(tokens)[valid], rtol=0, atol=1e-4)


def rope(full, sliding=None):
    return {"rope_parameters": {FULL: full, SLIDING: sliding or {"rope_type": "default"}}}


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = [
    ({"layer_types": [SLIDING] * 3}, "layer_types has 3 entries; .* num_hidden_layers 4"),
    ({"layer_types": [FULL, "chunked", FULL, FULL]}, "layer_types holds 'chunked'; expected"),
    ({"layer_types": SLIDING}, "layer_types is 'sliding_attention'; expected a list"),
    ({"sliding_window": ...}, "sliding_window is None; expected a positive integer"),
    ({"sliding_window": 0}, "sliding_window is 0; expected a positive integer"),
    ({"sliding_window": 8.0}, r"sliding_window is 8\.0; expected a positive integer"),
    (rope({"rope_type": "longrope"}), "rope type 'longrope' is not supported; only default, ll"),
    (rope({}, {"rope_type": "dynamic"}), "rope type 'dynamic' is not supported"),
    (rope({"rope_type": "yarn"}), "factor is None; expected a positive number"),
    (rope(YARN | {"attention_factor": -1}), "attention_factor is -1; expected a positive"),
    (rope(YARN | {"beta_fast": "32"}), "beta_fast is '32'; expected a positive number"),
    (rope({"rope_theta": 0}), "rope_theta is 0; expected a positive number"),
    (rope(5e5), r"full_attention is 500000\.0; expected an object"),
    ({"rope_parameters": YARN}, "rope_parameters has neither full_attention nor sliding_att"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"model_type": "olmo2"}, "architectures .*, model_type 'olmo2' is not .*Olmo3ForCausalLM"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_we_do_not_compute_is_refused_by_file_and_key(tmp_path, changes, message):
    folder = fixture_folder(tmp_path, "olmo3")
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load_policy(folder)


def test_what_a_folder_leaves_out_is_as_in_transformers(tmp_path):
    folder = fixture_folder(tmp_path, "olmo3")
    edit_config(
        folder,
        layer_types=...,
        rms_norm_eps=...,
        rope_parameters=...,
        num_key_value_heads=...,
        num_hidden_layers=9,
        max_position_embeddings=512,
        rope_scaling={"rope_type": "yarn", "factor": 8.0},
    )
    config = read_config(folder)
    assert config.windowed == (True, True, True, False) * 2 + (True,)
    assert (config.window, config.kv_heads, config.norm_eps) == (8, 4, 1e-5)
    assert (config.rope_theta, config.window_rope) == (5e5, Rope(5e5))
    assert config.rope_scaling == Yarn(8.0, 512, pytest.approx(1.2079441541679836))
    edit_config(folder, layer_types=[FULL] * 9, sliding_window=None)
    config = read_config(folder)
    assert (config.window, config.windowed, config.window_rope) == (None, (), None)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("allenai/Olmo-3-1025-7B", 7.298),
        ("allenai/Olmo-3-7B-Instruct", 7.298),
        ("allenai/Olmo-3-7B-Think", 7.298),
        ("allenai/Olmo-3-32B-Think", 32.234),
    ],
)
def test_sizes_make_as_many_parameters_as_published(name, billions):
    config = known_sizes(name, dtype="bfloat16")
    leaves = jax.tree.leaves(abstract_decoder(config)[1])
    assert sum(x.size for x in leaves) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert config.windowed[:4] == (True, True, True, False)
    assert config.windowed.count(False) == config.layers // 4
    # Two operations a parameter of a matrix and token, embeddings and scores left out.
    matrices = sum(x.size for x in leaves) - 2 * config.vocab * config.width
    assert prefill_flops(config, 1) == pytest.approx(2 * matrices, rel=1e-3)
    assert update_flops(config, 100, 4, 50, remat=True) > 0
    assert update_bytes(config, 1, 100, 4, 50, remat=True) > prefill_bytes(config, 100, 100) > 0


# Families


def test_a_family_is_one_file(tmp_path, monkeypatch):
    """What another one needs is a module in the folder: it reads, exports, and is listed."""
    from jaxreset.models import families

    source = named("qwen2").__file__
    with open(source, encoding="utf-8") as file:
        text = file.read()
    text = text.replace("Qwen2ForCausalLM", "OtherForCausalLM").replace(
        "TENSORS: Mapping[str, str] = {}", 'TENSORS = {"q": "attention.query.weight"}'
    )
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "other.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "more")])
    assert names() == ["llama", "olmo3", "other", "qwen2", "qwen3"]
    config = dataclasses.replace(TINY, vocab=40, family="other")
    ours = random_policy(config, word_tokenizer(40))
    folder = ours.export(tmp_path / "model")
    assert read_config(folder).family == "other"
    tokens = np.arange(10)[None]
    np.testing.assert_array_equal(load_policy(folder).logits(tokens), ours.logits(tokens))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model_type 'other' is not supported"):
        load_policy(folder)


@pytest.mark.parametrize("name", names())
def test_a_family_defines_what_it_must(name):
    family = named(name)
    assert family.ARCHITECTURE.endswith("ForCausalLM")
    for model, config in family.SIZES.items():
        assert (config.family, config.dtype) == (name, "float32")
        assert known_sizes(model, dtype="bfloat16") == dataclasses.replace(config, dtype="bfloat16")
        written = family.write(config)
        assert {"rope_parameters", "max_position_embeddings"} <= written.keys()
