"""When the optimizer steps, and at which rate: minibatches, epochs, the wait for signal, schedules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_update import SMALL, TEMPERATURE, assert_close, leaves, random_groups

from jaxreset.config import Optimizer
from jaxreset.config_file import parse_config
from jaxreset.learning.form import LossForm
from jaxreset.learning.learner import Learner, Minibatch, turns
from jaxreset.learning.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("hasty")
repeatable = settings(derandomize=True, deadline=None, max_examples=100)


def new_learner(policy, *, optimizer=None, **train):
    """A learner as a run has it, clipped, on its own copy of the policy."""
    config = parse_config(
        {
            "objective": "grpo",
            "train": {"prompts_per_step": 4, "min_signal_groups": 0} | train,
            "sampling": {"temperature": float(TEMPERATURE)},
            "loss": {"clip": 0.2},
            "optimizer": {"learning_rate": 1e-2} | (optimizer or {}),
        }
    )
    policy = policy.with_params(jax.tree.map(jnp.array, policy.params), 0)
    return Learner(config.make_learner_settings(), policy, config.loss.make(), [SMALL])


def learn(learner, groups, prompts=4):
    """One step of a run: the loop counts it."""
    metrics = learner.learn(groups, prompts)
    learner.progress = learner.progress._replace(step=learner.progress.step + 1)
    return metrics


# The wait for signal


class Counted(Minibatch):
    """A minibatch of which only the counts matter."""

    signal = property(lambda self: self.groups)


@repeatable
@given(
    signals=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    epochs=st.integers(1, 3),
    least=st.integers(0, 9),
    before=st.integers(0, 8),
)
def test_a_group_counts_once_in_each_update_and_repeats_end_with_the_step(
    signals, epochs, least, before
):
    minibatches = [Counted(s, [], 4.0) for s in signals]
    before = min(before, max(least - 1, 0))  # more would have opened the gate
    rest = {"signal": before, "normalizer": 4.0 * bool(before)}
    found = turns(minibatches, epochs=epochs, least=least, **rest)
    first = [t for t in found if t.pass_ < len(signals)]
    assert [t.minibatch for t in first] == minibatches  # all are learnt from, in their order
    waiting, signal = [], before
    for turn in found:
        number = turn.pass_ % len(signals)
        assert number not in waiting
        waiting.append(number)
        signal += signals[number]
        assert turn.steps == (signal >= least)
        if turn.steps:
            waiting, signal = [], 0
    # What is left for the next step was never in an update before.
    last = max((t.pass_ for t in found if t.steps), default=-1)
    assert all(t.pass_ < len(signals) for t in found if t.pass_ > last)
    if epochs == 1:
        assert found == first
    if least == 0:
        assert len(found) == epochs * len(signals)


@pytest.mark.slow
def test_a_second_epoch_does_not_open_the_gate_with_the_same_groups(policy64):
    groups = random_groups(4, silent=(1, 2))
    learner = new_learner(policy64, epochs=2, min_signal_groups=4)
    once = new_learner(policy64, epochs=1, min_signal_groups=4)
    metrics = learn(learner, groups)
    assert metrics["optimizer_steps"] == learner.progress.version == 0
    assert learner.progress.signal_groups == 2
    assert learner.progress.normalizer == sum(len(g.suffixes) for g in groups)
    learn(once, groups)
    assert_close(learner.state.gradients, once.state.gradients, 0)
    np.testing.assert_equal(learner.progress, once.progress)
    # Two more open it; they alone are passed over again, and are too few for another update.
    more = random_groups(4, seed=1, silent=(0, 3))
    for one in (learner, once):
        assert learn(one, more)["optimizer_steps"] == 1
        assert (one.progress.signal_groups, one.progress.normalizer) == (0, 0)
    assert_close(learner.state.params, once.state.params, 0)
    assert not any(x.any() for x in leaves(learner.state.gradients))


def test_what_an_earlier_minibatch_left_is_in_the_next_update_once(policy64):
    """Signal in 3 and 2 of two minibatches: one update takes the first, and one both."""
    groups = random_groups(8, silent=(0, 5, 6))
    sizes = {"prompts_per_step": 8, "minibatch_prompts": 4, "min_signal_groups": 3}
    learner, by_hand = new_learner(policy64, epochs=2, **sizes), new_learner(policy64, **sizes)
    metrics = learner.learn(groups, 8)
    assert metrics["optimizer_steps"] == 2
    assert learner.progress.signal_groups == 0  # the second minibatch isn't passed over in vain
    first, second = groups[:4], [g for g in groups if g.prompt >= 4]
    for part in (first, second, first):
        by_hand._apply(0) if by_hand.progress.signal_groups >= 3 else None
        by_hand._accumulate(by_hand._prepare(part))
    assert by_hand.progress.signal_groups == 5
    by_hand._apply(0)
    assert_close(learner.state.params, by_hand.state.params, 1e-12)


# The rate


def rates(optimizer, steps, places):
    settings = Optimizer(learning_rate=0.5, **optimizer).make(steps)
    made = [
        learning_rate(np.int32(updates), np.int32(position), settings=settings)
        for updates, position in places
    ]
    return np.array(made)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_ends_with_the_last_update(schedule, warmup):
    """Where each pass over a minibatch ends with an update, it is optax's of their count."""
    options = {"schedule": schedule, "warmup_steps": warmup}
    found = rates(options, 100, [(n, n) for n in range(101)])
    after = {
        "constant": optax.constant_schedule(0.5),
        "linear": optax.linear_schedule(0.5, 0, 100 - warmup),
        "cosine": optax.cosine_decay_schedule(0.5, 100 - warmup),
    }[schedule]
    ramp = optax.linear_schedule(0.5 / max(warmup, 1), 0.5, max(warmup - 1, 1))
    expected = optax.join_schedules([ramp, after], [warmup])
    np.testing.assert_allclose(found, [expected(n) for n in range(101)], rtol=1e-5, atol=1e-7)
    assert (found[:100] > 0).all()
    assert found[100] == pytest.approx(0.5 if schedule == "constant" else 0, abs=1e-7)


