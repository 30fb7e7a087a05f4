"""When two answers are the same: pairs with their verdicts, and what holds for all answers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxreset.tasks.answers import answers_equal, final_answer, same_answer
from jaxreset.tasks.base import Problem
from jaxreset.tasks.math import MathTask

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "fixtures" / "answers.jsonl").read_text().splitlines()
]
# Right answers that are judged wrong, as docs/answers.md says; never the reverse.
NOT_RECOGNISED = [
    ("five", "5"),
    ("a dozen", "12"),
    ("1 hour 30 minutes", "90 minutes"),
    ("5 ft 3 in", "63 inches"),
    ("50 cents", "0.5"),
    (r"90^\circ", r"\frac{\pi}{2}"),
    ("11_2", "3"),
    ("1011", "1011_2"),
    (r"x = \pm 2", "x^2 = 4"),
    (r"\sin(n\pi)", "0"),
    ("1/xy", r"\frac{1}{xy}"),
    (r"\sqrt10", r"\sqrt{10}"),
    (r"2\frac32", "3"),
    ("5!!", "15"),
    ("3,14", "3.14"),
    ("4^{500000}", "2^{1000000}"),
    ("the answer is 18", "18"),
]


@pytest.mark.parametrize("equal", [True, False])
def test_pairs(equal):
    pairs = [pair for pair in PAIRS if pair["equal"] is equal]
    assert len(pairs) > 150
    wrong = [
        (pair["answer"], pair["gold"])
        for pair in pairs
        if answers_equal(pair["answer"], pair["gold"]) is not equal
    ]
    assert wrong == []


def test_it_never_matters_which_side_is_the_gold_one():
    asked = [(pair["answer"], pair["gold"]) for pair in PAIRS] + NOT_RECOGNISED
    assert [pair for pair in asked if answers_equal(*pair) != answers_equal(*pair[::-1])] == []


def test_what_is_documented_as_not_recognised_is_not():
    assert [pair for pair in NOT_RECOGNISED if answers_equal(*pair)] == []


def test_answers_of_different_pairs_mix_without_an_error():
    texts = [pair["answer"] for pair in PAIRS]
    for one, other in zip(texts, texts[7:] + texts[:7], strict=True):
        assert answers_equal(one, other) == answers_equal(other, one), (one, other)


# Spellings of a fraction: of its numerator n and denominator d, where they have them.


def spellings(value: Fraction) -> list[str]:
    sign, n, d = "-" * (value < 0), abs(value.numerator), value.denominator
    found = [f"{sign}{n}/{d}", rf"{sign}\frac{{{n}}}{{{d}}}", rf"$\dfrac{{{sign}{n}}}{{{d}}}$"]
    found += [f"x = {sign}{3 * n}/{3 * d}", f"({sign}{n}/{d})", f"**{sign}{n}/{d}**"]
    if n > d > 1:
        whole, rest = divmod(n, d)
        found += [f"{sign}{whole} {rest}/{d}", rf"{sign}{whole}\frac{{{rest}}}{{{d}}}"]
        found += [rf"{sign}{whole}\ {rest}/{d} cm"]
    if d == 1:
        grouped = f"{n:,}"
        found += [f"{sign}{n}", f"{sign}{grouped}", f"{sign}{n}.00", rf"{sign}{n} \text{{ cm}}"]
        found += [sign + grouped.replace(",", between) for between in (" ", r"\,", "{,}", "\u202f")]
    if 10**9 % d == 0:
        decimal = f"{sign}{n * 10**9 // d // 10**9}.{n * 10**9 // d % 10**9:09d}"
        found += [decimal, f"{decimal}0"]
        found += [rf"{decimal} \times 10^{{0}}"]
    return found


fractions = st.one_of(
    st.fractions(-40, 40, max_denominator=12),
    st.builds(Fraction, st.integers(-(10**8), 10**8)),
    st.builds(Fraction, st.integers(-(10**4), 10**4), st.sampled_from([10, 1000, 10**6, 10**9])),
)


@given(st.data(), fractions, fractions)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_a_number_is_itself_however_it_is_spelled_and_no_other(data, one, other):
    here, there = (data.draw(st.sampled_from(spellings(one))) for _ in range(2))
    elsewhere = data.draw(st.sampled_from(spellings(other)))
    assert answers_equal(here, there)
    assert answers_equal(here, elsewhere) == answers_equal(elsewhere, here) == (one == other)


@given(fractions, fractions, st.sampled_from(["cm", "km", "hours", r"\text{ apples}", "°C"]))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_a_unit_changes_no_number_and_two_units_differ(one, other, unit):
    written = f"{one} {unit}"
    assert answers_equal(written, str(one))
    assert answers_equal(written, f"{other} {unit}") == (one == other)
    assert not answers_equal(written, f"{one} kg")


@given(fractions, st.sampled_from(["thousand", "million", "tenths", "dozen", "hundred", "thirds"]))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_words_that_change_a_number_are_never_dropped(value, word):
    assume(value)
    assert not answers_equal(f"{value} {word}", str(value))
    assert not answers_equal(str(value), rf"{value} \text{{ {word}}}")


@given(st.text(alphabet="no yesABCxab12.,/-+^(){}\\$%", max_size=12), st.text(max_size=8))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_any_text_is_compared_without_an_error_and_in_both_directions(one, other):
    assert answers_equal(one, other) == answers_equal(other, one)
    if any(character.isalnum() for character in one):
        assert answers_equal(one, one)


@given(st.lists(fractions, min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_lists_have_no_order_and_points_have(values, random):
    shuffled = random.sample(values, len(values))
    joined, mixed = (", ".join(map(str, found)) for found in (values, shuffled))
    assert answers_equal(joined, mixed)
    assert answers_equal(f"({joined})", f"({mixed})") == (values == shuffled)
    assert not answers_equal(joined, f"{mixed}, 1/97")


def test_hostile_answers_are_read_in_bounded_time():
    hostile = [
        "(" * 3000 + "81" + ")" * 3000,
        "-" * 5000 + "1",
        "1+" * 2000 + "1",
        "1," * 4000,
        "9" * 100_000,
        "{" * 20_000,
        r"\text{" * 500 + "}" * 500,
        r"\sqrt{" * 50 + "2" + "}" * 50,
        "10000!!!!",
        r"10^{10^{10}}",
        "|" * 3000,
        "5 " + "cm " * 600,
        "a " * 2000,
        "1 " * 2000,
        r"\$" * 3000,
    ]
    for text in hostile:
        assert not answers_equal(text, "81"), text[:20]


# Several boxes


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"so $x = \boxed{1}$ or $x = \boxed{2}$.", "1, 2"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3"),
        (r"either \(\boxed{1}\) or \(\boxed{-3}\).", "1, -3"),
        (r"$x_1=\boxed{1}$, $x_2=\boxed{2}$", "1, 2"),
        (r"$$\boxed{1}\quad\text{and}\quad\boxed{2}$$", "1, 2"),
        ("\\boxed{1},\n\\boxed{2}", "1, 2"),
        (r"One root is \boxed{1} and the other is \boxed{2}.", "1, 2"),
        (r"\boxed{(1,2)} and \boxed{(3,4)}", "(1,2), (3,4)"),
        (r"\boxed{5}, and again, \boxed{5}", "5"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{1}. No wait, \boxed{2}", "2"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{1} but in fact \boxed{2}", "2"),
        (r"\boxed{1} is wrong and the answer is \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2}. So their sum is \boxed{3}.", "3"),
        (r"\boxed{1} + \boxed{2}", "2"),
        ("\\boxed{1}\n\\boxed{2}", "2"),
        (r"\boxed{1} and \boxed 2", "2"),
    ],
)
def test_boxes_of_one_sentence_are_one_list(text, answer):
    assert final_answer(text) == answer


def test_a_list_of_boxes_is_compared_as_a_list():
    assert same_answer(r"\boxed{1} and \boxed{2}", "1,2")
    assert same_answer(r"\boxed{2} or \boxed{1}", r"\{1, 2\}")
    assert not same_answer(r"\boxed{1} and \boxed{2}", "2")
    assert not same_answer(r"\boxed{1}. No, \boxed{2}", "1,2")


def test_workers_answer_what_only_sympy_reads():
    problem = Problem("half", "?", r"\frac12")
    responses = [r"\boxed{\int_0^1 x dx}", r"\boxed{\int_0^1 x^2 dx}", r"\boxed{\sum_{k=1}^{3} k}"]
    task = MathTask(processes=1)
    try:
        scores = task.score([(problem, response) for response in responses])
    finally:
        task.close()
    assert scores.rewards.tolist() == [1, 0, 0]
