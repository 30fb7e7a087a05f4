"""The update: its gradient is that of plain sequences, however groups are split, dropped or spread."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import random_policy

from jaxreset.config import Optimizer
from jaxreset.config_file import parse_config
from jaxreset.errors import RunError
from jaxreset.groups import Group
from jaxreset.learning.form import LossForm
from jaxreset.learning.learner import Learner
from jaxreset.learning.microbatches import PackShape, empty_batch, pack
from jaxreset.learning.optimizer import make_optimizer
from jaxreset.learning.update import accumulate, filled, measure
from jaxreset.models.adapters import trained
from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import Decoder
from jaxreset.models.lora import LoRA
from jaxreset.models.placement import param_shardings
from jaxreset.models.rotary import RopeScaling
from jaxreset.parallel import make_mesh, rows_sharding
from jaxreset.run.compiles import compiles
from jaxreset.sampling.rounds import Stream

pytestmark = pytest.mark.slow

VOCAB, ROWS, PREFIX, SUFFIX = TINY.vocab, 4, 9, 6
SMALL, LARGE = PackShape(4, ROWS, PREFIX, SUFFIX), PackShape(8, ROWS, PREFIX, SUFFIX)
ROOMY = PackShape(
    2, 5, 3 * PREFIX, 3 * SUFFIX
)  # several groups in a bin, several suffixes in a lane
TEMPERATURE, ONE = np.float32(0.7), np.float32(1)
SEQUENCE = LossForm()
FORMS = [
    SEQUENCE,
    LossForm("token", clip=0.2, dual_clip=3.0),
    LossForm("constant", clip=(0.1, 0.3)),
]
# Compiling takes most of the time here.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
quick_accumulate = jax.jit(
    accumulate.__wrapped__, static_argnames=("graph", "form", "remat", "mesh"), **QUICK
)
quick_measure = jax.jit(measure.__wrapped__, static_argnames=("graph", "remat"), **QUICK)


FAMILIES = {
    "qwen2": TINY,
    "qwen3": dataclasses.replace(TINY, qkv_bias=False, qk_norm=True, head_dim=16),
    "llama3": dataclasses.replace(
        TINY, qkv_bias=False, tie_embeddings=False, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)
    ),
    "lora": dataclasses.replace(TINY, lora=LoRA(3, 6.0)),
    "lora_on_some": dataclasses.replace(TINY, lora=LoRA(2, 1.0, ("q", "v", "down"))),
}


@pytest.fixture(scope="module")
def families(tokenizer):
    """A random policy of each family; adapters that already do something."""

    @functools.cache
    def make(family, dtype):
        return random_policy(dataclasses.replace(FAMILIES[family], dtype=dtype), tokenizer, seed=3)

    return make


def random_groups(count, *, seed=0, silent=()):
    """Ragged groups with behaviour log-probabilities near and far from the policy's."""
    rng = np.random.default_rng(seed)
    groups = []
    for n in range(count):
        rows = int(rng.integers(2, ROWS + 1))
        suffixes = [
            rng.integers(0, VOCAB, rng.integers(1, SUFFIX + 1), np.int32) for _ in range(rows)
        ]
        advantages = np.zeros(rows) if n in silent else rng.normal(size=rows)
        groups.append(
            Group(
                prompt=n,
                prefix=rng.integers(0, VOCAB, rng.integers(1, PREFIX + 1), np.int32),
                suffixes=suffixes,
                behavior_logps=[-rng.uniform(1, 6, len(s)).astype(np.float32) for s in suffixes],
                rewards=advantages,
                advantages=advantages,
            )
        )
    return groups


def summed_gradient(policy, groups, shape=SMALL, form=SEQUENCE, mesh=None, remat=False):
    """The undivided gradient and loss, microbatch after microbatch."""
    params = policy.params
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, params))
    params, frozen = trained(params)
    gradients, total = jax.tree.map(jnp.zeros_like, params), 0.0
    for batch in pack(groups, [shape]):
        if mesh is not None:
            batch = jax.device_put(batch, rows_sharding(mesh))
        gradients, loss = quick_accumulate(
            gradients,
            params,
            frozen,
            batch,
            TEMPERATURE,
            graph=policy.graph,
            form=form,
            mesh=mesh,
            remat=remat,
        )
        total += float(loss)
    return gradients, total


