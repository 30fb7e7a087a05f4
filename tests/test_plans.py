"""Plans: what they refuse, what they add up, and what they read from programs compiled for a TPU slice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from jaxreset import cli
from jaxreset.config_file import load_config, parse_config
from jaxreset.errors import ConfigError
from jaxreset.models import flops
from jaxreset.models.block import DecoderConfig
from jaxreset.models.huggingface import abstract_decoder
from jaxreset.models.lora import LoRA
from jaxreset.models.sizes import known_sizes, model_sizes
from jaxreset.parallel import hidden_sharding, make_mesh
from jaxreset.parallel.collectives import collectives
from jaxreset.parallel.topology import Slice, refusal, slice_of
from jaxreset.planning import ahead, caches, footprint
from jaxreset.planning.advice import advise
from jaxreset.planning.footprint import (
    Phase,
    check_room,
    decode_sizes,
    estimated,
    make_case,
    phases,
)
from jaxreset.planning.plans import plan
from jaxreset.planning.programs import Program
from jaxreset.sampling import schedule

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))
GIB = 2**30
SMALL = """
    model.fresh.layers=1 model.fresh.width=32 model.fresh.heads=4 model.fresh.mlp=48
    sampling.max_prompt_tokens=8 sampling.max_response_tokens=16 sampling.max_step_tokens=8
    train.prompts_per_step=8 train.microbatch_tokens=100 eval.batch=8
    reset.localizer.max_question_tokens=16 warm_start.steps=0
"""


def small_config(*overrides):
    return load_config(CONFIGS / "quickstart.yaml", [*SMALL.split(), *overrides])


def slice_in(memory, count=8):
    """The test's simulated devices, of so much memory."""
    return Slice(f"cpu:{count}", "cpu", jax.devices()[:count], memory)


# Refusals


