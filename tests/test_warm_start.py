"""Supervised steps: what they learn from, the gradient, adapters and meshes, and the command `sft`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import assert_same_params

from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError, RunError
from jaxreset.models.adapters import trained
from jaxreset.models.huggingface import abstract_decoder
from jaxreset.models.placement import param_shardings
from jaxreset.parallel import make_mesh
from jaxreset.run import warm_start as module
from jaxreset.run.compiles import compiles
from jaxreset.run.lessons import Lessons, make_lessons
from jaxreset.run.parts import spread
from jaxreset.run.warm_start import SIZES, padded, warm_start, warm_start_shapes
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem, Task
from jaxreset.tasks.chain import ChainTask
from jaxreset.tasks.demonstrations import Demonstration

pytestmark = pytest.mark.usefixtures("hasty")

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TASK = ChainTask()


def config_of(*overrides):
    """Of a policy that isn't fresh, whose batches are split into microbatches."""
    settings = (
        "model.path=somewhere",
        "train.microbatch_tokens=100",
        "warm_start.learning_rate=1e-3",
    )
    return load_config(QUICKSTART, [*settings, *overrides])


def made_up(count, *, seed=0, prompt=13, answer=29):
    """Demonstrations of random tokens, of all lengths up to these."""
    rng = np.random.default_rng(seed)
    return [
        Demonstration(
            rng.integers(2, 28, 1 + n * (prompt - 1) // max(count - 1, 1)).astype(np.int32),
            np.append(rng.integers(2, 28, rng.integers(1, answer)), 1).astype(np.int32),
            f"made up, line {n + 1}",
        )
        for n in range(count)
    ]


def lessons_of(*batches):
    """Step by step."""
    found = [one for batch in batches for one in batch]
    return Lessons(lambda step: (batches[step],), found)


def copied(policy):
    """Its own arrays, as a warm start consumes them."""
    return policy.with_params(jax.tree.map(jnp.array, policy.params), policy.version)


def plain_loss(params, policy, batch):
    """Minus the mean over demonstrations of the mean over the answer's tokens, from all logits."""
    rows = [np.concatenate([one.prompt, one.answer]) for one in batch]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    learnt = np.zeros(tokens.shape, bool)
    for n, (one, ids) in enumerate(zip(batch, rows, strict=True)):
        tokens[n, : len(ids)] = ids
        learnt[n, len(one.prompt) : len(ids)] = True
    logps = jax.nn.log_softmax(policy.with_params(params, 0).logits(tokens))[:, :-1]
    chosen = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    return -((chosen * learnt[:, 1:]).sum(-1) / learnt.sum(-1)).mean()


@pytest.fixture
def descending(monkeypatch):
    """A step subtracts the gradient."""
    monkeypatch.setattr(module, "make_warm_start_optimizer", lambda config: optax.sgd(1.0))


@pytest.mark.parametrize(
    "how",
    ["packed", "at once", *(pytest.param(p, marks=pytest.mark.slow) for p in ("whole", "remat"))],
)
def test_a_step_descends_the_plain_loss_of_the_answers(policy64, descending, how):
    settings = {
        "packed": [],
        "whole": ["train.microbatch_tokens=100000"],
        "remat": ["train.remat=true"],
        "at once": ["model.path=null"],
    }
    config = config_of("warm_start.steps=1", *settings[how])
    batch = made_up(7)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: plain_loss(p, policy64, batch)))(
        policy64.params
    )
    records = []
    after = warm_start(copied(policy64), lessons_of(batch), config, on_step=records.append)
    change = jax.tree.map(lambda a, b: a - b, policy64.params, after.params)
    assert records[0]["loss"] == pytest.approx(float(loss), rel=1e-12)
    for ours, theirs in zip(jax.tree.leaves(change), jax.tree.leaves(gradient), strict=True):
        assert float(jnp.abs(theirs).max()) > 1e-6
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    if how != "at once":
        assert records[0]["tokens"] == sum(len(one.answer) for one in batch)
        assert records[0]["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_parameters_learn_what_is_shown(policy32, optimizer):
    config = config_of("warm_start.steps=12", f"warm_start.optimizer={optimizer}",
                       "warm_start.learning_rate=1e-2")  # fmt: skip
    batch, losses = made_up(6), []
    after = warm_start(
        copied(policy32),
        lessons_of(*[batch] * 12),
        config,
        on_step=lambda r: losses.append(r["loss"]),
    )
    assert losses[-1] < 0.7 * losses[0]
    assert after.version == policy32.version
    for old, new in zip(
        jax.tree.leaves(policy32.params), jax.tree.leaves(after.params), strict=True
    ):
        assert np.any(np.asarray(old) != np.asarray(new))


@pytest.mark.slow
def test_a_mesh_computes_the_same(policy32):
    config = config_of("warm_start.steps=3", "warm_start.learning_rate=1e-2")
    batches = [made_up(6, seed=seed) for seed in range(3)]
    losses = []
    for sizes in ((1, 1, 1), (2, 2, 1), (1, 1, 2)):
        devices = make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
        devices = devices if devices.size > 1 else None
        after = warm_start(
            spread(copied(policy32), devices),
            lessons_of(*batches),
            config,
            on_step=lambda record: losses.append(record["loss"]),
            mesh=devices,
        )
        if devices is not None:
            where = param_shardings(devices, after.params)
            params = zip(jax.tree.leaves(after.params), jax.tree.leaves(where), strict=True)
            assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in params)
    np.testing.assert_allclose(losses[3:], losses[:3] * 2, rtol=1e-5)
    assert losses[2] < losses[0]


