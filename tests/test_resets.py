"""Where a failed rollout is reset, how the policy is asked, and which objectives there are."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scripted import CHAIN_TOKENIZER, PROBLEMS, TASK, ScriptedRounds, encode, planted

from jaxreset.config_file import parse_config
from jaxreset.errors import RunError
from jaxreset.models.encoding import question_tokens
from jaxreset.resets.localize import PolicyLocalizer, ScoringLocalizer
from jaxreset.resets.objectives import Objective, make_objective
from jaxreset.resets.rules import (
    RULES,
    Cut,
    Failure,
    apply_rule,
    needs_of,
)
from jaxreset.sampling.rounds import Stream
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem
from jaxreset.tasks.localization import Answer, parse_answer
from jaxreset.tasks.math import MathTask

repeatable = settings(derandomize=True, deadline=None, max_examples=40)
DRAWN_RULES = ("random", "early")


def failure(steps=5, row=0, *, prompt=0, seed=0, step=0, phase=1, task=TASK):
    texts = [f"step {i}" for i in range(steps)]
    logps = [np.full(3, -0.5, np.float32) for _ in texts]
    return Failure(task, PROBLEMS[0], texts, (seed, step, phase, prompt, row), logps)


def never_ask(failures):
    raise AssertionError("this rule asks nobody")


ASKING = {name for name, rule in RULES.items() if needs_of(rule) == ("ask",)}


@pytest.mark.parametrize("rule", sorted(set(RULES) - ASKING - {"demo"}))
def test_only_some_rules_ask(rule):
    assert {"self", "matched"} == ASKING
    assert apply_rule(RULES[rule], [], never_ask) == []
    steps = apply_rule(RULES[rule], [failure(4, row) for row in range(6)], never_ask)
    assert len(steps) == 6
    assert all(type(step) is int and 1 <= step <= 4 for step in steps)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("rule", "last"), [("random", lambda n: n), ("early", lambda n: -(-n // 2))]
)
def test_drawn_steps_are_uniform(rule, last, count):
    draws = 1200
    failures = [failure(count, row, prompt=row // 7) for row in range(draws)]
    found = Counter(apply_rule(RULES[rule], failures, never_ask))
    outcomes = last(count)
    assert set(found) == set(range(1, outcomes + 1))
    expected = draws / outcomes
    assert all(abs(n - expected) < 4.5 * expected**0.5 for n in found.values()), found


@pytest.mark.parametrize("rule", DRAWN_RULES)
@pytest.mark.parametrize("name", ["seed", "step", "phase", "prompt", "row"])
def test_drawn_steps_depend_on_each_part_of_the_name(rule, name):
    def steps(value):
        return apply_rule(RULES[rule], [failure(9, **{name: value})], never_ask)

    assert steps(3) == steps(3)
    assert len({steps(value)[0] for value in range(30)}) >= 4


@pytest.mark.parametrize("rule", DRAWN_RULES)
@repeatable
@given(order=st.permutations(range(12)), kept=st.integers(1, 12))
def test_drawn_steps_do_not_depend_on_the_batch(rule, order, kept):
    failures = [failure(2 + i % 7, row=i % 4, prompt=i // 4) for i in range(12)]
    alone = [apply_rule(RULES[rule], [f], never_ask)[0] for f in failures]
    assert apply_rule(RULES[rule], [failures[i] for i in order[:kept]], never_ask) == [
        alone[i] for i in order[:kept]
    ]


def test_self_rule_asks_once_and_parses_each_answer_with_its_own_number_of_steps():
    asked = []

    def ask(failures):
        asked.append(list(failures))
        return ["\\boxed{3}", "\\boxed{3}", "", "Step 2"]

    failures = [failure(n, row) for row, n in enumerate((4, 2, 4, 2))]
    assert RULES["self"](failures, ask) == [3, 1, 1, 2]
    assert asked == [failures]


def test_self_rule_refuses_missing_answers():
    with pytest.raises(ValueError, match="longer than"):
        RULES["self"]([failure(), failure()], lambda failures: ["\\boxed{1}"])


@pytest.mark.parametrize("wrong", [1, 2, 3, 4])
def test_oracle_is_the_first_planted_error(wrong):
    steps = planted(PROBLEMS[0], wrong, 5)
    failed = Failure(TASK, PROBLEMS[0], steps, (0, 0, 1, 0, 0))
    assert apply_rule(RULES["oracle"], [failed, failed], never_ask) == [wrong, wrong]


def test_oracle_refuses_a_task_that_cannot_tell():
    task = SimpleNamespace(name="riddles", first_wrong_step=lambda problem, steps: None)
    with pytest.raises(ValueError, match=r"reset\.rule=oracle: the task 'riddles' can't tell"):
        apply_rule(RULES["oracle"], [failure(task=task)], never_ask)


def test_fresh_keeps_nothing():
    assert apply_rule(RULES["fresh"], [failure(n) for n in (1, 5, 9)], never_ask) == [1, 1, 1]


DEFAULT = Answer(1, "default")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{3}", Answer(3, "boxed")),
        ("\\boxed{ 3\t}", Answer(3, "boxed")),
        ("\\boxed{\n4\n}", Answer(4, "boxed")),
        ("\\boxed{03}", Answer(3, "boxed")),
        ("\\boxed{1} no, \\boxed{4}. Done", Answer(4, "boxed")),
        ("Step 2 shows it, but \\boxed{3}", Answer(3, "boxed")),
        ("\\boxed{3} and Step 2 follows from it", Answer(3, "boxed")),
        # The last box is not a step: the last mention counts, not an earlier box.
        ("\\boxed{0}", DEFAULT),
        ("\\boxed{0} so Step 2", Answer(2, "mention")),
        ("\\boxed{2} or \\boxed{0}", DEFAULT),
        ("Step 3 is the one: \\boxed{6}", Answer(3, "mention")),
        ("Step 3: \\boxed{5}", Answer(3, "mention")),
        ("\\boxed{5}", DEFAULT),
        ("\\boxed{-2}", DEFAULT),
        ("\\boxed{2.5}", DEFAULT),
        ("\\boxed{Step 2}", Answer(2, "mention")),
        ("\\boxed{}", DEFAULT),
        ("\\boxed{three}", DEFAULT),
        ("\\boxed{\\text{3}}", DEFAULT),
        ("\\boxed{\\text{Step 3}}", Answer(3, "mention")),
        ("boxed{3}", DEFAULT),
        ("\\boxed{3", DEFAULT),
        # Without a box.
        ("", DEFAULT),
        ("  \n ", DEFAULT),
        ("The 3rd one.", DEFAULT),
        ("Step 2", Answer(2, "mention")),
        ("step\n 2 then STEP 4 fails", Answer(4, "mention")),
        ("**Step 2:** a3=3", Answer(2, "mention")),
        ("Step 12", DEFAULT),
        ("Step 2, as Step 12 shows", DEFAULT),
        ("Step 0", DEFAULT),
        ("misstep 3", DEFAULT),
        ("Step three", DEFAULT),
    ],
)
def test_parse_answer(text, expected):
    assert parse_answer(text, 4) == expected


def test_parse_answer_does_not_fall_back_to_an_earlier_box():
    assert parse_answer("\\boxed{2} no, \\boxed{\\text{4}}", 4) == DEFAULT


@pytest.mark.parametrize("text", ["\\boxed{%s}", "Step %s"])
def test_parse_answer_survives_a_policy_that_repeats_a_digit(text):
    assert parse_answer(text % ("9" * 5000), 4) == DEFAULT


@repeatable
@given(
    text=st.lists(
        st.sampled_from(["\\boxed{", "}", "Step ", "step", "1", "0", "7", " ", "\n", "x"])
    ),
    steps=st.integers(1, 9),
)
def test_parse_answer_is_always_a_step_and_the_last_good_box_wins(text, steps):
    joined = "".join(text)
    assert 1 <= parse_answer(joined, steps).step <= steps
    assert parse_answer(f"{joined}\\boxed{{{steps}}}", steps) == Answer(steps, "boxed")


# ---- asking the policy ----

QUESTIONS = ["a1?\n", "b2?\n", "a1b2c3?\n", "c3?\n", "d4?\n"]  # 4 tokens each, but for the third


NAMES = [(7, 0), (7, 2), (8, 1), (9, 4), (9, 0)]  # prompt and row of the rollouts asked about
# A task whose question is the first step, so that each test chooses its questions.
ECHO = SimpleNamespace(localization=lambda problem, steps: steps[0])


def failures_of(questions, steps, names):
    """Failures that `ECHO` asks these questions about."""
    return [
        Failure(ECHO, PROBLEMS[0], [question] * count, (3, 5, 1, *name))
        for question, count, name in zip(questions, steps, names, strict=True)
    ]


def asked_of(ask, policy, questions, steps, names=NAMES):
    """What a localiser answers to questions of their own; where the responses end doesn't matter."""
    return ask(policy, failures_of(questions, steps, names), [None] * len(questions))