def plain_gradient(policy, groups, form):
    """The same, with each row a sequence of its own and the loss written out token by token."""
    rows = [
        (g.prefix, s, b, np.float32(a))
        for g in groups
        for s, b, a in zip(
            g.suffixes, g.behavior_logps, g.token_advantages or g.advantages, strict=True
        )
    ]
    # Padded to one number of rows, so that it compiles once.
    tokens = np.zeros((36, PREFIX + SUFFIX), np.int32)
    behavior, weights, advantages = np.zeros((3, *tokens.shape), np.float64)
    for i, (prefix, suffix, logps, advantage) in enumerate(rows):
        end = len(prefix) + len(suffix)
        tokens[i, :end] = [*prefix, *suffix]
        behavior[i, len(prefix) : end] = logps
        weights[i, len(prefix) : end] = 1 / len(suffix) if form.aggregation == "sequence" else 1
        advantages[i, len(prefix) : end] = advantage
    low, high = form.clip if isinstance(form.clip, tuple) else (form.clip or 0, form.clip or 0)
    loss = partial(plain_loss, policy.graph, tokens, behavior, weights, advantages)
    value, gradient = loss(
        form.clip is not None, low, high, form.dual_clip or np.inf, *trained(policy.params)
    )
    return gradient, float(value)


@partial(jax.jit, static_argnums=0, **QUICK)
@partial(jax.value_and_grad, argnums=9)
def plain_loss(graph, tokens, behavior, weights, advantages, clips, low, high, bound, *params):
    logps = jax.nn.log_softmax(nnx.merge(graph, *params).logits(tokens) / TEMPERATURE)[:, :-1]
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    weights, advantage = weights[:, 1:], advantages[:, 1:]
    ratio = jnp.exp(jnp.where(weights > 0, logps - behavior[:, 1:], 0))
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    gain = jnp.where(advantage < 0, jnp.maximum(gain, bound * advantage), gain)
    return -(weights * jnp.where(clips, gain, advantage * logps)).sum()


def assert_close(ours, theirs, tolerance):
    """Each array, relative to its largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


# Gradients


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    compiled=st.sampled_from(
        [
            ("float64", SMALL, FORMS[0], False),
            ("float64", ROOMY, FORMS[1], True),
            ("float32", ROOMY, FORMS[2], False),
        ]
    ),
)
def test_gradient_is_that_of_plain_sequences(families, family, seed, count, compiled):
    """Relative to the norm of each array's gradient."""
    dtype, shape, form, remat = compiled
    groups = random_groups(count, seed=seed)
    rng = np.random.default_rng(seed)
    for group in groups[::3]:
        group.token_advantages = [rng.normal(size=len(s)) for s in group.suffixes]
    with jax.enable_x64(dtype == "float64"):
        policy = families(family, dtype)
        ours, value = summed_gradient(policy, groups, shape, form, remat=remat)
        theirs, expected = plain_gradient(policy, groups, form)
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            gap = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert gap < {"float64": 1e-9, "float32": 1e-5}[dtype]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_gradient_does_not_depend_on_the_order_of_groups(policy64):
    groups = random_groups(9, seed=1)
    expected, value = summed_gradient(policy64, groups)
    order = np.random.default_rng(0).permutation(9)
    ours, total = summed_gradient(policy64, [groups[n] for n in order])
    assert_close(ours, expected, 1e-12)
    np.testing.assert_allclose(total, value, rtol=1e-12)


@pytest.mark.parametrize(("family", "mesh"), [("qwen2", (8, 1, 1)), ("lora", (2, 2, 2))])
def test_gradient_does_not_depend_on_microbatches_or_devices(families, family, mesh):
    groups = random_groups(14)
    with jax.enable_x64(True):
        policy = families(family, "float64")
        expected, value = summed_gradient(policy, groups, SMALL)
        ours, total = summed_gradient(policy, groups, LARGE, mesh=make_mesh(*mesh))
    assert_close(ours, expected, 1e-9)
    np.testing.assert_allclose(total, value, rtol=1e-9)


