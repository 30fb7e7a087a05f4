"""pass@k, majorities and intervals: against every choice enumerated, and against known truths."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from jaxreset.run.estimators import estimate, majority, pass_at_k, powers_of_two
from jaxreset.tasks.answers import answers_equal
from jaxreset.tasks.answers.normal import LONGEST, normal_form
from jaxreset.tasks.base import ANSWERED_WITHIN, Problem, Task
from jaxreset.tasks.math import MathTask

PROBLEM = Problem("p", "?", "1")
OUTCOMES = st.lists(st.booleans(), min_size=1, max_size=7)


@given(OUTCOMES)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(outcomes):
    for k in range(1, len(outcomes) + 1):
        choices = [any(choice) for choice in combinations(outcomes, k)]
        (estimated,) = pass_at_k(np.array([outcomes]), k)
        assert estimated == float(Fraction(sum(choices), len(choices)))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n responses, weighted by their chance, it is 1 - (1 - p)^k."""
    p, n = 0.3, 6
    every = np.array([*product([False, True], repeat=n)])
    chances = p ** every.sum(1) * (1 - p) ** (n - every.sum(1))
    for k in range(1, n + 1):
        assert chances @ pass_at_k(every, k) == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_pass_at_k_loses_nothing_where_there_are_many_responses():
    solved = np.zeros((3, 10_000), bool)
    solved[1, 5] = solved[2, :9_990] = True
    none, one, nearly_all = pass_at_k(solved, 100)
    assert (none, one) == (0.0, 0.01)
    assert nearly_all == 1.0
    assert pass_at_k(solved, 10)[2] == float(1 - Fraction(1, math.comb(10_000, 10)))


@pytest.mark.parametrize(
    ("most", "powers"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_pass_at_k_is_given_for_powers_of_two_and_for_all(most, powers):
    assert powers_of_two(most) == powers


@pytest.mark.parametrize(
    ("answers", "solved", "chance"),
    [
        ("6667", "1110", 1.0),
        ("6777", "1000", 0.0),
        ("6677", "1100", 0.5),
        ("678", "100", 1 / 3),
        ("6----", "10000", 1.0),  # who has no answer doesn't vote
        ("----", "0000", 0.0),
        ("----", "1111", 0.0),
        ("66677", "11000", 2 / 3),  # once a deadline fired on the right answer
        ("6", "1", 1.0),
    ],
)
def test_the_most_frequent_answer_is_right(answers, solved, chance):
    votes = [None if a == "-" else a for a in answers]
    assert majority(votes, [s == "1" for s in solved]) == pytest.approx(chance)


@given(st.lists(st.sampled_from(["6", "7", "8", None]), min_size=1, max_size=8), st.randoms())
@settings(derandomize=True, max_examples=100, deadline=None)
def test_tied_answers_are_equally_likely(answers, random):
    solved = [answer == "6" for answer in answers]
    counts = {a: answers.count(a) for a in {*answers} - {None}}
    tied = [a for a in counts if counts[a] == max(counts.values())]
    expected = tied.count("6") / len(tied) if tied else 0.0
    assert majority(answers, solved) == pytest.approx(expected)
    pairs = list(zip(answers, solved, strict=True))
    random.shuffle(pairs)
    assert majority(*zip(*pairs, strict=True)) == majority(answers, solved)


def test_with_one_response_each_the_interval_is_wilsons():
    for n in (1, 2, 5, 16, 40):
        for right in range(n + 1):
            values = np.arange(n) < right
            theirs = binomtest(right, n).proportion_ci(method="wilson")
            mean, low, high = estimate(values.astype(float))
            assert mean == right / n
            assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
            assert 0 <= low <= mean <= high <= 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_several_responses_narrow_an_interval_by_no_more_than_their_number(right):
    values = np.array(right) / 8
    mean, low, high = estimate(values, most=8)
    assert 0 <= low <= mean <= high <= 1
    assert high - low > 0
    width = estimate(values).high - estimate(values).low  # as if a problem were one trial
    least = binomtest(sum(right), 8 * len(right)).proportion_ci(method="wilson")
    assert least.high - least.low - 1e-12 <= high - low <= width + 1e-12


POPULATIONS = {
    "spread": lambda rng, n: rng.beta(0.5, 0.5, n),
    "alike": lambda rng, n: np.full(n, 0.3),
    "easy": lambda rng, n: rng.beta(8, 1, n),
    "a few solvable": lambda rng, n: (rng.random(n) < 0.05) * 0.8,
}
TRUE = {"spread": 0.5, "alike": 0.3, "easy": 8 / 9, "a few solvable": 0.04}


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize(("problems", "responses"), [(40, 4), (100, 16)])
def test_intervals_cover_the_truth(name, problems, responses):
    rng, covered = np.random.default_rng(0), []
    for _ in range(1000):
        chances = POPULATIONS[name](rng, problems)
        values = rng.binomial(responses, chances) / responses
        _, low, high = estimate(values, most=responses)
        covered.append(low <= TRUE[name] <= high)
    assert 0.925 <= np.mean(covered) <= 0.985


def test_an_interval_counts_problems_and_not_responses():
    """Where a problem is always solved or never, a hundred responses say no more than one."""
    values = np.repeat([0.0, 1.0], 10)
    assert estimate(values, most=100) == pytest.approx(estimate(values))


NUMBERS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "-", "+", "$", "- "]),
    st.integers(0, 12_000),
    st.sampled_from(["", ".", ".0", ".50", "%", r"\%", " cm", "$", r"^\circ"]),
)
FRACTIONS = st.builds(
    lambda form, over, under: form.format(over, under),
    st.sampled_from(
        [
            r"\frac{{{}}}{{{}}}",
            r"\dfrac{{{}}}{{{}}}",
            "{}/{}",
            "-{}/{}",
            r"-\frac{{{}}}{{{}}}",
            r"\frac{}{}",
        ]
    ),
    st.integers(0, 9),
    st.integers(0, 9),
)
OTHERS = st.sampled_from(
    [
        *("x", "x=5", "(1,2)", "(1, 2)", "1,234", "(1,234)", "1234", "{1,2}", r"\{1, 2\}"),
        *(
            "Tuesday",
            r"\text{Tuesday}",
            "**Tuesday**",
            r"2\sqrt{2}",
            r"2 \sqrt 2",
            r"[0,\infty)",
            r"\pi",
        ),
    ]
)
ANSWERS = NUMBERS | FRACTIONS | OTHERS


