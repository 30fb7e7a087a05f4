"""Which groups each objective draws, with a scripted policy in place of a model.

Scripts are written as in `scripted.written`: S a solution, 1-9 the first wrong step, 0 no step at
all, T a solution without its answer. Phase 0 is the base round; rung r asks in phase 1 + 2r and
resets in phase 2 + 2r.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    DRAW,
    EOS,
    POLICY,
    PROBLEMS,
    TASK,
    Run,
    ScriptedRounds,
    collect,
    decode,
    encode,
    prompts,
    written,
)

from jaxreset.groups import Group, set_advantages
from jaxreset.resets.collect import Collector
from jaxreset.resets.objectives import make_objective
from jaxreset.resets.rules import RULES, Cut, blamed_step
from jaxreset.tasks.base import Scores

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
PROMPT = TASK.prompt(PROBLEMS[0])
SOLUTION = written(PROBLEMS[0], "S")
LINES = SOLUTION.splitlines(keepends=True)
SRPO, PAPER = make_objective("srpo"), make_objective("srpo", method="paper")
TWO_BY_FOUR = make_objective("srpo", method="paper", layout="2x4")
ONE_BY_EIGHT = make_objective("srpo", method="paper", layout="1x8")


def suffixes(group: Group) -> list[str]:
    return [decode(s) for s in group.suffixes]


def texts(outcomes: str, kept: str = "", problem=PROBLEMS[0]) -> list[str]:
    return [written(problem, o, kept).removesuffix(EOS) for o in outcomes]


def assert_group(group: Group, outcomes: str, kept: str = "", *, together: int, reset=None):
    """A group of prompt 0, and that it is scored, cut and numbered as its outcomes say."""
    assert decode(group.prefix) == PROMPT + kept
    assert suffixes(group) == texts(outcomes, kept)
    assert group.rewards.tolist() == [float(o == "S") for o in outcomes]
    assert (group.normalized_with, group.reset_step) == (together, reset)


# ---- GRPO, and the layout 4+4 of ours ----


def test_grpo_draws_one_group_of_eight():
    run = collect(make_objective("grpo"), {0: "S12S30TS"})
    (group,) = run.groups
    assert_group(group, "S12S30TS", together=0)
    assert run.drawn == [("sample", 0, [0])]
    assert run.localizer.calls == 0
    assert run.tree["localizations"] == []


def test_what_a_group_holds_of_its_rows():
    run = collect(make_objective("grpo"), {0: "S123S0TC"})
    drawn = run.rounds.calls[0].drawn
    assert decode(run.groups[0].suffixes[5]) == ""
    assert [len(s) for s in run.groups[0].suffixes] == drawn.lengths[0].tolist()
    assert run.groups[0].suffixes[5].tolist() == encode(EOS).tolist()  # EOS carries the loss
    assert run.groups[0].cut.tolist() == [False] * 7 + [True]
    for row, logps in enumerate(run.groups[0].behavior_logps):
        expected = drawn.behavior_logps[0, row, : drawn.lengths[0, row]]
        np.testing.assert_array_equal(logps, expected)
        assert np.all(np.isfinite(logps))  # behind a row's end they are NaN


@pytest.mark.parametrize(
    ("base", "seed", "blamed"), [("2SSS", 0, 2), ("S3S1", 1, 3), ("0SS4", 3, 4), ("T222", 0, 3)]
)
def test_ours_keeps_the_seed_and_branches_before_the_blamed_step(base, seed, blamed):
    answers = {(0, 1, seed): f"\\boxed{{{blamed}}}"}  # any other question is a KeyError
    run = collect(SRPO, {0: base, 2: "S1S1"}, answers)
    kept = "".join(LINES[: blamed - 1])
    first, reset = run.groups
    assert_group(first, base, together=0)
    assert_group(reset, "S1S1", kept, together=2, reset=blamed)
    assert run.drawn == [("sample", 0, [0]), ("resume", 2, [0])]
    (question,) = run.localizer.questions
    steps = written(PROBLEMS[0], base[seed]).removesuffix(EOS).splitlines()
    assert question.text == TASK.localization(PROBLEMS[0], steps)


@pytest.mark.parametrize("base", ["SSSS", "S0SS", "0000"])
def test_ours_tops_up_where_no_rollout_with_a_step_failed(base):
    run = collect(SRPO, {0: base, 2: "S12S"})
    assert_group(run.groups[0], base, together=0)
    assert_group(run.groups[1], "S12S", together=0)
    assert len(run.groups) == 2
    assert run.drawn == [("sample", 0, [0]), ("resume", 2, [0])]
    assert run.localizer.calls == 0


def test_a_topped_up_group_is_normalised_over_its_eight():
    run = collect(SRPO, {0: "SSSS", 2: "S12S"})
    set_advantages(run.groups, scale="std", size=(2, 8))
    rewards = np.array([1, 1, 1, 1, 1, 0, 0, 1])
    found = np.concatenate([g.advantages for g in run.groups])
    np.testing.assert_allclose(found, (rewards - rewards.mean()) / rewards.std(), rtol=1e-5)


def test_a_reset_group_is_normalised_apart():
    run = collect(SRPO, {0: "2SSS", 2: "S1S1"})
    set_advantages(run.groups, scale="std", size=(2, 8))
    np.testing.assert_allclose(run.groups[1].advantages, [1, -1, 1, -1], rtol=1e-5)
    np.testing.assert_allclose(run.groups[0].advantages[0], -(3**0.5), rtol=1e-5)


def test_what_a_reset_kept_may_be_learnt_from_too():
    script = {0: "3SSS", 2: "S4S4"}, {(0, 1, 0): "\\boxed{3}"}
    apart = collect(SRPO, *script)
    whole = collect(make_objective("srpo", mask="response"), *script)
    assert whole.drawn == apart.drawn
    assert whole.tree == apart.tree
    (base, reset), (_, suffix) = whole.groups, apart.groups
    assert base.suffixes[1].tolist() == apart.groups[0].suffixes[1].tolist()
    kept = suffix.prefix[len(base.prefix) :]
    assert decode(kept) == "".join(LINES[:2])
    assert reset.prefix.tolist() == base.prefix.tolist()
    seed = apart.rounds.calls[0].drawn.behavior_logps[0, 0, : len(kept)]
    for row in range(4):
        assert reset.suffixes[row].tolist() == [*kept.tolist(), *suffix.suffixes[row].tolist()]
        np.testing.assert_array_equal(
            reset.behavior_logps[row], np.concatenate([seed, suffix.behavior_logps[row]])
        )


def test_seeds_are_left_out_of_the_base_group_or_not_whatever_the_method():
    script = {0: "2SSSS", 2: "S1S1"}, {(0, 1, 0): "\\boxed{2}"}
    dropped = collect(make_objective("srpo", drop_seeds=True), *script)
    assert_group(dropped.groups[0], "SSSS", together=0)
    assert [row["reward"] for row in dropped.tree["seeds"]] == [0]
    paper = make_objective("srpo", method="paper", drop_seeds=False)
    kept = collect(paper, {0: "2SSS", 2: "S1S1"}, script[1])
    assert_group(kept.groups[0], "2SSS", together=0)


@pytest.mark.parametrize("answer", ["", "\\boxed{0}", "\\boxed{5}", "no idea", "\\boxed{1}"])
def test_an_answer_that_names_no_step_keeps_nothing(answer):
    run = collect(SRPO, {0: "S4SS", 2: "SSSS"}, answer)
    assert_group(run.groups[1], "SSSS", "", together=2, reset=1)
    assert run.out.metrics["reset/kept_tokens"] == 0
    assert run.out.metrics["reset/answer_boxed"] == float(answer == "\\boxed{1}")
    assert run.localizer.tokens == 7  # an answer that says nothing is paid for too


def test_the_oracle_resets_before_the_true_error_and_asks_nobody():
    run = collect(make_objective("srpo", rule="oracle"), {0: "S3SS", 2: "4S4S"})
    assert_group(run.groups[1], "4S4S", "".join(LINES[:2]), together=2, reset=3)
    assert run.localizer.calls == 0


def test_fresh_draws_four_more_from_the_prompt_and_normalises_them_apart():
    run = collect(make_objective("rrpo", rule="fresh"), {0: "S3SS", 2: "4S4S"})
    assert_group(run.groups[0], "S3SS", together=0)
    assert_group(run.groups[1], "4S4S", together=2, reset=1)


@pytest.mark.parametrize(
    ("method", "draws", "number"), [("ours", "SS4S", 2), ("paper", "SSSSSS4SSSSS", 6)]
)
def test_random_resets_are_those_of_the_seeded_rule(method, draws, number):
    objective, found = make_objective("rrpo", method=method), set()
    for step in range(12):
        run = collect(objective, {0: draws, 2: "SSSS"}, seed=9, step=step)
        expected = int(np.random.default_rng((9, step, 1, 0, number)).integers(1, 5))
        assert run.resets[0].reset_step == expected
        assert {call.stream[:2] for call in run.rounds.calls} == {(9, step)}
        found.add(expected)
    assert found == {1, 2, 3, 4}


def test_the_self_rule_needs_a_localizer():
    to = Collector(SRPO, ScriptedRounds({0: {0: "1SSS"}}), TASK, decode)
    with pytest.raises(ValueError, match=r"reset\.rule=self asks the policy"):
        to.collect(POLICY, prompts(0), seed=0, step=1)


def test_a_rule_may_ask_about_some_failures_only(monkeypatch):
    def long_ones(failures, ask):
        long = [f for f in failures if len(f.steps) > 4]
        steps = iter(blamed_step(long, ask))
        return [next(steps) if len(f.steps) > 4 else 1 for f in failures]

    monkeypatch.setitem(RULES, "self", long_ones)
    script = {0: {0: "1SSS", 2: "SSSS"}, 1: {0: "SS3S", 2: "SSSS"}}
    run = collect(SRPO, script, {(1, 1, 2): "\\boxed{3}"})
    assert [g.reset_step for g in run.resets] == [1, 3]
    assert [len(tree["localizations"]) for tree in run.out.trees] == [0, 1]


# ---- the paper's layouts ----


@pytest.mark.parametrize(
    ("draws", "seed", "base"),
    [
        ("2SSSS", 0, "SSSS"),
        ("SSSS2", 4, "SSSS"),
        ("S3S1S", 1, "SS1S"),  # another failure stays
        ("0SS2S", 3, "0SSS"),  # a failure without a step is no seed, and stays
        ("SSSSSS2SSSSS", 6, "SSSS"),
        ("SSSSS3423SSS", 5, "SSSS"),
        ("SSSSSSSSSSS4", 11, "SSSS"),
        ("00000S0S2SSS", 8, "0000"),
        ("444444444444", 0, "4444"),
    ],
)
def test_paper_drops_the_seed_and_takes_the_first_four_others(draws, seed, base):
    answers = {(0, 1, seed): "\\boxed{2}"}  # any other question is a KeyError
    run = collect(PAPER, {0: draws, 2: "SS44"}, answers)
    assert_group(run.groups[0], base, together=0)
    assert_group(run.groups[1], "SS44", written(PROBLEMS[0], draws[seed])[:5], together=2, reset=2)
    assert len(run.groups) == 2
    more = [("sample", 0, [5])] if seed > 4 else []
    assert run.drawn == [("sample", 0, [0]), *more, ("resume", 2, [0])]
    assert [call.rows for call in run.rounds.calls] == [5, *[7] * len(more), 4]


@pytest.mark.parametrize("draws", ["SSSSSSSSSSSS", "S0SS0SSSSSSS", "000000000000"])
def test_paper_without_a_failure_makes_one_group_of_eight(draws):
    run = collect(PAPER, {0: draws, 2: "S2S2"})
    assert_group(run.groups[0], draws[:4], together=0)
    assert_group(run.groups[1], "S2S2", together=0)
    assert len(run.groups) == 2
    assert run.localizer.calls == 0
    assert run.out.metrics["reset/prompts"] == 0


@pytest.mark.parametrize(
    ("draws", "seeds"), [("23", (0, 1)), ("S3SSSSSSSS4S", (1, 10)), ("4SSSSSSSSSS3", (0, 11))]
)
def test_two_by_four(draws, seeds):
    answers = {(0, 1, seeds[0]): "\\boxed{3}", (0, 1, seeds[1]): "\\boxed{1}"}
    run = collect(TWO_BY_FOUR, {0: draws, 2: "SS44S2S2"}, answers)
    assert len(run.groups) == 2
    kept = written(PROBLEMS[0], draws[seeds[0]])[:10]
    assert_group(run.groups[0], "SS44", kept, together=1, reset=3)
    assert_group(run.groups[1], "S2S2", "", together=2, reset=1)
    resumed = [rows for verb, _, rows in run.drawn if verb == "resume"]
    assert sorted(row for rows in resumed for row in rows) == [0, 4]


@pytest.mark.parametrize("draws", ["SSSSSSSSSSSS", "SSSS2SSSSSSS", "2SSSSSSSSSS0"])
def test_two_by_four_with_too_few_failures(draws):
    run = collect(TWO_BY_FOUR, {0: draws, 2: "SS44S2S2"})
    assert_group(run.groups[0], "SS44", together=0)
    assert_group(run.groups[1], "S2S2", together=0)
    assert len(run.groups) == 2
    assert run.drawn[-1] == ("resume", 2, [0, 4])
    assert run.localizer.calls == 0


@pytest.mark.parametrize(("draws", "seed"), [("3", 0), ("SSSSSSSSSSS3", 11), ("0S2SSSSSSSSS", 2)])
def test_one_by_eight(draws, seed):
    run = collect(ONE_BY_EIGHT, {0: draws, 2: "SS44S2S2"}, {(0, 1, seed): "\\boxed{2}"})
    (group,) = run.groups
    assert_group(group, "SS44S2S2", written(PROBLEMS[0], draws[seed])[:5], together=1, reset=2)


def test_one_by_eight_without_a_failure():
    run = collect(ONE_BY_EIGHT, {0: "SSSSSSSSSSSS", 2: "SS44S2S2"})
    (group,) = run.groups
    assert_group(group, "SS44S2S2", together=0)


def test_only_prompts_that_lack_a_seed_draw_more():
    full = {0: "SSSSSSSSSSSS", 2: "SSSS"}
    script = {0: {0: "2SSSS", 2: "SSSS"}, 1: full, 2: {0: "SSSS1", 2: "SSSS"}, 3: full}
    run = collect(PAPER, script)
    assert [call.ids for call in run.rounds.calls[:2]] == [[0, 1, 2, 3], [1, 3]]
    # Seeds and tops-up of the first round go on together, in the order of the prompts.
    assert [call.ids for call in run.rounds.calls[2:]] == [[0, 1, 2, 3]]
    assert [g.prompt for g in run.groups] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_snapshots_of_two_rounds_are_resumed_round_by_round():
    script = {0: {0: "SSSSSS2SSSSS", 2: "SSSS"}, 1: {0: "3SSSS", 2: "1111"}}
    run = collect(PAPER, script)
    first, second = run.rounds.calls[:2]
    parents = [[s.round for s in call.snapshots] for call in run.rounds.calls[2:]]
    assert parents == [[second.drawn], [first.drawn]]
    assert [suffixes(g) for g in run.resets] == [
        texts("SSSS", LINES[0]),
        texts("1111", "line\n", PROBLEMS[1]),
    ]


# ---- what holds for every script ----

outcome = st.sampled_from("SSS12340TC")
scripts = st.fixed_dictionaries(
    {0: st.text(outcome, min_size=12, max_size=12), 2: st.text(outcome, min_size=8, max_size=8)}
)
blames = st.sampled_from(["", *(f"\\boxed{{{n}}}" for n in range(7))])


@repeatable
@given(
    script=st.fixed_dictionaries({0: scripts, 5: scripts, 7: scripts}),
    answer=blames,
    objective=st.sampled_from([SRPO, PAPER, TWO_BY_FOUR, ONE_BY_EIGHT, make_objective("rrpo")]),
)
def test_every_prompt_trains_on_eight_rollouts_and_every_token_is_counted(
    script, answer, objective
):
    batch = prompts(*script)
    run = collect(objective, script, answer)
    for n, prompt in enumerate(batch):
        mine = [g for g in run.groups if g.prompt == n]
        assert sum(len(g.rewards) for g in mine) == 8
        resets = [g for g in mine if g.reset_step is not None]
        assert len({g.normalized_with for g in mine}) == len(resets) + (len(mine) > len(resets))
        failed = [written(prompt.problem, o) for o in script[prompt.number][0] if o not in "S0"]
        for g in mine:
            np.testing.assert_array_equal(g.prefix[: len(prompt.tokens)], prompt.tokens)
            kept = decode(g.prefix[len(prompt.tokens) :])
            assert kept.count("\n") == (g.reset_step or 1) - 1
            assert not kept or any(response.startswith(kept) for response in failed)
            responses = [(prompt.problem, kept + decode(s)) for s in g.suffixes]
            assert TASK.score(responses).rewards.tolist() == g.rewards.tolist()
    metrics = run.out.metrics
    assert metrics["tokens/localizer"] == run.localizer.tokens
    assert metrics["tokens_sampled"] == run.rounds.tokens + run.localizer.tokens


@repeatable
@given(order=st.permutations([0, 1, 2, 3, 4]), kept=st.integers(1, 5))
@pytest.mark.parametrize(("name", "rule"), [("rrpo", "random"), ("ladder", "self")])
def test_a_prompts_groups_do_not_depend_on_its_batch(name, rule, order, kept):
    objective = make_objective(name, rule=rule)
    blamed = {(i, p, r): f"\\boxed{{{(i + p) % 4 + 1}}}" for i, p, r in np.ndindex(5, 6, 4)}
    base = ("4SS3", "3333", "3334", "4444", "S34S")
    script = {i: {0: b, 2: "4344", 4: "4S44"} for i, b in enumerate(base)}
    batch = collect(objective, script, blamed, batch=prompts(*order[:kept])).groups
    for n, index in enumerate(order[:kept]):
        alone = collect(objective, script, blamed, batch=prompts(index)).groups
        found = [g for g in batch if g.prompt == n]
        assert [(g.reset_step, decode(g.prefix), suffixes(g)) for g in found] == [
            (g.reset_step, decode(g.prefix), suffixes(g)) for g in alone
        ]


# ---- the ladder ----

LADDER = make_objective("ladder")


def steps(run: Run) -> list[int | None]:
    return [g.reset_step for g in run.groups]


def climb(blamed: dict[int, list[int]]) -> dict[tuple[int, int, int], str]:
    """Answers about prompt 0: phase -> the step blamed in each row."""
    return {(0, p, r): f"\\boxed{{{s}}}" for p, row in blamed.items() for r, s in enumerate(row)}


def test_ladder_climbs_from_the_deepest_failure_until_a_group_succeeds():
    script = {0: "2213", 2: "3343", 4: "44S4"}
    answers = climb({1: [2, 2, 1, 3], 3: [3, 3, 4, 3]})
    run = collect(LADDER, script, answers)
    assert steps(run) == [None, 3, 4]
    assert_group(run.groups[1], "3343", "".join(LINES[:2]), together=2, reset=3)
    assert_group(run.groups[2], "44S4", "".join(LINES[:3]), together=3, reset=4)
    base, rung1, rung2 = run.rounds.calls
    assert [(s.round, s.row) for s in rung1.snapshots] == [(base.drawn, 3)]
    assert [(s.round, s.row) for s in rung2.snapshots] == [(rung1.drawn, 2)]
    assert [call.stream.phase for call in run.rounds.calls] == [0, 2, 4]
    assert [(q.phase, q.row) for q in run.localizer.questions] == [
        (phase, row) for phase in (1, 3) for row in range(4)
    ]


@pytest.mark.parametrize("rungs", [1, 2, 3, 5])
def test_ladder_ends_after_its_rungs(rungs):
    script = {0: "4444"} | {2 + 2 * r: "4444" for r in range(rungs)}  # a rung more is a KeyError
    run = collect(make_objective("ladder", rungs=rungs), script)
    assert steps(run) == [None] + [2] * rungs
    assert [g.normalized_with for g in run.groups] == [0, *range(2, 2 + rungs)]


@pytest.mark.parametrize("base", ["S222", "SSSS", "0000"])
def test_ladder_leaves_alone_what_succeeds_or_has_no_step(base):
    run = collect(LADDER, {0: base})
    assert_group(run.groups[0], base, together=0)
    assert len(run.groups) == 1  # and nothing tops it up
    assert run.localizer.calls == 0


def test_ladder_on_any_failure_goes_on_while_any_rollout_fails():
    objective = make_objective("ladder", when="any_failure", rungs=5)
    answers = climb({1: [9, 2, 9, 3], 3: [2, 2, 3, 2], 5: [9, 9, 4, 9]})
    run = collect(objective, {0: "S2S3", 2: "4444", 4: "SS4S", 6: "SSSS"}, answers)
    assert steps(run) == [None, 3, 3, 4]
    asked = [(q.phase, q.row) for q in run.localizer.questions]
    assert asked == [(1, 1), (1, 3), (3, 0), (3, 1), (3, 2), (3, 3), (5, 2)]


@pytest.mark.parametrize(
    ("blamed", "row"), [([2, 4, 3, 4], 1), ([1, 1, 1, 1], 0), ([2, 3, 3, 1], 1), ([1, 2, 3, 4], 3)]
)
def test_deepest_is_the_largest_blamed_step_and_the_first_of_equals(blamed, row):
    run = collect(make_objective("ladder", rungs=1), {0: "4444", 2: "SSSS"}, climb({1: blamed}))
    (snapshot,) = run.rounds.calls[1].snapshots
    assert snapshot.row == row
    assert steps(run) == [None, blamed[row]]
    assert run.tree["groups"][1]["parent_row"] == row


def test_first_asks_about_the_first_failure_with_a_step_only():
    objective = make_objective("ladder", seed_choice="first", rungs=2)
    answers = {(0, 1, 1): "\\boxed{2}", (0, 3, 0): "\\boxed{3}"}
    run = collect(objective, {0: "0444", 2: "4444", 4: "4444"}, answers)
    assert steps(run) == [None, 2, 3]
    assert [call.snapshots[0].row for call in run.rounds.calls[1:]] == [1, 0]


def test_a_rung_may_go_back_into_the_kept_prefix():
    script = {0: "4444", 2: "4444", 4: "S4SS"}
    run = collect(LADDER, script, climb({1: [4, 1, 1, 1], 3: [2, 1, 2, 1]}))
    assert steps(run) == [None, 4, 2]
    assert_group(run.groups[1], "4444", "".join(LINES[:3]), together=2, reset=4)
    assert_group(run.groups[2], "S4SS", LINES[0], together=3, reset=2)
    # A branch is asked about as a whole: the kept steps, then its own.
    assert run.localizer.questions[4].text == run.localizer.questions[0].text


def test_prompts_that_have_finished_take_no_part_in_later_rungs():
    script = {
        0: {0: "4444", 2: "4444", 4: "4444", 6: "4444"},
        1: {0: "44S4"},
        2: {0: "1111", 2: "SSSS"},
        3: {0: "4444", 2: "4444", 4: "S444"},
    }
    run = collect(LADDER, script, "\\boxed{1}")
    resumed = [call.ids for call in run.rounds.calls[1:]]
    assert resumed == [[0, 2, 3], [0, 3], [0]]
    assert [g.prompt for g in run.groups] == [0, 0, 0, 0, 1, 2, 2, 3, 3, 3]
    asked = {(q.phase, q.prompt) for q in run.localizer.questions}
    assert asked == {(1, 0), (1, 2), (1, 3), (3, 0), (3, 3), (5, 0)}
    assert [len(tree["groups"]) for tree in run.out.trees] == [4, 1, 2, 3]


def test_an_oracle_ladder_never_goes_back():
    run = collect(
        make_objective("ladder", rule="oracle"), {0: "1211", 2: "2322", 4: "3433", 6: "4444"}
    )
    assert steps(run) == [None, 2, 3, 4]


# ---- metrics and the tree ----


def test_metrics():
    script = {0: {0: "S3SC", 2: "S4SS"}, 1: {0: "SSSS", 2: "1SSS"}, 2: {0: "1111", 2: "2111"}}
    answers = {(0, 1, 1): "\\boxed{3}", (2, 1, 0): "Step 2"}
    run = collect(SRPO, script, answers)
    found = run.out.metrics
    lengths = np.concatenate([call.drawn.lengths.ravel() for call in run.rounds.calls])
    assert found["tokens_sampled"] == lengths.sum() + 14
    assert found["tokens/localizer"] == 14
    assert found["response/drawn_tokens"] == pytest.approx(lengths.mean())
    assert found["response/cut"] == pytest.approx(1 / 24)
    assert found["reward/mean"] == pytest.approx((2 + 4 + 0) / 12)  # of the base round
    assert found["reset/prompts"] == pytest.approx(2 / 3)
    assert found["reset/step"] == pytest.approx((3 + 2) / 2)
    assert found["reset/kept_tokens"] == pytest.approx((10 + 5) / 2)
    assert found["reset/reward"] == pytest.approx((3 / 4 + 0) / 2)  # tops-up don't count
    assert found["reset/corrected"] == 0.5
    assert found["reset/answer_boxed"] == 0.5
    assert found["reset/blame_right"] == 0.5
    assert found["verifier/timeouts"] == 0
    assert all(isinstance(value, int | float) for value in found.values())


def test_draw_settings_reach_every_call():
    run = collect(LADDER, {0: "4444", 2: "4444", 4: "SSSS"})
    sampled, *resumed = (call.options for call in run.rounds.calls)
    assert sampled == DRAW
    assert resumed == [DRAW | {"release": True}] * 2


def test_the_tree_of_a_prompt():
    run = collect(SRPO, {0: "S3ST", 2: "S4S0"}, "Step 2 or \\boxed{3}")
    tree = json.loads(json.dumps(run.tree, allow_nan=False))
    rows = [
        {"text": SOLUTION, "reward": 1.0, "tokens": 19, "end": "answer"},
        {"text": texts("3")[0], "reward": 0.0, "tokens": 19, "end": "answer"},
        {"text": SOLUTION, "reward": 1.0, "tokens": 19, "end": "answer"},
        {"text": texts("T")[0], "reward": 0.0, "tokens": 16, "end": "eos"},
    ]
    branches = [
        {"text": SOLUTION, "reward": 1.0, "tokens": 9, "end": "answer"},  # kept text and drawn
        {"text": texts("4")[0], "reward": 0.0, "tokens": 9, "end": "answer"},
        {"text": SOLUTION, "reward": 1.0, "tokens": 9, "end": "answer"},
        {"text": "".join(LINES[:2]), "reward": 0.0, "tokens": 1, "end": "eos"},
    ]
    base = {"normalized_with": 0, "reset_step": None, "parent_group": None, "parent_row": None}
    base |= {"kept": "", "rows": rows}
    reset = {"normalized_with": 2, "reset_step": 3, "parent_group": 0, "parent_row": 1}
    reset |= {"kept": "".join(LINES[:2]), "rows": branches}
    question = {"group": 0, "row": 1, "answer": "Step 2 or \\boxed{3}", "step": 3, "truth": 3}
    assert tree == {
        "index": 0,
        "problem": "p0",
        "question": "a3b8c5",
        "groups": [base, reset],
        "localizations": [question],
    }


def test_trees_of_a_ladder_name_the_group_and_row_they_go_back_to():
    answers = climb({1: [1, 3, 2, 2], 3: [3, 3, 3, 4]})
    tree = collect(LADDER, {0: "4444", 2: "4444", 4: "SSSS"}, answers).tree
    assert [g["parent_row"] for g in tree["groups"]] == [None, 1, 3]
    asked = [(q["group"], q["row"], q["step"], q["truth"]) for q in tree["localizations"]]
    assert asked == [
        *((0, r, s, 4) for r, s in enumerate([1, 3, 2, 2])),
        *((1, r, s, 4) for r, s in enumerate([3, 3, 3, 4])),
    ]
    for parent, child in zip(tree["groups"], tree["groups"][1:], strict=False):
        assert parent["rows"][child["parent_row"]]["text"].startswith(child["kept"])


@pytest.mark.parametrize("draws", ["4SSSS", "SSSSSSS4SSSS"])
def test_rows_of_a_paper_tree_are_rows_of_its_groups(draws):
    tree = collect(PAPER, {0: draws, 2: "SSSS"}).tree
    _, reset = tree["groups"]
    (question,) = tree["localizations"]
    named = (
        (reset.get("parent_group", 0), reset["parent_row"]),
        (question["group"], question["row"]),
    )
    for group, row in named:
        assert group is None or row is None or tree["groups"][group]["rows"][row]["reward"] == 0


# ---- Few failed, steps that are written in, rewards apart ----


@pytest.mark.parametrize(("outcomes", "reset"), [("SSS2", True), ("SS22", False), ("2222", False)])
def test_few_failed_goes_on_from_a_rare_failure(outcomes, reset):
    objective = make_objective("rrpo", when="few_failed", rule="early")
    run = collect(objective, {0: outcomes, 2: "SSSS"})
    assert bool(run.resets) == reset
    if not reset:  # four more from the prompt, as where nothing failed
        assert [g.normalized_with for g in run.groups] == [0, 0]


def test_a_rule_sees_what_its_rollouts_come_from():
    seen = []

    def look(failures):
        seen.extend(failures)
        return [2 for f in failures]

    objective = dataclasses.replace(LADDER, rule=look, rungs=2, when="any_failure")
    run = collect(objective, {0: "3333", 2: "34SS", 4: "SSSS"})
    first, second = seen[0], seen[-1]
    assert first.cuts == ()
    assert second.cuts == (Cut(2, 0.5),)
    base = run.groups[0].behavior_logps[0]
    assert [len(x) for x in first.logps] == [len(encode(f"{s}\n")) for s in first.steps]
    np.testing.assert_array_equal(np.concatenate(first.logps), base)
    # What was kept has the log-probabilities of when it was drawn.
    kept = len(first.logps[0])
    np.testing.assert_array_equal(np.concatenate(second.logps)[:kept], base[:kept])
    drawn = run.groups[1].behavior_logps[seen.index(second) - 4]
    np.testing.assert_array_equal(np.concatenate(second.logps)[kept:], drawn)
    assert run.groups[1].parent == (0, 0)
    assert run.groups[2].parent[0] == 1


def test_demo_begins_with_a_reference_solution():
    objective = make_objective("rrpo", rule="demo")
    rounds = ScriptedRounds({0: {0: "S3SS", 2: "4SSS"}})
    rounds.stop = None
    to = Collector(
        objective, rounds, TASK, decode, draw=DRAW,
        write=lambda steps: encode("".join(f"{s}\n" for s in steps)),
    )  # fmt: skip
    out = to.collect(POLICY, prompts(0), seed=3, step=5)
    base, reset = out.groups
    kept = "".join(LINES[:2])
    assert decode(reset.prefix) == PROMPT + kept
    assert (reset.reset_step, reset.parent) == (3, None)  # of no rollout that learns
    call = rounds.calls[1]
    assert (call.verb, call.options["kept"]) == ("sample", [len(encode(kept))])
    assert out.trees[0]["groups"][1]["parent_row"] == 1  # the tree says whose failure it was
    assert base.rewards.tolist() == [1, 0, 1, 1]


def test_several_rewards_are_logged_apart():
    def score(items):
        own = np.array([float("{6}" in text) for _, text in items])
        short = np.array([1 / len(text) for _, text in items])
        return Scores(own + 0.5 * short, (), parts={"own": own, "short": short})

    to = Collector(
        make_objective("grpo"), ScriptedRounds({0: {0: "S3SSSSSS"}}), TASK, decode, draw=DRAW,
        score=score, failed_below=1.2,
    )  # fmt: skip
    out = to.collect(POLICY, prompts(0), seed=3, step=5)
    rows = out.trees[0]["groups"][0]["rows"]
    assert [row["rewards"]["own"] for row in rows] == [1, 0, 1, 1, 1, 1, 1, 1]
    assert out.metrics["reward/own"] == pytest.approx(7 / 8)
    assert out.metrics["reward/mean"] == pytest.approx(
        out.metrics["reward/own"] + 0.5 * out.metrics["reward/short"]
    )
    assert all(row["reward"] < 1.2 for row in rows)