# Lanes split over tensor, or slots where it doesn't divide the lanes, or neither.
@pytest.mark.parametrize(
    ("family", "mesh", "shape", "dtype"),
    [
        ("qwen2", (2, 1, 4), PackShape(4, ROWS, 12, SUFFIX), "float32"),
        ("qwen2", (2, 1, 4), PackShape(4, ROWS, 12, SUFFIX), "float64"),
        ("lora", (1, 2, 4), PackShape(2, 5, 28, 20), "float64"),
        ("llama3", (2, 2, 2), PackShape(4, 5, 27, 19), "float32"),
        ("llama3", (2, 2, 2), PackShape(4, 5, 27, 19), "float64"),
    ],
    ids=str,
)
def test_splitting_tokens_over_tensor_changes_no_gradient(families, family, mesh, shape, dtype):
    groups, tolerance = random_groups(6, seed=4), {"float32": 1e-5, "float64": 1e-9}[dtype]
    with jax.enable_x64(dtype == "float64"):
        policy = families(family, dtype)
        expected, value = summed_gradient(policy, groups, shape, remat=True)
        ours, total = summed_gradient(policy, groups, shape, mesh=make_mesh(*mesh), remat=True)
    assert_close(ours, expected, tolerance)
    np.testing.assert_allclose(total, value, rtol=tolerance)


def test_no_buffer_holds_logits_of_all_tokens():
    """Read from the compiled step: no array has tokens times vocabulary entries."""
    vocab, shape = 20_000, PackShape(2, 8, 64, 256)
    config = DecoderConfig(
        vocab=vocab, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, mlp=64
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    compiled = accumulate.lower(
        params,
        params,
        nnx.State({}),
        empty_batch(shape),
        ONE,
        graph=graph,
        form=SEQUENCE,
        remat=True,
    ).compile()
    text = compiled.as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    tokens = shape.bins * shape.lanes * shape.slots
    assert vocab * config.width in sizes  # the embedding is among them
    assert max(sizes) <= tokens * vocab / 4  # a chunk's


def test_padding_holds_anything(policy64):
    (batch,) = pack(random_groups(3, seed=2), [SMALL])
    rng = np.random.default_rng(0)
    exists = np.arange(SUFFIX) < batch.lengths[..., None]

    def with_junk(values, ids, most=VOCAB):
        return np.where(ids > 0, values, rng.integers(0, most, ids.shape, np.int32))

    packing = batch.packing
    junk = batch._replace(
        prefix=with_junk(batch.prefix, packing.prefix_groups),
        rows=with_junk(batch.rows, packing.suffixes),
        targets=with_junk(batch.targets, packing.suffixes),
        packing=packing._replace(
            positions=with_junk(packing.positions, packing.suffixes, 99),
            prefix_positions=with_junk(packing.prefix_positions, packing.prefix_groups, 99),
        ),
        cells=with_junk(batch.cells, exists, ROWS * SUFFIX),
        behavior_logps=np.where(exists, batch.behavior_logps, np.float32(np.nan)),
    )
    clean, dirty = (
        quick_accumulate(
            jax.tree.map(jnp.zeros_like, policy64.params),
            *trained(policy64.params),
            b,
            TEMPERATURE,
            graph=policy64.graph,
            form=FORMS[1],
            remat=False,
        )
        for b in (batch, junk)
    )
    assert_close(dirty, clean, 1e-14)
    clean, dirty = (
        quick_measure(*trained(policy64.params), b, TEMPERATURE, graph=policy64.graph, remat=False)
        for b in (batch, junk)
    )
    np.testing.assert_allclose(dirty, clean, rtol=1e-14)
    assert clean.tokens == exists.sum() == batch.lengths.sum()


# The learner


def new_learner(
    policy, *, shape=SMALL, form=SEQUENCE, mesh=None, on_nonfinite=print, reference=None, **train
):
    """A learner with its own copy of the policy, which updates overwrite; placed as a new one."""
    train = {"prompts_per_step": 12, "min_signal_groups": 0} | train
    values = {"objective": "grpo", "train": train, "sampling": {"temperature": 0.7}}
    values |= {"loss": {"clip": form.clip}, "optimizer": {"learning_rate": 1e-2}}
    settings = parse_config(values).make_learner_settings()
    params = jax.tree.map(lambda p: jnp.asarray(np.array(p)), policy.params)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, params))
    policy = policy.with_params(params, 0)
    return Learner(settings, policy, form, [shape], mesh, on_nonfinite, reference)