@given(ANSWERS, ANSWERS)
@settings(derandomize=True, max_examples=400, deadline=None)
def test_answers_of_one_normal_form_are_the_same(one, other):
    assert answers_equal(one, normal_form(one))
    if normal_form(one) == normal_form(other):
        assert answers_equal(one, other)


@pytest.mark.parametrize(
    "equal",
    [
        (r"\frac12", r"\dfrac{1}{2}", "1/2", "0.5", "0.50", "$.5$", "2/4"),
        ("1,080", "1080", "1080.", r"1\,080", "$1080$", "+1080", "1080.0"),
        (r"-\frac{3}{6}", "-1/2", "−0.5"),
        ("(1, 2)", "(1,2)", r"\left(1, 2\right)"),
        ("Tuesday", r"\text{Tuesday}", "**Tuesday**"),
    ],
)
def test_common_ways_of_writing_are_counted_together(equal):
    assert len({normal_form(text) for text in equal}) == 1


def test_the_answer_of_a_response_is_what_its_verifier_reads():
    plain, maths = Task(), MathTask(processes=1)
    text = "so \\boxed{7}, no:\n\\boxed{\\frac{2}{4}}\n"
    assert plain.answer(PROBLEM, text) == r"\frac{2}{4}"
    assert maths.answer(PROBLEM, text) == "1/2"
    for task in (plain, maths):
        assert task.answer(PROBLEM, "I give up") is None
        assert task.answer(PROBLEM, "\\boxed{") is None
        assert task.answer(PROBLEM, "\\boxed{ }") is None
        assert task.answer(PROBLEM, "#### 5") == "5"
    maths.delimiter = "</thought>"
    assert maths.answer(PROBLEM, "#### 1,080</thought>") == "1080"


def test_behind_another_marker_the_answer_is_the_rest_of_the_line():
    task = Task()
    task.answer_marker, task.delimiter = "Answer:", "</thought>"
    assert (
        task.answer(PROBLEM, "Answer: 3</thought>Answer: 4 apples </thought>more\n") == "4 apples"
    )
    assert task.answer(PROBLEM, "Answer:\n  B\nbecause") == "B"
    assert task.answer(PROBLEM, "\\boxed{5}") is None
    assert task.answer(PROBLEM, "Answer:") is None


MILLION = 10**6


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * (MILLION // 7),
        "\\boxed{1}" * (MILLION // 9),
        "\\boxed{" + "9" * MILLION + "}",
        "\\boxed{" + "\\text{" * 1000 + "}" * 1001,
        "\\boxed{" + "$" * 400 + "}",
        "\\boxed{" + "9" * 499 + "}",
        "\\boxed{\\frac{" + "9" * 240 + "}{" + "9" * 240 + "}}",
        "\\boxed" + " " * MILLION,
        ", " * (MILLION // 2) + "\\boxed{1}",
        "\\boxed{" + "9^" * 200 + "9}",
    ],
    ids=range(10),
)
def test_hostile_responses_cost_no_time(text):
    """They are read in the trainer's own process."""
    start = time.process_time()
    for task in (Task(), MathTask(processes=1)):
        answer = task.answer(PROBLEM, text)
        assert answer is None or len(answer) <= ANSWERED_WITHIN
    assert time.process_time() - start < 1.0


def test_long_answers_are_counted_as_they_stand():
    long = "1" + "0" * LONGEST
    assert normal_form(long) == long != normal_form(f"{long} ")