def localize(script, batch):
    """Answers to `QUESTIONS`, the tokens drawn for them, and the sampler's calls."""
    rounds = ScriptedRounds(script)
    ask = PolicyLocalizer(
        rounds,
        Asking(ECHO, CHAIN_TOKENIZER),
        batch=batch,
        question_limit=4,
        temperature=0.3,
        top_p=0.9,
    )
    policy = SimpleNamespace(
        tokenizer=CHAIN_TOKENIZER,
        version=0,
        decode=lambda tokens: CHAIN_TOKENIZER.decode(tokens, skip_special_tokens=True),
    )
    answers, tokens = asked_of(ask, policy, QUESTIONS, [3] * 5)
    return answers, tokens, rounds.calls


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_policy_localizer_answers_do_not_depend_on_its_batch(batch):
    answers, tokens, calls = localize(lambda p, phase, row, _: f"\\boxed{{{row}}}{p}<eos>", batch)
    assert answers == ["\\boxed{0}7", "\\boxed{2}7", "", "\\boxed{4}9", "\\boxed{0}9"]
    assert tokens == 4 * 5  # the end-of-sequence token is drawn too
    assert [len(call.ids) for call in calls] == [min(batch, 4 - i) for i in range(0, 4, batch)]
    assert [i for call in calls for i in call.ids] == [7, 7, 9, 9]
    for call in calls:
        assert (call.stream, call.rows) == (Stream(3, 5, 1), 1)
        assert call.options == {"temperature": 0.3, "top_p": 0.9}


