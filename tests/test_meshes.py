"""One policy on meshes of eight devices: it draws, and learns, as on one device."""

from __future__ import annotations

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from model_helpers import as_olmo3, fixture_folder, random_policy
from test_sampling import assert_rounds_equal as assert_equal

from jaxreset.groups import Group
from jaxreset.learning.form import LossForm
from jaxreset.learning.microbatches import PackShape, pack
from jaxreset.learning.update import accumulate
from jaxreset.models import huggingface
from jaxreset.models.placement import param_shardings
from jaxreset.models.policy import load_policy
from jaxreset.parallel import check_sizes, make_mesh, rows_sharding
from jaxreset.run.compiles import compiles
from jaxreset.sampling.programs import Programs
from jaxreset.sampling.rounds import Shape, Snapshot, StopRules, Stream
from jaxreset.sampling.sampler import Sampler

pytestmark = pytest.mark.slow

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
ROOM = Shape(8, 4, 12, 24), Shape(16, 2, 36, 24)
DRAW = {"stream": Stream(40), "temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="module")
def policies(tokenizer):
    config = dataclasses.replace(TINY, heads=8, kv_heads=8, head_dim=4, tie_embeddings=False)
    configs = {"qwen2": config, "olmo3": as_olmo3(config, window=5)}
    return {name: random_policy(c, tokenizer, seed=3) for name, c in configs.items()}


@pytest.fixture(scope="module")
def policy(policies):
    return policies["qwen2"]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(4, 28, rng.integers(2, 13)) for _ in range(8)]


def make_sampler(automaton, mesh=None, shapes=ROOM):
    return Sampler(
        automaton,
        StopRules(max_response=24, max_steps=6, max_step_tokens=9),
        eos_ids=(1,),
        shapes=shapes[:1],
        forks=[shapes],
        mesh=mesh,
    )


def cuts_of(round_, groups):
    """Two points to go back to in each of these groups."""
    rng = np.random.default_rng(1)
    rows = [(group, int(rng.integers(4))) for group in groups for _ in range(2)]
    return [
        Snapshot(
            round_,
            group,
            row,
            int(round_.prompt_lengths[group] + rng.integers(round_.lengths[group, row])),
        )
        for group, row in rows
    ]


def gradient(policy, batch, mesh=None):
    """The loss and gradient of a microbatch."""
    zeros = jax.tree.map(jnp.zeros_like, policy.params)
    static = {"graph": policy.graph, "form": LossForm(), "remat": True, "mesh": mesh}
    args = zeros, policy.params, nnx.State({}), batch, np.float32(0.8)
    return accumulate(*args, **static)


@pytest.fixture(scope="module")
def on_one_device(policies, automaton, prompts):
    """What is drawn, from prompts and from half of the cuts; a microbatch of it; loss and gradient."""
    return cache(lambda name: _on_one_device(policies[name], automaton, prompts))


def _on_one_device(policy, automaton, prompts):
    sampler = make_sampler(automaton)
    round_ = sampler.sample(policy, prompts, rows=4, **DRAW)
    resumed = sampler.resume(policy, cuts_of(round_, range(0, 8, 2)), rows=2, **DRAW)
    rng = np.random.default_rng(2)
    groups = [
        Group(
            prompt=n,
            prefix=drawn.prefixes[n].astype(np.int32),
            suffixes=[drawn.suffix(n, k) for k in range(drawn.lengths.shape[1])],
            behavior_logps=[
                drawn.behavior_logps[n, k, : drawn.lengths[n, k]]
                for k in range(drawn.lengths.shape[1])
            ],
            rewards=np.zeros(drawn.lengths.shape[1]),
            advantages=rng.normal(size=drawn.lengths.shape[1]),
        )
        for drawn in (round_, resumed)
        for n in range(len(drawn.prefixes))
    ]
    (batch,) = pack(groups, [PackShape(16, 4, 36, 24)])
    return round_, resumed, batch, gradient(policy, batch)