def test_adapters_learn_and_their_base_stays_bit_by_bit(policy32):
    config = config_of("warm_start.steps=4", "model.lora.rank=4", "warm_start.learning_rate=2e-2")
    policy, losses = copied(policy32).with_lora(4, 4), []
    before = jax.tree.map(np.array, trained(policy.params)[0])
    batch = made_up(6)
    after = warm_start(
        policy, lessons_of(*[batch] * 4), config, on_step=lambda r: losses.append(r["loss"])
    )
    assert losses[3] < losses[0]
    adapters, base = trained(after.params)
    assert_same_params(base, policy32.params)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(adapters), strict=True):
        assert np.any(old != np.asarray(new))  # of A from the second step on: B is zero at first


@pytest.mark.slow
def test_what_is_learnt_in_half_precision_is_kept_in_float32(policy32):
    config = config_of("warm_start.steps=2", "model.dtype=bfloat16")
    narrow = dataclasses.replace(policy32.config, dtype="bfloat16")
    graph, _ = abstract_decoder(narrow)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy32.params)
    policy = dataclasses.replace(policy32, graph=graph, config=narrow, params=params)
    after = warm_start(policy, lessons_of(*[made_up(4)] * 2), config)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype("float32")}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), after.params)
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(after.params), strict=True)
    )


@pytest.mark.slow
def test_few_shapes_are_compiled_whatever_the_lengths(policy32, monkeypatch):
    seen, update = set(), module.accumulate

    def spy(gradients, params, frozen, batch, *rest, **static):
        seen.add((*batch.rows.shape, batch.prefix.shape[-1]))
        return update(gradients, params, frozen, batch, *rest, **static)

    monkeypatch.setattr(module, "accumulate", spy)
    batches = [made_up(3 + n, seed=n, prompt=5 + n, answer=4 + 6 * n) for n in range(8)]
    lessons = lessons_of(*batches)
    config = config_of("warm_start.steps=8", "train.microbatch_tokens=600")
    before = compiles()
    warm_start(copied(policy32), lessons, config)
    shapes = warm_start_shapes(lessons.found, 600)
    assert seen <= {(s.bins, s.lanes, s.slots, s.prefix) for s in shapes}
    assert 1 < len(seen) <= 4
    assert all(s.slots % SIZES == s.prefix % SIZES == 0 for s in shapes)
    assert compiles() - before <= len(seen) + 12  # casts, zeros, the optimizer's start, its step


