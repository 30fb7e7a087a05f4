"""Values of states: against all continuations enumerated, and as advantages of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreset import Sampler, StopRules, Stream, step_values
from jaxreset.groups import Group, set_advantages
from jaxreset.learning.credit import credit_steps
from jaxreset.steps import replay

MOST, STEP, TOP_K = 9, 3, 2
PROMPTS = "a3b8c5\n", "a1b2\n"


def enumerated(policy, sampler, prompt, response):
    """The chance of each end of a response that begins so, top-k as the sampler cuts it."""
    ends, open_ = [], [(1.0, list(response))]
    while open_:
        chance, tokens = open_.pop()
        at = replay(sampler.automaton, np.array(tokens, np.int32), max_step_tokens=STEP)
        over = at.answered or MOST - len(tokens) < STEP  # where a step has ended
        at_end = bool(tokens) and tokens[-1] in policy.eos_ids
        if at_end or len(tokens) == MOST or (tokens and at.step_tokens == 0 and over):
            ends.append((chance, tokens))
            continue
        padded = np.zeros(len(prompt) + MOST, np.int32)
        padded[: len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits = np.asarray(policy.logits(padded[None])[0, len(prompt) + len(tokens) - 1])
        best = np.argsort(-logits)[:TOP_K]
        weights = np.exp(logits[best] - logits[best].max())
        for token, share in zip(best.tolist(), weights / weights.sum(), strict=True):
            open_.append((chance * share, [*tokens, token]))
    return ends


def even(response):
    """A reward that any response may earn or not."""
    return float((np.asarray(response) % 3 == 0).sum() % 2)


def test_values_are_those_of_all_continuations(policy64, tokenizer):
    sampler = Sampler.for_policy(
        policy64, StopRules(MOST, max_step_tokens=STEP), delimiter="\n", answer_marker="\\boxed{"
    )
    # Steps of at most 3 tokens, so that every attempt has some; no new one is begun without room for 3.
    prompts = [policy64.encode(text) for text in PROMPTS]
    round_ = sampler.sample(policy64, prompts, rows=3, stream=Stream(5), top_k=TOP_K)

    asked = []

    def score(groups, responses):
        asked.extend(groups)
        return [even(r) for r in responses]

    values = step_values(policy64, sampler, round_, score, branches=200, batch=4, top_k=TOP_K)
    scores = []
    for g, prompt in enumerate(prompts):
        for r in range(3):
            response = round_.response(g, r)
            spans = sampler.steps(response)
            assert len(values.means[g][r]) == len(spans) >= 2
            for n, (start, _) in enumerate(spans):
                ends = enumerated(policy64, sampler, prompt, response[:start])
                assert sum(chance for chance, _ in ends) == pytest.approx(1)
                exact = sum(chance * even(tokens) for chance, tokens in ends)
                mean, error = values.means[g][r][n], values.errors[g][r][n]
                # Of a mean of 0s and 1s; the estimate of the error is itself drawn.
                true_error = (exact * (1 - exact) / 200) ** 0.5
                assert error == pytest.approx(true_error, rel=0.5, abs=0.02)
                scores.append((mean - exact) / max(true_error, 1e-9))
        # The state before the first step is shared.
        assert len({values.means[g][r][0] for r in range(3)}) == 1
    assert np.abs(scores).max() < 4.5
    assert np.mean(np.square(scores)) < 2.5
    assert set(asked) == {0, 1}
    assert len(asked) % 200 == 0

    rewards = np.array([[even(round_.response(g, r)) for r in range(3)] for g in range(2)])
    for g, of_group in enumerate(values.advantages(rewards)):
        for r, advantages in enumerate(of_group):
            assert advantages.sum() == pytest.approx(rewards[g, r] - values.means[g][r][0])


def test_too_few_branches_are_refused(policy32):
    with pytest.raises(ValueError, match="branches=1: a standard error needs at least 2"):
        step_values(policy32, None, None, None, branches=1)


# ---- Credit by values ----


def group(rewards, *, prefix=3, lengths=None, parent=None, together=0, prompt=0):
    lengths = lengths or [6] * len(rewards)
    return Group(
        prompt=prompt,
        prefix=np.zeros(prefix, np.int32),
        suffixes=[np.ones(n, np.int32) for n in lengths],
        behavior_logps=[np.zeros(n, np.float32) for n in lengths],
        rewards=np.array(rewards, np.float64),
        normalized_with=together,
        parent=parent,
    )


def credited(*groups, scale="std"):
    set_advantages(groups, scale=scale, size=(8, 8))
    credit_steps(groups)
    return groups


SCALES = ["std", "sample_std", "mean", "loo", "none"]


@pytest.mark.parametrize("scale", SCALES)
def test_where_the_tree_has_one_level_credit_is_the_groups_advantage(scale):
    base, other = credited(group([1, 0, 0, 1]), group([0, 0, 1], prompt=1), scale=scale)
    assert base.token_advantages is None
    assert other.token_advantages is None


@pytest.mark.parametrize("scale", SCALES)
def test_a_kept_step_is_worth_what_it_adds(scale):
    """Row 1 failed, and from its first 2 tokens 3 of 4 succeed; its group's value is 1/4."""
    base, reset = credited(
        group([1, 0, 0, 0]), group([1, 1, 1, 0], prefix=5, parent=(0, 1), together=1), scale=scale
    )
    unit = {
        "std": 0.75**0.5 / 2,
        "sample_std": 0.5 + 1e-6,
        "mean": 0.25,
        "loo": 0.75,
        "none": 1.0,
    }[scale]
    expected = np.array([0.5, 0.5, -0.75, -0.75, -0.75, -0.75]) / unit
    np.testing.assert_allclose(base.token_advantages[1], expected, rtol=1e-5)
    for row in (0, 2, 3):
        np.testing.assert_array_equal(base.token_advantages[row], base.advantages[row])
    assert reset.token_advantages is None  # nothing goes on from it