@pytest.mark.parametrize(
    ("topology", "overrides", "message"),
    [
        ("v5e", [], "topology 'v5e': expected a kind and a layout, such as v5e:16x16"),
        ("gpu:8", [], "topology 'gpu:8'"),
        ("cpu:0", [], "topology 'cpu:0'"),
        ("cpu:64", [], "jax started with 8 CPU devices; ask in a new process"),
        (
            "cpu:8",
            ["mesh.data=2", "mesh.tensor=2"],
            r"mesh.data 2 × mesh.fsdp 1 × mesh.tensor 2 = 4, but there are 8 devices",
        ),
        (
            "cpu:8",
            ["train.prompts_per_step=12"],
            r"train.prompts_per_step 12 is not divisible by mesh.data 8 × mesh.fsdp 1 = 8 shards",
        ),
        ("cpu:8", ["mesh.tensor=8"], "mesh.tensor 8 does not divide the model's 4 attention heads"),
        ("cpu:8", ["model.path=/no/such"], "model '/no/such': no such folder"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_compiled(topology, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan(small_config(*overrides), topology, say=lambda text: pytest.fail(text))


def test_a_tpu_is_planned_for_with_its_compiler_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxreset\[tpu\]'"):
        plan(small_config(), "v5e:2x2")


def test_a_topology_that_no_machine_has_is_refused_by_the_compiler():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match=r"topology 'v5e:3x5'"):
        slice_of("v5e:3x5")


@pytest.mark.parametrize(
    ("name", "gib"), [("v5e:2x2", 15.75), ("v5p:2x2x1", 95.7), ("v6e:2x2", 31.2)]
)
def test_the_memory_of_a_chip_is_what_its_compiler_grants(name, gib):
    pytest.importorskip("libtpu")
    there = slice_of(name)
    assert len(there.devices) == 4
    assert there.memory / GIB == pytest.approx(gib, abs=0.1)


def test_a_refusal_is_read_for_its_numbers():
    words = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (16.97G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert refusal(words) == (int(16.97 * GIB), int(15.75 * GIB))
    assert refusal("RESOURCE_EXHAUSTED: something else") == (None, None)


# Sizes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen/Qwen2.5-1.5B", 1.544),
        ("Qwen/Qwen2.5-3B", 3.086),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen2.5-14B-Instruct", 14.770),
        ("Qwen/Qwen2.5-32B-Instruct", 32.764),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-1.7B", 1.721),
        ("Qwen/Qwen3-4B", 4.022),
        ("Qwen/Qwen3-8B-Base", 8.191),
        ("Qwen/Qwen3-14B", 14.768),
        ("Qwen/Qwen3-32B", 32.762),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.030),
        ("meta-llama/Llama-3.2-1B", 1.236),
        ("meta-llama/Llama-3.2-3B", 3.213),
    ],
)
def test_sizes_that_we_know_make_as_many_parameters_as_published(name, billions):
    sizes = known_sizes(name, dtype="bfloat16")
    leaves = jax.tree.leaves(abstract_decoder(sizes)[1])
    assert sum(x.size for x in leaves) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert all(x.dtype == "bfloat16" for x in leaves)


def test_other_sizes_come_from_a_folder_or_the_hub(tmp_path):
    fixture = Path(__file__).parent / "fixtures" / "qwen3"
    assert model_sizes(str(fixture), dtype="float32").qk_norm
    for name in ("Qwen/Qwen2.5-13B", "Other/Qwen2.5-14B"):
        assert known_sizes(name, dtype="float32") is None
        with pytest.raises(FileNotFoundError, match="the Hugging Face Hub did not give"):
            model_sizes(name, dtype="float32")


# Arithmetic


@pytest.fixture
def no_process(monkeypatch):
    """Devices of a few MiB: Python itself wouldn't fit."""
    for name in ("PROCESS", "DECODE_LAYER", "OTHER_LAYER"):
        monkeypatch.setattr(footprint, name, 0)


@pytest.mark.parametrize("lora", [None, LoRA(4, 4.0)])
def test_flops_are_those_of_the_matrix_products(lora):
    """A program of one layer has no loop whose body is counted once."""
    sizes = DecoderConfig(
        vocab=1000, layers=1, width=256, heads=8, kv_heads=4, head_dim=32, mlp=512, lora=lora
    )
    graph, params = abstract_decoder(sizes)
    tokens = jax.ShapeDtypeStruct((1, 64), np.int32)

    def logits(params, tokens):
        return nnx.merge(graph, params).logits(tokens)

    counted = jax.jit(logits).lower(params, tokens).cost_analysis()["flops"]
    # In one block of queries all keys are read, later ones too.
    attended = 64 * flops.attention_flops(sizes, 64)
    expected = 64 * (flops.token_flops(sizes) + flops.head_flops(sizes)) + attended
    assert counted == pytest.approx(expected, rel=0.03)
    prefix, row = flops.prefill_flops(sizes, 64), flops.decode_flops(sizes, 64, 64)
    assert prefix == pytest.approx(expected - 64 * flops.head_flops(sizes), rel=0.05)
    assert row > expected
    once = flops.update_flops(sizes, 64, 4, 64, remat=False)
    assert once < flops.update_flops(sizes, 64, 4, 64, remat=True) < 8 * (prefix + 4 * row)


def most_bytes(case):
    return caches.most_bytes(case.memory, case.config, case.shapes)


def test_caches_are_those_of_the_rounds_that_are_held_and_the_one_that_is_drawn(monkeypatch):
    monkeypatch.setattr(schedule, "MIN_WINDOW", 24)  # two windows in 96 slots
    whole = make_case(small_config("sampling.hold_cache=always"), slice_in(GIB))
    never = make_case(small_config("sampling.hold_cache=never"), slice_in(GIB))
    slot = 2 * 1 * 4 * 8 * 4  # keys and values, layers, heads, numbers, bytes
    base, child = 8 + 4 * 16, 24 + 4 * 16  # slots of a group, of which each device has one
    # Beside the base round questions are answered and a child's prefixes gathered; then it is let go.
    asked = sum(whole.shapes.localize[2:])
    assert most_bytes(whole) == slot * max(base + max(asked, 24), child)
    assert most_bytes(never) == slot * child
    assert whole.prefilled != never.prefilled
    # When half of the rows have ended, they leave their places for lanes of 2 rows, and those for a page.
    longer = ["sampling.max_response_tokens=96", "sampling.hold_cache=never"]
    wide = make_case(small_config(*longer), slice_in(GIB))
    page = 21 * 96
    assert most_bytes(wide) == slot * (104 + (2 * 96 + 104) + page)
    # Half as many lanes, 2 groups of one, with a copy of their first quarter; beside them lanes for 32 of
    # 64 rows, and pages of those that wait.
    few = make_case(
        small_config(*longer, "train.prompts_per_step=16", "sampling.slots=32"), slice_in(GIB)
    )
    page = 42 * 48
    assert most_bytes(few) == slot * (2 * 104 + (2 * 96 + 2 * 24 + 2 * 104) + 4 * 96 + page)


def test_the_papers_setting_decodes_with_few_programs():
    pytest.importorskip("libtpu")
    for file in PAPER:
        case = make_case(load_config(file), slice_of("v5e:16x16"))
        assert len(case.decoded) <= 12, file.stem


def test_groups_that_are_cut_keep_their_prefix_in_each_part():
    """Four prompts of eight rollouts on eight data shards: each is cut in two."""
    case, whole = (
        make_case(small_config("objective=grpo", f"train.prompts_per_step={n}"), slice_in(GIB))
        for n in (4, 8)
    )
    assert caches.cuts(case.memory, case.config, case.shapes) == {"sample": 2}
    assert caches.cuts(whole.memory, whole.config, whole.shapes) == {}
    (shape,), (other,) = case.shapes.base, whole.shapes.base
    assert case.memory.part(shape) == (8, 4, *shape[2:])
    slot = 2 * 4 * case.subject.model.kv_heads * case.subject.model.head_dim  # bytes, of one layer
    drawn, apart = (c.memory.drawing_bytes(round_) for c, round_ in ((case, shape), (whole, other)))
    assert apart - drawn == 4 * slot * shape.suffix  # half of the rows, but no less of the prefix


def test_the_warm_start_of_a_fresh_policy_is_a_phase_of_its_own():
    def held(*overrides):
        case = make_case(small_config(*overrides), slice_in(GIB))
        return case, phases(case, estimated(case)).get("warm start")

    case, small = held("warm_start.steps=5", "model.lora.rank=2")
    assert small.parts["trained parameters"] == 4 * case.subject.parameters  # whole on each device
    _, large = held("warm_start.steps=5", "model.lora.rank=2", "warm_start.batch=640")
    assert large.parts["temporary"] == 10 * small.parts["temporary"]
    _, narrow = held("warm_start.steps=5", "model.dtype=bfloat16")
    assert narrow.parts["frozen parameters"] == 2 * case.subject.parameters
    assert held()[1] is None
    with pytest.raises(
        ConfigError, match=r"warm start takes about .* a smaller warm_start.batch or"
    ):
        check_room(
            make_case(small_config("warm_start.steps=5", "warm_start.batch=8000000"), slice_in(GIB))
        )


def test_what_is_resident_is_a_devices_part_of_it():
    case = make_case(
        small_config("mesh.fsdp=2", "mesh.tensor=2", "model.dtype=bfloat16", "model.lora.rank=2"),
        slice_in(GIB),
    )
    held = phases(case, [])["update"].parts
    # Frozen matrices are split 2 × 2, embeddings in two, for their vocabulary is odd; norms are whole.
    c = case.subject.model
    numbers, norms = case.subject.parameters, (2 * c.layers + 1) * c.width
    embeddings = c.vocab * c.width * (1 if c.tie_embeddings else 2)
    assert c.vocab % 2
    split = (numbers - norms - embeddings) // 4 + embeddings // 2
    assert held["frozen parameters"] == 2 * (split + norms)
    assert held["gradients"] == held["trained parameters"]
    assert held["optimizer"] == 2 * held["trained parameters"] + 2 * 4  # two counts


@pytest.mark.usefixtures("no_process")
def test_advice_is_what_saves_most_first_and_says_whether_it_is_enough():
    case = make_case(small_config("mesh.fsdp=2", "mesh.tensor=2"), slice_in(GIB))
    programs = [Program("accumulate", (), 0.0, temporary=4 * 2**20)]
    planned = phases(case, programs)
    tight = {name: Phase(p.parts, p.total - 2 * p.total // 3) for name, p in planned.items()}
    found = list(advise(case, tight, programs))
    for name, enough in (("sampling", False), ("update", True)):
        *alone, more_devices = [a for a in found if a.phase == name]
        assert "devices" in more_devices.change
        if not enough:  # then all together come last
            together = alone.pop()
            assert sum(a.change in together.change for a in alone) > 1
            assert together.saves > max(a.saves for a in alone)
        saves = [a.saves or 0 for a in alone]
        assert saves == sorted(saves, reverse=True)
        assert any(a.enough for a in alone) == enough
    changes = {a.change: a for a in found}
    assert {"train.remat=true", "sampling.hold_cache=never"} <= set(changes)
    assert any("mesh.fsdp=4" in change for change in changes)
    assert changes["train.remat=true"].saves is None
    for advice in found:
        assert advice.enough == bool(advice.saves and advice.saves >= tight[advice.phase].over)


# Collectives

HLO = """
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[64,32] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %d = bf16[64,32]{1,0:T(8,128)(2,1)} dynamic-slice(%r), dynamic_slice_sizes={64,32}
}

%start (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %g = bf16[32,16]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %c = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]{:S(2)}) custom-call(%g)
}

%done (p: bf16[8,16], q: bf16[32,16]) -> bf16[32,16] {
  %g2 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %c2 = bf16[32,16]{1,0} custom-call(%g2)
}

%layer (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %a1 = (bf16[8,16]{1,0:T(8,128)S(1)}, bf16[32,16]{1,0}, /*index=2*/u32[]{:S(2)}) fusion(%x), calls=%start
  %a2 = bf16[32,16]{1,0} fusion(%y), kind=kCustom, calls=%done
  ROOT %n = (s32[], bf16[8,16]) tuple(%i, %a2)
}

%below (t: (s32[], bf16[8,16])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(48)
  %i2 = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i2, %constant.5), direction=LT
}

%token (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %l = (s32[], bf16[8,16]) while(%t), condition=%below, body=%layer
  %h = (f32[4,8]{1,0}, f32[2]{0}) all-reduce(%u, %v), channel_id=9, to_apply=%add
  ROOT %n2 = (s32[], bf16[8,16]) tuple(%i, %l)
}

%going_on (t: (s32[], bf16[8,16])) -> pred[] {
  ROOT %p = pred[] fusion(%t), kind=kLoop, calls=%add
}

ENTRY %main (a: bf16[64,128]) -> bf16[64,32] {
  %w = (s32[], bf16[8,16]) while(%t0), condition=%going_on, body=%token
  %cp = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%z), channel_id=11
  ROOT %f = bf16[64,32]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_are_told_by_their_results_and_the_loops_around_them():
    found = {c.kind: c for c in collectives(HLO)}
    assert len(collectives(HLO)) == len(found) == 4
    assert found["all-gather"] == ("all-gather", ((32, 16),), 2 * 32 * 16, 48, True)
    assert found["all-reduce"] == ("all-reduce", ((4, 8), (2,)), 4 * (32 + 2), 1, True)
    assert found["reduce-scatter"] == ("reduce-scatter", ((64, 32),), 2 * 64 * 32, 1, False)
    assert found["collective-permute"] == ("collective-permute", ((16,),), 64, 1, False)


def test_hidden_states_are_split_by_lanes_or_slots_or_not_at_all():
    mesh = make_mesh(2, 1, 4)
    for shape, axes in (
        ((4, 8, 6, 32), (("data", "fsdp"), "tensor", None, None)),
        ((4, 6, 8, 32), (("data", "fsdp"), None, "tensor", None)),
        ((4, 6, 6, 32), (("data", "fsdp"), None, None, None)),
        ((4, 12, 32), (("data", "fsdp"), "tensor", None)),
        ((4, 13, 32), (("data", "fsdp"), None, None)),
    ):
        assert tuple(hidden_sharding(mesh, shape).spec) == axes


# Whole plans


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_the_papers_configs_are_its_setting(file):
    pytest.importorskip("libtpu")
    config = load_config(file)
    case = make_case(config, slice_of("v5e:16x16"))
    assert config.method == "paper"
    assert config.objective in file.stem
    assert case.subject.model.lora == LoRA(64, 64.0)
    s, t, o = config.sampling, config.train, config.optimizer
    assert (s.temperature, s.top_p) == (0.7, 0.95)
    assert (s.max_prompt_tokens, s.max_response_tokens) == (2048, 4096)
    assert (s.max_step_tokens, s.max_steps) == (256, 20)
    assert (t.prompts_per_step, t.minibatch_prompts, t.epochs) == (32, 8, 1)
    assert (o.learning_rate, o.schedule, o.weight_decay) == (5e-5, "constant", 0.01)
    assert (o.b1, o.b2, o.max_grad_norm) == (0.9, 0.999, 1.0)
    ask = config.reset.localizer
    assert config.objective != "srpo" or (ask.max_tokens, ask.temperature) == (4096, 0.3)
    clips = {"grpo": (0.2, 3.0, "token")}.get(config.objective, (None, None, "sequence"))
    assert (config.loss.clip, config.loss.dual_clip, config.loss.aggregation) == clips


@pytest.mark.parametrize("name", [f.stem for f in PAPER if "_numina_" in f.stem])
def test_the_papers_two_data_sets_run_the_same_programs(name):
    """So that a plan of one is a plan of the other."""
    pytest.importorskip("libtpu")
    one, other = (
        make_case(
            load_config(CONFIGS / "paper" / f"{name.replace('numina', data)}.yaml"),
            slice_of("v5e:16x16"),
        )
        for data in ("numina", "lcb")
    )
    assert one.shapes.pack == other.shapes.pack
    assert one.decoded == other.decoded
    assert one.prefilled == other.prefilled
    assert one.shapes.forks == other.shapes.forks
    assert one.subject.model == other.subject.model


def run_plan(*arguments):
    result = CliRunner().invoke(cli.app, ["plan", str(CONFIGS / "quickstart.yaml"), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_a_small_plan_fits_and_is_one_json_object(hasty):
    shown = json.loads(run_plan("--topology", "cpu:2", "--json", *SMALL.split(), "mesh.tensor=2"))
    assert shown["fits"] is True
    assert shown["devices"] == 2
    assert shown["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2}
    names = [program["name"] for program in shown["programs"]]
    assert names == ["prefill", "decode", "fork", "apply", "accumulate"]
    assert list(shown["kinds"]) == names
    assert min(shown["kinds"].values()) == 1
    taken = {p["name"]: p["seconds"] for p in shown["programs"]}
    assert shown["compile_seconds"] == pytest.approx(
        sum(shown["kinds"][name] * seconds for name, seconds in taken.items())
    )
    for phase in shown["phases"].values():
        assert phase["total"] == sum(phase["parts"].values()) == shown["memory"] + phase["over"]
    decode = shown["programs"][1]
    assert any(t["looping"] for t in decode["traffic"])
    assert shown["flops"]["update"] > shown["flops"]["decode"] > 0
    assert shown["advice"] == []
    assert shown["largest"] is None


def test_an_absurd_plan_says_by_how_much_it_does_not_fit():
    pytest.importorskip("libtpu")
    absurd = ["model.fresh.width=16384", "model.fresh.mlp=262144", "model.fresh.layers=1"]
    arguments = ["--topology", "v5e:2x2", *SMALL.split(), *absurd, "mesh.fsdp=2", "mesh.data=2"]
    shown = json.loads(run_plan("--json", *arguments))
    assert shown["fits"] is False
    numbers = 3 * 16384 * 262144 + 16384 * 16384 * 3
    held = shown["phases"]["update"]
    # Parameters, two moments and gradients in float32, in two parts.
    assert held["over"] >= 16 * numbers / 2 - shown["memory"]
    refused = [p for p in shown["programs"] if p["refused"]]
    assert refused
    assert all("exceeds available HBM" in p["refused"] for p in refused)
    changes = " ".join(a["change"] for a in shown["advice"])
    assert "model.lora.rank=64" in changes
    assert "mesh.fsdp=4" in changes


@pytest.mark.usefixtures("no_process")
def test_the_largest_number_of_rows_is_found_by_halving(monkeypatch):
    from jaxreset.planning import advice

    def compiled(case, say):
        return Program("decode", decode_sizes(case), 0.0)

    monkeypatch.setattr(advice, "compile_decode", compiled)
    case = make_case(small_config(), slice_in(2**20))
    found = advice.largest_slots(case, [], lambda text: None)
    assert found.slots == found.prompts * 4 == found.rows_per_shard * 8
    assert found.prompts % 8 == 0
    for prompts, fits in ((found.prompts, True), (found.prompts + 8, False)):
        slots = f"sampling.slots={4 * prompts}"
        case = make_case(small_config(f"train.prompts_per_step={prompts}", slots), slice_in(2**20))
        over = phases(case, [])["sampling"].over
        assert (over <= 0) == fits
    assert found.free >= 0


# Programs of a TPU


def tpu_case(folder):
    """A small bfloat16 model, of a vocabulary that chips can share, on two data shards of two."""
    pytest.importorskip("libtpu")
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    settings = {"model_type": "llama", "vocab_size": 48, "rms_norm_eps": 1e-6, **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(settings))
    values = {
        "objective": "grpo",
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "sampling": {"max_prompt_tokens": 65, "max_response_tokens": 64},
        "train": {"prompts_per_step": 4, "microbatch_tokens": 100, "remat": True},
        "eval": {"batch": 4},
        "mesh": {"fsdp": 2, "tensor": 2},
    }
    return make_case(parse_config(values), slice_of("v5e:2x2"))


def test_a_decoding_step_on_a_tpu_gathers_neither_weights_nor_caches(tmp_path):
    case = tpu_case(tmp_path)
    part, lanes = case.lanes
    text = ahead.decode(case.subject, part, lanes).lower().compile().as_text()
    c = case.subject.model
    inside = [x for x in collectives(text) if x.looping]
    assert any(x.kind == "all-reduce" for x in inside)  # of what the heads add up to
    # On a device: a key-value head's projection, and one head's keys of one layer.
    weight = 2 * c.width * c.head_dim
    cache = 2 * lanes.groups // 2 * lanes.rows * c.head_dim * lanes.window
    for sent in inside:
        assert sent.bytes < min(weight, cache) / 2, sent


@pytest.mark.slow
def test_an_update_on_a_tpu_keeps_a_part_of_each_layers_input(tmp_path):
    case = tpu_case(tmp_path)
    program = ahead.accumulate_microbatch(case.subject, case.pack).lower().compile()
    c, pack, text = case.subject.model, case.pack, program.as_text()
    bins, lanes = pack.bins // 2, pack.lanes // 2
    inputs = f"bf16[{c.layers},{bins},{{}},{pack.slots},{c.width}]"
    assert inputs.format(lanes) in text
    assert inputs.format(pack.lanes) not in text
    prefixes = f"bf16[{c.layers},{bins},{{}},{c.width}]"
    assert prefixes.format(pack.prefix // 2) in text
    assert prefixes.format(pack.prefix) not in text
    # Tokens are exchanged over tensor, weights gathered over fsdp, and no embedding whole.
    assert all((c.vocab, c.width) not in x.shapes for x in collectives(text))