@pytest.mark.parametrize(
    ("name", "sizes"), [*(("qwen2", sizes) for sizes in MESHES), ("olmo3", (2, 2, 2))], ids=str
)
def test_a_mesh_does_what_one_device_does(
    policies, automaton, prompts, on_one_device, name, sizes, hasty, monkeypatch
):
    mesh, policy = make_mesh(*sizes), policies[name]
    params = jax.device_put(policy.params, param_shardings(mesh, policy.params))
    spread, sampler = policy.with_params(params, policy.version), make_sampler(automaton, mesh)
    round_, resumed, batch, (expected, value) = on_one_device(name)

    drawn = sampler.sample(spread, prompts, rows=4, **DRAW)
    assert_rounds_equal(drawn, round_)
    keys = drawn.held[0].pages.stores[0][0].keys
    heads, groups = keys.shape[3] // sizes[2], keys.shape[1] // (sizes[0] * sizes[1])
    assert keys.sharding.shard_shape(keys.shape)[1:4:2] == (groups, heads)
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "prefill", None)  # branches start from what is held
        branches = sampler.resume(spread, cuts_of(drawn, range(0, 8, 2)), rows=2, **DRAW)
    assert_rounds_equal(branches, resumed)

    ours, total = gradient(spread, jax.device_put(batch, rows_sharding(mesh)), mesh)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


def test_more_of_one_shard_than_there_is_room_for_are_prefilled(
    policy, automaton, prompts, hasty, monkeypatch
):
    mesh = make_mesh(8, 1, 1)
    params = jax.device_put(policy.params, param_shardings(mesh, policy.params))
    spread, sampler = policy.with_params(params, policy.version), make_sampler(automaton, mesh)
    round_ = sampler.sample(spread, prompts, rows=4, **DRAW)
    cuts = cuts_of(round_, [3, 3, 5])
    apart = [
        sampler.resume(spread, some, rows=2, **DRAW) for some in (cuts[:2], cuts[2:4], cuts[4:])
    ]
    monkeypatch.setattr(Programs, "fork", None)
    together = sampler.resume(spread, cuts, rows=2, **DRAW)
    for name in ("tokens", "lengths", "reasons"):
        parts = np.concatenate([getattr(part, name) for part in apart])
        np.testing.assert_array_equal(getattr(together, name), parts)


def test_groups_are_cut_where_there_are_more_shards(policy, automaton, prompts, hasty):
    few, mesh = (Shape(4, 4, 12, 24), Shape(4, 2, 36, 24)), make_mesh(8, 1, 1)
    alone, sampler = make_sampler(automaton, None, few), make_sampler(automaton, mesh, few)
    params = jax.device_put(policy.params, param_shardings(mesh, policy.params))
    spread = policy.with_params(params, policy.version)
    sampler.compile(spread)
    expected = alone.sample(policy, prompts[:3], rows=4, ids=[7, 0, 2], **DRAW)
    resumed = alone.resume(policy, cuts_of(expected, [0, 2]), rows=2, **DRAW)
    before = compiles()
    drawn = sampler.sample(spread, prompts[:3], rows=4, ids=[7, 0, 2], **DRAW)
    assert_rounds_equal(drawn, expected)
    assert not drawn.held
    branches = sampler.resume(spread, cuts_of(drawn, [0, 2]), rows=2, **DRAW)
    assert_rounds_equal(branches, resumed)
    assert compiles() == before


assert_rounds_equal = partial(assert_equal, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 2, 4), "mesh.tensor 4 does not divide the model's 6 attention heads (6 / 4 = 1.50); 1, 2, 3"),
        ((4, 1, 2), "mesh.tensor 2 does not divide the model's 15 hidden units of an MLP"),
        ((1, 8, 1), "mesh.fsdp 8 does not divide the model's 20 numbers of a hidden state"),
    ],
)  # fmt: skip
def test_a_mesh_that_divides_no_weights_is_refused(sizes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_sizes(make_mesh(*sizes), heads=6, mlp=15, width=20)


def test_a_folder_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    folder = fixture_folder(tmp_path)
    monkeypatch.setattr(huggingface, "load_params", None)
    with pytest.raises(ValueError, match=r"mesh.tensor 8 does not divide the model's 4 attention"):
        load_policy(folder, mesh=make_mesh(1, 1, 8))