def test_where_updates_wait_the_rate_falls_with_the_training_and_rises_with_them():
    options = {"schedule": "cosine", "warmup_steps": 4}
    found = rates(options, 100, [(n, 10 * n + 9) for n in range(10)])  # one in ten
    every = rates(options | {"warmup_steps": 0}, 96, [(0, max(10 * n + 5, 0)) for n in range(10)])
    np.testing.assert_allclose(found, every * np.minimum((np.arange(10) + 1) / 4, 1), rtol=1e-5)


# By hand: in the first step nothing, then an update by the first minibatch, then by the second.
@pytest.mark.parametrize(
    ("least", "places"), [(0, [(3, 3), (7, 7), (11, 11)]), (5, [(0, 1), (0, 4), (1, 9)])]
)
def test_the_learner_follows_the_schedule_through_minibatches_and_epochs(policy64, least, places):
    """Three steps of 2 × 2 passes; a learner that goes on from the saved numbers does the same."""
    options = {
        "optimizer": {"schedule": "cosine", "warmup_steps": 2},
        "steps": 3,
        "minibatch_prompts": 2,
        "epochs": 2,
        "min_signal_groups": least,
    }
    learner = new_learner(policy64, **options)
    assert learner.settings.optimizer.steps == 12
    shown = []
    for step in range(3):
        if step == 2:  # as from a checkpoint
            saved = jax.tree.map(jnp.array, learner.state), learner.progress
        metrics = learn(learner, random_groups(4, seed=step))
        assert metrics["optimizer_steps"] == ([0, 1, 1][step] if least else 4)
        shown.append(metrics["learning_rate"])
    settings = learner.settings.optimizer
    expected = [learning_rate(np.int32(a), np.int32(b), settings=settings) for a, b in places]
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    again = new_learner(policy64, **options)
    again.state, again.progress = saved
    learn(again, random_groups(4, seed=2))
    assert_close(again.state, learner.state, 0)


def test_an_update_is_scaled_by_the_rate_of_its_position():
    """AdamW at a constant rate gives the step of rate 1, and the schedule's share of it is taken."""
    params = {"w": jnp.arange(1.0, 4.0)}
    gradient = {"w": jnp.array([0.1, -0.2, 0.3])}
    optimizer = make_optimizer(Optimizer(learning_rate=0.5, schedule="linear").make(10))
    plain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1.0, b1=0.9, b2=0.999, weight_decay=0.01)
    )
    unit, _ = plain.update(gradient, plain.init(params), params)
    for position, rate in ((0, 0.5), (4, 0.3), (9, 0.05)):
        state = optimizer.init(params)
        updates, state = optimizer.update(gradient, state, params, position=position)
        np.testing.assert_allclose(updates["w"], rate * unit["w"], rtol=1e-6)
        assert optax.tree.get(state, "count", filtering=lambda p, _: "Schedule" in str(p)) == 1
    # Without a position it counts its own updates.
    updates, _ = optimizer.update(gradient, state, params)
    assert abs(updates["w"]).max() < 0.5


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_state_is_the_one_that_runs_have_saved(schedule):
    params = {"w": jnp.ones(3)}
    saved = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1.0))
    ).init(params)
    ours = make_optimizer(Optimizer(schedule=schedule).make(10)).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(saved)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, saved)


# The form


def test_a_ratio_that_would_count_twice_is_refused():
    with pytest.raises(ValueError, match=r"importance_cap=2.0 with clip=0.2 .* twice; recompute"):
        LossForm(clip=0.2, importance_cap=2.0)
    LossForm(clip=0.2, importance_cap=2.0, recompute=True)
    LossForm(importance_cap=2.0)
    values = {"loss": {"clip": 0.2, "importance_cap": 2.0, "ratio_to": "trainer"}}
    assert parse_config(values).loss.make().recompute


def test_the_papers_clip_counts_as_one():
    """Written out only when the config is resolved, it allows what needs a clip."""
    values = {"objective": "grpo", "method": "paper"}
    config = parse_config(
        values | {"train": {"epochs": 2}, "loss": {"ratio_to": "trainer", "importance_cap": 2.0}}
    )
    assert (config.loss.clip, config.loss.dual_clip, config.passes) == (0.2, 3.0, 2)
    assert parse_config(values | {"loss": {"dual_clip": 5.0}}).loss.dual_clip == 5.0