def test_policy_localizer_asks_nothing_when_all_questions_are_too_long():
    rounds = ScriptedRounds({})
    ask = PolicyLocalizer(
        rounds, Asking(ECHO, CHAIN_TOKENIZER), batch=4, question_limit=2, temperature=0.0, top_p=1.0
    )
    policy = SimpleNamespace(tokenizer=CHAIN_TOKENIZER)
    assert asked_of(ask, policy, ["a1b2\n"] * 3, [1, 1, 1], NAMES[:3]) == (["", "", ""], 0)
    assert rounds.calls == []


def boxed_logps(policy, question, count):
    """Teacher-forced log-probability of each `\\boxed{n}` after a question, one full pass each."""
    out = []
    for n in range(1, count + 1):
        answer = encode(f"\\boxed{{{n}}}")
        tokens = np.concatenate([encode(question), answer])
        logits = np.asarray(policy.logits(tokens[None]), np.float64)[0]
        logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        places = np.arange(len(tokens) - len(answer), len(tokens))
        out.append(logps[places - 1, tokens[places]].sum())
    return np.asarray(out)


def test_scoring_localizer_names_the_step_whose_answer_is_likeliest(policy32):
    ask = ScoringLocalizer(
        Asking(ECHO, CHAIN_TOKENIZER), most_steps=12, batch=2, question_limit=4, temperature=0.0
    )
    steps = [3, 12, 5, 1, 12]
    answers, tokens = asked_of(ask, policy32, QUESTIONS, steps)
    assert tokens == 0
    assert answers[2] == ""  # too long
    for n in (0, 1, 3, 4):
        logps = boxed_logps(policy32, QUESTIONS[n], steps[n])
        assert answers[n] == f"\\boxed{{{logps.argmax() + 1}}}"
    assert len(set(answers)) > 2