class Run(NamedTuple):
    """A learner's first steps, what was compiled before and in them, and the state's arrays' places."""

    learner: Learner
    before: int
    after: int
    places: list[list[tuple[jax.sharding.Sharding, bool]]]


@pytest.fixture(scope="module")
def run(request, policies):
    jax.clear_caches()  # so that what a learner compiles is counted, whichever tests came before
    mesh = request.param and make_mesh(*request.param)
    start, places = compiles(), []
    with jax.enable_x64(True):
        learner = new_learner(
            policies["float64"], shape=LARGE if mesh else SMALL, mesh=mesh, min_signal_groups=9
        )
        learner.compile()
        compiled = compiles()
        for seed, version in enumerate((0, 1, 1, 2)):  # a wait, a step, a wait, a step
            state = filled(learner.state)
            places.append([(x.sharding, x.committed) for x in jax.tree.leaves(state)])
            learner.learn(random_groups(8, seed=seed), prompts=8)
            assert learner.policy.version == version
        return Run(learner, compiled - start, compiles() - compiled, places)


@pytest.mark.parametrize("run", [None, (2, 2, 2)], ids=str, indirect=True)
def test_nothing_compiles_after_compile_since_the_state_stays_where_it_is(run):
    assert run.before >= 3  # measure, accumulate, apply
    assert run.after == 0
    state = filled(run.learner.state)
    for *places, leaf in zip(*run.places, jax.tree.leaves(state), strict=True):
        for sharding, committed in places:
            assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
            assert committed == leaf.committed
    for gradient, param in zip(*map(jax.tree.leaves, (state.gradients, state.params)), strict=True):
        assert gradient.sharding.is_equivalent_to(param.sharding, param.ndim)