def test_a_base_group_that_failed_altogether_learns_from_what_a_reset_found():
    base, reset = credited(
        group([0, 0, 0, 0]), group([0, 0, 0, 1], prefix=6, parent=(0, 2), together=1)
    )
    assert not base.advantages.any()
    assert base.has_signal
    np.testing.assert_allclose(base.token_advantages[2], [0.25] * 3 + [-0.25] * 3)
    assert not np.any(base.token_advantages[0])
    assert reset.has_signal


def test_rungs_share_out_between_one_another():
    """A second reset goes on from the first one's row, whose own tokens it is credited to."""
    base, first, second = credited(
        group([0, 0]),
        group([0, 0], prefix=4, parent=(0, 0), together=1),
        group([1, 0], prefix=7, parent=(1, 1), together=2),
        scale="none",
    )
    np.testing.assert_allclose(base.token_advantages[0], np.zeros(6))  # it led nowhere yet
    np.testing.assert_allclose(first.token_advantages[1], [0.5] * 3 + [-0.5] * 3)
    assert second.token_advantages is None


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rewards=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=6),
    children=st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=4)),
        max_size=3,
    ),
    scale=st.sampled_from(SCALES),
)
def test_parts_add_up_to_the_groups_advantage(rewards, children, scale):
    """Whatever the resets found, what a row's parts add up to is its reward's distance from the group's."""
    base = group(rewards)
    below = [
        group(r, prefix=3 + kept, parent=(0, 0), together=n)
        for n, (kept, r) in enumerate(children, 1)
    ]
    credited(base, *below, scale=scale)
    if base.token_advantages is None:
        assert not below
        return
    ends = [*sorted({kept for kept, _ in children if kept}), 6]
    begins = [0, *ends[:-1]]
    parts = [
        base.token_advantages[0][b] for b, e in zip(begins, ends, strict=True) if b < 6 and e > b
    ]
    if 6 not in {kept for kept, _ in children}:
        np.testing.assert_allclose(sum(parts), base.advantages[0], atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_cut_responses_are_credited_as_they_are_normalised(penalty):
    base, reset = group([1, 0, 0, 0]), group([1, 0], prefix=5, parent=(0, 1), together=1)
    base.cut = np.array([False, True, False, False])
    options = {"cut_penalty": penalty, "mask_cut": penalty == 0}
    set_advantages([base, reset], scale="none", size=(8, 8), **options)
    credit_steps([base, reset], **options)
    if penalty:
        value = (1 - penalty) / 4
        np.testing.assert_allclose(base.token_advantages[1][:2], 0.5 - value)
        np.testing.assert_allclose(base.token_advantages[1][2:], -penalty - 0.5)
    else:
        assert not base.token_advantages[1].any()