def test_padded_rows_have_few_widths():
    batch = made_up(9, prompt=20, answer=40)
    tokens, starts, ends = padded(batch)
    assert tokens.shape[1] % 16 == 0
    assert tokens.shape[1] - ends.max() < 16
    for row, start, end, one in zip(tokens, starts, ends, batch, strict=True):
        np.testing.assert_array_equal(row[:start], one.prompt)
        np.testing.assert_array_equal(row[start:end], one.answer)


@pytest.mark.slow
def test_what_is_not_finite_ends_a_warm_start(policy32):
    spoilt = policy32.with_params(jax.tree.map(lambda x: x * jnp.nan, policy32.params), 0)
    lessons = lessons_of(*[made_up(4)] * 9)
    for fresh, said in (
        ([], "2 gradients in a row weren't finite; the last batch began with made up, line 1"),
        (["model.path=null"], "the loss of step 9 isn't finite"),
    ):
        config = config_of("warm_start.steps=9", "train.max_nonfinite=2", *fresh)
        with pytest.raises(RunError, match=rf"warm start: {said}.*Lower warm_start.learning_rate"):
            warm_start(copied(spoilt), lessons, config)


# What it learns from


def drawn(tokenizer, config, problems):
    return make_lessons(config, Asking(TASK, tokenizer), problems, (tokenizer.eos_token_id,))


@pytest.mark.parametrize("mode", ["generate", "inline"])
def test_a_fresh_policy_draws_what_it_always_has(tokenizer, mode):
    """Solutions first, then as many localisations; each step has a generator of its own."""
    config = load_config(
        QUICKSTART, ["warm_start.steps=4", "warm_start.batch=5", f"reset.localizer.mode={mode}"]
    )
    problems = TASK.problems("train", 50)
    lessons = drawn(tokenizer, config, problems)
    inline = mode == "inline"
    for step in range(4):
        rng = np.random.default_rng((0, step))
        show = [(TASK.demonstrate_solution, 5)]
        if step >= 2:
            localize = partial(TASK.demonstrate_localization, inline=inline)
            show = [(TASK.demonstrate_solution, 2), (localize, 2)]
        batches = lessons.of_step(step)
        assert len(batches) == len(show)
        for batch, (demonstrate, count) in zip(batches, show, strict=True):
            numbers = rng.integers(50, size=count)
            pairs = [demonstrate(problems[int(number)], rng) for number in numbers]
            assert [
                (tokenizer.decode(one.prompt), tokenizer.decode(one.answer[:-1])) for one in batch
            ] == pairs
            assert all(one.answer[-1] == tokenizer.eos_token_id for one in batch)


def test_a_checkpoint_draws_the_same_and_leaves_out_what_is_too_long(tokenizer, caplog):
    problems = TASK.problems("train", 50)
    settings = "warm_start.steps=4", "warm_start.batch=6"
    fresh = drawn(tokenizer, load_config(QUICKSTART, settings), problems)
    config = config_of(*settings, "sampling.max_response_tokens=24", "sampling.max_step_tokens=8")
    lessons = drawn(tokenizer, config, problems)
    before = [one for step in range(4) for one in fresh.of_step(step)[0]]
    after = [one for step in range(4) for one in lessons.of_step(step)[0]]
    short = [one for one in before if len(one.answer) <= 24 and len(one.prompt) <= 13]
    assert 0 < len(short) < len(before)
    assert [one.answer.tolist() for one in after] == [one.answer.tolist() for one in short]
    assert lessons.dropped == len(before) - len(short)
    assert f"{lessons.dropped} of {len(before)} demonstrations are left out" in caplog.text