@pytest.mark.parametrize("run", [None, (2, 2, 2)], ids=str, indirect=True)
def test_waits_and_steps_are_those_of_the_mean_gradient_on_any_mesh(policy64, run):
    optimizer = make_optimizer(Optimizer(learning_rate=1e-2).make(10))
    params, opt_state = policy64.params, optimizer.init(policy64.params)
    step = jax.jit(optimizer.update, **QUICK)
    for seeds in ((0, 1), (2, 3)):
        groups = [g for seed in seeds for g in random_groups(8, seed=seed)]
        summed, _ = summed_gradient(policy64.with_params(params, 0), groups)
        mean = optax.tree.scale(1 / sum(len(g.suffixes) for g in groups), summed)
        updates, opt_state = step(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(run.learner.policy.params, params, 1e-7)


def test_dropping_groups_without_signal_changes_no_parameter_in_five_steps(policy64, monkeypatch):
    dropping, running = new_learner(policy64), new_learner(policy64)
    for seed in range(5):
        groups = random_groups(8, seed=seed, silent=(0, 2, 3, 6, 7))
        saved = dropping.learn(groups, prompts=8)
        with monkeypatch.context() as patch:
            patch.setattr(Group, "has_signal", True)
            everything = running.learn(groups, prompts=8)
        assert saved["groups/with_signal"] == 3
        assert saved["update/tokens"] < everything["update/tokens"]
        dropped = [g for g in groups if not np.any(g.advantages)]
        assert saved["update/tokens_saved"] == sum(len(g.prefix) + g.tokens for g in dropped)
        assert everything["update/tokens_saved"] == 0
        assert 0 <= saved["update/padding_share"] < 1
    assert dropping.policy.version == running.policy.version == 5
    assert_close(dropping.state.params, running.state.params, 1e-12)


def test_groups_without_signal_count_but_change_no_gradient(policy64):
    groups = random_groups(8, silent=(1, 2, 6))
    learner = new_learner(policy64, min_signal_groups=100)
    metrics = learner.learn(groups, prompts=8)
    everything, total = summed_gradient(policy64, groups)
    assert_close(learner.state.gradients, everything, 1e-12)
    rows = sum(len(g.suffixes) for g in groups)
    assert learner.progress.normalizer == rows
    assert learner.progress.signal_groups == metrics["groups/with_signal"] == 5
    np.testing.assert_allclose(metrics["loss"], total / rows, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_denominator_counts_rows_tokens_or_the_budget(policy64, form):
    groups = random_groups(8, silent=range(8))
    learner = new_learner(policy64, form=form, min_signal_groups=1)
    learner.learn(groups, prompts=8)
    learner.learn(groups[:3], prompts=8)
    rows = sum(len(g.suffixes) for g in groups + groups[:3])
    tokens = sum(len(s) for g in groups + groups[:3] for s in g.suffixes)
    expected = {"sequence": rows, "token": tokens, "constant": rows * 96}
    assert learner.progress.normalizer == expected[form.aggregation]


def test_two_waits_and_a_step_equal_one_step_on_the_union(policy64):
    groups = random_groups(12, silent=(0, 5, 7))  # signal in 3, 2 and 4 of each four
    waiting, whole = new_learner(policy64, min_signal_groups=6), new_learner(policy64)
    start = leaves(waiting.policy.params)
    for first, version in ((0, 0), (4, 0), (8, 1)):
        part = [dataclasses.replace(g, prompt=g.prompt - first) for g in groups[first : first + 4]]
        metrics = waiting.learn(part, prompts=4)
        assert waiting.policy.version == metrics["optimizer_steps"] == version
        unchanged = all(map(np.array_equal, leaves(waiting.policy.params), start))
        assert unchanged == (version == 0)
    whole.learn(groups, prompts=12)
    assert whole.policy.version == 1
    assert_close(waiting.state.params, whole.state.params, 1e-12)
    assert_close(waiting.state.opt_state, whole.state.opt_state, 1e-12)
    assert waiting.progress == whole.progress
    assert not any(leaf.any() for leaf in leaves(waiting.state.gradients))


def test_minibatches_are_consecutive_prompts(policy64):
    groups = random_groups(12)
    together, apart = new_learner(policy64, minibatch_prompts=6), new_learner(policy64)
    metrics = together.learn(groups[::-1], prompts=12)
    for first in (0, 6):
        part = [dataclasses.replace(g, prompt=g.prompt - first) for g in groups[first : first + 6]]
        apart.learn(part[::-1], prompts=6)
    assert metrics["optimizer_steps"] == together.policy.version == 2
    assert_close(together.state.params, apart.state.params, 1e-12)


REGULARIZED = LossForm(
    "token", clip=0.2, recompute=True, importance_cap=1.5, kl=0.3, entropy_bonus=0.2
)


def test_regularized_gradient_is_that_of_plain_sequences(policies):
    """Weights, divergence and entropy by their formulas, each row a sequence of its own."""
    policy = policies["float64"]
    groups = random_groups(6, silent=(1,))
    rows = [(g, k) for g in groups for k in range(len(g.suffixes))]
    tokens = np.zeros((len(rows), PREFIX + SUFFIX), np.int32)
    behavior, scored = np.zeros(tokens.shape), np.zeros(tokens.shape, bool)
    for i, (g, k) in enumerate(rows):
        held, end = len(g.prefix), len(g.prefix) + len(g.suffixes[k])
        tokens[i, :end] = [*g.prefix, *g.suffixes[k]]
        behavior[i, held:end], scored[i, held:end] = g.behavior_logps[k], True
    behavior, scored = behavior[:, 1:], scored[:, 1:]
    advantages = np.array([g.advantages[k] for g, k in rows], np.float32)[:, None]

    @jax.jit
    def score(params):
        logits = nnx.merge(policy.graph, params).logits(tokens)[:, :-1] / TEMPERATURE
        logps = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(logps) * logps).sum(-1)
        return jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0], entropy

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        reference = jax.tree.map(lambda p: p + 0.02 * rng.normal(size=p.shape), policy.params)
        (old, _), (near, _) = score(policy.params), score(reference)
        weights = np.minimum(np.exp(old - behavior), 1.5)

        def loss(params):
            logps, entropy = score(params)
            ratio = jnp.exp(logps - old)  # at 1, where clipping changes nothing
            per_token = -advantages * ratio * weights + 0.3 * (logps - near) ** 2 / 2
            return jnp.where(scored, per_token - 0.2 * entropy, 0).sum()

        expected = jax.grad(loss)(policy.params)
        learner = new_learner(policy, form=REGULARIZED, reference=reference, min_signal_groups=100)
        metrics = learner.learn(groups, prompts=6)
        assert_close(learner.state.gradients, expected, 1e-7)  # packed in float32
        assert metrics["groups/with_signal"] == learner.progress.signal_groups == 5
        assert metrics["update/tokens_saved"] == 0  # the silent group has a divergence too