def test_scoring_localizer_draws_steps_by_their_answers_probabilities(policy32):
    count, temperature = 4000, 2.0
    ask = ScoringLocalizer(
        Asking(ECHO, CHAIN_TOKENIZER),
        most_steps=9,
        batch=1000,
        question_limit=4,
        temperature=temperature,
    )
    asked = [QUESTIONS[0]] * count, [6] * count, [(i, 0) for i in range(count)]
    answers, _ = asked_of(ask, policy32, *asked)
    assert answers == asked_of(ask, policy32, *asked)[0]
    drawn = np.bincount([int(a[7:-1]) for a in answers], minlength=7)[1:]
    logps = boxed_logps(policy32, QUESTIONS[0], 6) / temperature
    expected = np.exp(logps - np.logaddexp.reduce(logps)) * count
    assert stats.chisquare(drawn, expected).pvalue > 1e-3


def test_questions_are_raw_text_without_a_chat_template_and_in_it_with_one():
    np.testing.assert_array_equal(question_tokens(CHAIN_TOKENIZER, "a1?\n"), encode("a1?\n"))
    chat = copy.deepcopy(CHAIN_TOKENIZER)
    chat.chat_template = (
        "{% for m in messages %}={{ m.content }}={% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    tokens = question_tokens(chat, "a1?\n")
    np.testing.assert_array_equal(tokens, encode("=a1?\n=:"))
    assert tokens.dtype == np.int32


# ---- objectives ----


def test_objectives_stand_for_the_groups_of_the_design():
    assert make_objective("grpo") == Objective(rule=None, base=8, top_up=False)
    assert make_objective("grpo", method="paper") == make_objective("grpo")
    assert make_objective("rrpo") == Objective("random", base=4, resets=1, branches=4)
    assert make_objective("srpo") == Objective("self", base=4, resets=1, branches=4)
    assert make_objective("srpo", method="paper") == Objective(
        "self", base=4, resets=1, branches=4, drop_seeds=True
    )
    two_by_four = Objective("self", base=0, resets=2, branches=4, drop_seeds=True)
    one_by_eight = Objective("random", base=0, resets=1, branches=8, drop_seeds=True)
    for method in ("ours", "paper"):
        assert make_objective("srpo", method=method, layout="2x4") == two_by_four
        assert make_objective("rrpo", method=method, layout="1x8") == one_by_eight
    assert make_objective("ladder") == Objective(
        "self", 4, 1, 4, rungs=3, when="all_failed", seed_choice="deepest", top_up=False
    )


@pytest.mark.parametrize("rule", sorted(RULES))
def test_any_rule_goes_with_any_objective_that_resets(rule):
    for name in ("rrpo", "srpo", "ladder"):
        assert make_objective(name, rule=rule).rule == rule


@pytest.mark.parametrize(
    ("objective", "sizes"),
    [
        (make_objective("srpo"), (4, 8, 4)),
        (make_objective("srpo", method="paper"), (5, 8, 4)),
        (make_objective("srpo", layout="2x4"), (2, 8, 4)),
        (make_objective("srpo", layout="1x8"), (1, 8, 8)),
        (make_objective("grpo"), (8, 8, 8)),
        (make_objective("ladder", rungs=7), (4, 32, 4)),
    ],
)
def test_sizes_of_objectives(objective, sizes):
    assert (objective.first_draw, objective.rollouts, objective.most_in_group) == sizes


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("grpo", {"rule": "self"}, r"objective=grpo has no resets, .*'rule': 'self'.*leave"),
        ("grpo", {"rungs": 2}, r"objective=grpo has no resets, .*'rungs': 2"),
        ("grpo", {"when": "all_failed"}, r"'when': 'all_failed'"),
        ("grpo", {"seed_choice": "first"}, r"'seed_choice': 'first'"),
        ("ladder", {"method": "paper"}, r"objective=ladder with method=paper.*use method=ours"),
        ("ladder", {"layout": "2x4"}, r"layout=2x4: .*such as 4\+4"),
        ("ladder", {"layout": "1x8"}, r"layout=1x8: .*such as 4\+4"),
        ("rrpo", {"rungs": 2}, r"reset\.rungs=2: rrpo resets once; use objective=ladder"),
        ("srpo", {"rungs": 3}, r"reset\.rungs=3: srpo resets once; use objective=ladder"),
        ("srpo", {"method": "paper", "when": "all_failed"}, r"reset\.when=all_failed.*leave both"),
        ("srpo", {"method": "paper", "seed_choice": "deepest"}, r"seed_choice=deepest.*leave both"),
        ("srpo", {"layout": "2x4", "seed_choice": "deepest"}, r"without a base group"),
        ("rrpo", {"layout": "1x8", "when": "all_failed"}, r"without a base group"),
    ],
)
def test_refused_objectives(name, choices, message):
    with pytest.raises(ValueError, match=message):
        make_objective(name, **choices)