def test_passes_over_a_file_show_each_record_once(tokenizer, tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"a{n}\n", "completion": f"a{n}={n}\n"}) + "\n" for n in range(9)
        )
    )
    config = config_of("warm_start.steps=6", "warm_start.batch=3", f"warm_start.path={file}")
    lessons = drawn(tokenizer, config, TASK.problems("train", 5))
    texts = [[tokenizer.decode(one.prompt) for one in lessons.of_step(n)[0]] for n in range(6)]
    for half in (texts[:3], texts[3:]):
        assert sorted(text for batch in half for text in batch) == [f"a{n}\n" for n in range(9)]
    assert texts[:3] != texts[3:]
    again = drawn(tokenizer, config, [])
    assert [tokenizer.decode(one.prompt) for one in again.of_step(4)[0]] == texts[4]


class Generated(Sequence):
    """As many problems as there are numbers; number n is made when it is asked for."""

    def __init__(self, solution):
        self.solution, self.made = solution, set()

    def __len__(self):
        return 10**9

    def __getitem__(self, number):
        self.made.add(number)
        return Problem(f"p:{number}", f"a{number}", "", self.solution)


def test_of_generated_problems_no_more_are_made_than_shown(tokenizer):
    class Bare(ChainTask):
        demonstrate_solution = Task.demonstrate_solution
        reference = Task.reference

    settings = "warm_start.steps=3", "warm_start.batch=50", "sampling.max_prompt_tokens=20"
    config, answers = config_of(*settings), (tokenizer.eos_token_id,)
    problems = Generated("1\n")
    lessons = make_lessons(config, Asking(Bare(), tokenizer), problems, answers)
    assert problems.made == set(range(150))
    shown = [one.place for step in range(3) for one in lessons.of_step(step)[0]]
    assert sorted(shown) == sorted(f"p:{n}" for n in range(150))
    without = Generated("")
    with pytest.raises(ValueError, match=f"none of {10**9} problems has a solution to learn from"):
        make_lessons(config, Asking(Bare(), tokenizer), without, answers)
    assert without.made == set(range(100))


# The config


@pytest.mark.parametrize(
    ("overrides", "optimizer", "rate"),
    [
        ("", "muon", 2e-2),
        ("warm_start.learning_rate=3e-3", "muon", 3e-3),
        ("warm_start.optimizer=adamw", "adamw", 2e-3),
        ("model.path=x", "adamw", 1e-5),
        ("model.path=x model.lora.rank=4", "adamw", 2e-4),
        ("model.lora.rank=4", "muon", 2e-2),
        ("model.path=x warm_start.optimizer=muon warm_start.learning_rate=1e-4", "muon", 1e-4),
    ],
)
def test_the_optimizer_and_its_rate_suit_the_policy(tmp_path, overrides, optimizer, rate):
    file = tmp_path / "config.yaml"
    file.write_text("warm_start: {steps: 3}\n")
    resolved = load_config(file, overrides.split()).warm_start
    assert (resolved.optimizer, resolved.learning_rate) == (optimizer, rate)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("model.lora.rank=4", "model.lora.rank=4: muon is for whole matrices.*use adamw"),
        ("model.lora.rank=null", "name warm_start.learning_rate, such as 1e-4, or use adamw"),
    ],
)
def test_muon_on_a_checkpoint_is_asked_twice(overrides, words):
    settings = "model.path=x", "warm_start.optimizer=muon", "warm_start.learning_rate=null"
    with pytest.raises(ConfigError, match=words):
        load_config(QUICKSTART, [*settings, overrides])


def test_adamw_is_the_runs_own_with_a_rate_that_rises_and_falls(policy32):
    config = config_of("warm_start.steps=40", "warm_start.learning_rate=1e-2",
                       "optimizer.weight_decay=0", "optimizer.b2=0.99")  # fmt: skip
    optimizer = module.make_warm_start_optimizer(config)
    x = {"x": jnp.ones(3)}
    state, moved = optimizer.init(x), []
    for step in range(40):
        update, state = optimizer.update({"x": jnp.ones(3)}, state, x, position=step)
        moved.append(-float(update["x"][0]))
    np.testing.assert_allclose(moved[:2], [5e-3, 1e-2], rtol=1e-3)  # a twentieth of the steps
    assert all(a > b * (1 - 1e-5) for a, b in itertools.pairwise(moved[1:]))
    assert moved[-1] < 1e-4