def test_epochs_are_passes_over_the_minibatches(policy64):
    groups = random_groups(8)
    form = LossForm(clip=0.2)
    twice, by_hand = new_learner(policy64, form=form, epochs=2), new_learner(policy64, form=form)
    metrics = twice.learn(groups, prompts=8)
    for _ in range(2):
        by_hand.learn(groups, prompts=8)
    assert metrics["optimizer_steps"] == twice.policy.version == 2
    assert_close(twice.state.params, by_hand.state.params, 1e-12)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(policy64):
    good = random_groups(4)
    bad = random_groups(4, seed=1)
    bad[2].advantages = np.array([np.inf] * len(bad[2].suffixes))
    told = []
    learner = new_learner(policy64, max_nonfinite=2, on_nonfinite=lambda *args: told.append(args))
    other = new_learner(policy64)
    learner.learn(good, prompts=4)
    other.learn(good, prompts=4)
    before = leaves((learner.state.params, learner.state.opt_state))
    metrics = learner.learn(bad, prompts=4)
    assert not np.isfinite(metrics["grad_norm"])
    assert (metrics["optimizer_steps"], metrics["skipped_updates"]) == (0, 1)
    assert learner.policy.version == learner.progress.nonfinite == 1
    assert told == [(1, [bad[2]])]
    after = leaves((learner.state.params, learner.state.opt_state))
    assert all(map(np.array_equal, before, after))
    # A good step starts the count again, and nothing of the bad gradient is left in it.
    learner.learn(good, prompts=4)
    other.learn(good, prompts=4)
    assert_close(learner.state.params, other.state.params, 0)
    assert learner.progress.nonfinite == 0
    learner.learn(bad, prompts=4)
    with pytest.raises(RunError, match="2 gradients in a row"):
        learner.learn(bad, prompts=4)
    assert_close(learner.state.params, other.state.params, 0)


def test_a_group_whose_gradient_alone_is_not_finite_is_found(policy64):
    """Its advantages are finite, and so is its loss; the update waits for several steps' groups."""
    groups = random_groups(6)
    ratio = [np.full(len(b), -1000.0, np.float32) for b in groups[4].behavior_logps]
    groups[4].behavior_logps, groups[4].advantages = ratio, -np.ones(len(ratio))
    told = []
    learner = new_learner(
        policy64,
        form=FORMS[2],
        min_signal_groups=6,
        on_nonfinite=lambda *args: told.append(args),
    )
    before = leaves(learner.state.params)
    for first in (0, 3):
        part = [dataclasses.replace(g, prompt=g.prompt - first) for g in groups[first : first + 3]]
        learner.learn(part, prompts=3)
    ((step, found),) = told
    assert (step, [g.prompt for g in found]) == (1, [1])
    assert found[0].behavior_logps is ratio
    assert all(map(np.array_equal, before, leaves(learner.state.params)))
    assert not any(leaf.any() for leaf in leaves(learner.state.gradients))


def test_the_policy_samples_between_updates(policy64, sampler):
    """Updates overwrite buffers, and never those of the current policy."""
    learner = new_learner(policy64, min_signal_groups=6)
    prompts = [g.prefix for g in random_groups(8)]
    for step, count in enumerate((4, 4, 8)):  # a wait, a step, a step
        drawn = sampler.sample(
            learner.policy,
            prompts[:count],
            rows=ROWS,
            stream=Stream(1, step),
            temperature=TEMPERATURE,
            max_new=SUFFIX,
        )
        groups = [
            Group(
                prompt=n,
                prefix=prefix,
                suffixes=[drawn.suffix(n, k) for k in range(ROWS)],
                behavior_logps=[
                    drawn.behavior_logps[n, k, : drawn.lengths[n, k]] for k in range(ROWS)
                ],
                rewards=np.zeros(ROWS),
                advantages=np.array([1.0, 0.5, 0.5, -2.0]),
            )
            for n, prefix in enumerate(drawn.prefixes)
        ]
        metrics = learner.learn(groups, prompts=count)
        assert metrics["logp_gap"] < 1e-6  # behaviour log-probabilities are packed in float32
        assert learner.policy.version == (0, 1, 2)[step]
        assert np.isfinite(learner.policy.logits([[1, 2, 3]])).all()