def test_layouts_may_have_other_sizes():
    assert make_objective("grpo", layout="8+8") == Objective(rule=None, base=16, top_up=False)
    wide = make_objective("srpo", method="paper", layout="16+16")
    assert (wide.first_draw, wide.rollouts, wide.max_draws) == (17, 32, 48)
    assert make_objective("ladder", layout="2+6").branches == 6


@pytest.mark.parametrize("layout", ["", "4", "4-4", "+4", "4+4+4"])
def test_a_layout_of_another_form_is_refused(layout):
    with pytest.raises(ValueError, match=r"reset\.layout=.*expected B\+K"):
        make_objective("grpo", layout=layout)


@pytest.mark.parametrize("layout", ["1+4", "4+1", "2x1", "0x4", "0+1"])
def test_a_group_of_one_is_refused(layout):
    with pytest.raises(
        ValueError, match=f"reset.layout={re.escape(layout)}: a group needs at least 2"
    ):
        make_objective("srpo", layout=layout)


def test_paper_localizes_greedily_for_one_by_eight():
    config = parse_config({"objective": "srpo", "method": "paper", "reset": {"layout": "1x8"}})
    assert config.reset.localizer.temperature == 0


# The rules that need no localiser, and the control for the one that does


def with_logps(*steps, row=0):
    made = failure(len(steps), row)
    return dataclasses.replace(made, logps=[np.array(x, np.float32) for x in steps])


def test_entropy_cuts_before_the_least_certain_token():
    cases = [
        (with_logps([-0.1], [-0.2, -3.0], [-2.9]), 2),
        (with_logps([-1.0], [-1.0]), 1),  # the first of equals
        (with_logps([], [-0.5]), 2),  # a step of no tokens is certain
        (with_logps([0.0, 0.0], [0.0]), 1),  # written in: certain
    ]
    assert apply_rule(RULES["entropy"], [f for f, _ in cases], never_ask) == [n for _, n in cases]


@repeatable
@given(steps=st.integers(1, 12), mistake=st.integers(1, 12), recovers=st.booleans(), data=st.data())
def test_bisect_finds_the_first_mistake(steps, mistake, recovers, data):
    """Where what is right succeeds and what is wrong fails, the cuts close in on the first mistake."""
    mistake = min(mistake, steps)
    cuts = []
    for _ in range(8):
        made = dataclasses.replace(failure(steps), cuts=tuple(cuts))
        (step,) = apply_rule(RULES["bisect"], [made], never_ask)
        cuts.append(Cut(step, 0.25 if step <= mistake else 0.0))
    assert cuts[-1].step == mistake
    assert len(dict.fromkeys(c.step for c in cuts)) <= 5  # of 12


def test_demo_shows_half_then_more_or_less_by_outcomes():
    solution = TASK.solution(PROBLEMS[0])  # three sums and the answer
    shown = []
    for cuts in (
        [],
        [Cut(3, 0.0)],
        [Cut(3, 0.5)],
        [Cut(3, 0.0), Cut(4, 0.0)],
        [Cut(3, 0.5), Cut(2, 1.0)],
    ):
        made = dataclasses.replace(failure(2), cuts=tuple(cuts))
        (start,) = apply_rule(RULES["demo"], [made], never_ask)
        assert list(start.steps) == solution[: len(start.steps)]
        shown.append(len(start.steps))
    assert shown == [2, 3, 1, 3, 0]


def test_demo_needs_a_reference_solution():
    made = failure(task=MathTask())
    with pytest.raises(
        RunError, match=r"reset\.rule=demo: the task 'math' has no reference solution"
    ):
        apply_rule(RULES["demo"], [made], never_ask)
    solved = Problem("p", "?", "6", solution="3 + 3 = 6.\n\nSo 6.\n#### 6")
    (start,) = apply_rule(RULES["demo"], [dataclasses.replace(made, problem=solved)], never_ask)
    assert start.steps == ("3 + 3 = 6.",)


def test_matched_has_the_positions_of_the_self_rule_and_nobody_its_own():
    lengths = [8, 8, 8, 8, 8, 8]
    failures = [failure(n, row) for row, n in enumerate(lengths)]
    blamed = [1, 2, 3, 4, 5, 6]

    def ask(asked):
        return [f"\\boxed{{{blamed[f.seed[4]]}}}" for f in asked]

    steps = apply_rule(RULES["matched"], failures, ask)
    assert sorted(steps) == blamed
    assert all(step != own for step, own in zip(steps, blamed, strict=True))
    assert apply_rule(RULES["matched"], failures[::-1], ask) == steps[::-1]  # whatever the order
    alone = apply_rule(RULES["matched"], failures[:1], never_ask)
    assert alone == apply_rule(RULES["random"], failures[:1], never_ask)


@repeatable
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=9), data=st.data())
def test_matched_keeps_to_shares_of_a_rollouts_steps(lengths, data):
    failures = [failure(n, row) for row, n in enumerate(lengths)]
    blamed = [data.draw(st.integers(1, n)) for n in lengths]
    steps = apply_rule(
        RULES["matched"], failures, lambda asked: [f"\\boxed{{{blamed[f.seed[4]]}}}" for f in asked]
    )
    assert all(1 <= step <= n for step, n in zip(steps, lengths, strict=True))
    # In each rollout the named share lies inside the chosen step; as shares they are a permutation.
    shares = sorted((b - 0.5) / n for b, n in zip(blamed, lengths, strict=True))
    chosen = sorted(((s - 1) / n, s / n) for s, n in zip(steps, lengths, strict=True))
    for low, _ in chosen:  # no more steps lie that late than shares do
        later = sum(first >= low for first, _ in chosen)
        assert sum(share >= low - 1e-9 for share in shares) >= later


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda failures: [1], "gave 1 steps for 2 failures"),
        (lambda failures: [1, 9], "gave 9 for a rollout of 5 steps"),
        (lambda failures: [1, 0], "gave 0 for a rollout of 5 steps"),
        (lambda failures: [1, 2.0], r"gave 2\.0 for a rollout"),
        (lambda failures: [True, 2], "gave True for a rollout"),
    ],
)
def test_what_a_rule_gives_is_checked(rule, said):
    with pytest.raises(RunError, match=said):
        apply_rule(rule, [failure(), failure(row=1)], never_ask)
