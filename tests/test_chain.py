"""The embedded task: its problems, its checker, its demonstrations, its tokenizer."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import AUTOMATON, CHAIN_TOKENIZER, PROBLEMS, TASK, decode, encode, planted, written

from jaxreset.config_file import load_config
from jaxreset.steps import replay, split_steps
from jaxreset.tasks.base import Problem
from jaxreset.tasks.chain import ChainTask
from jaxreset.tasks.chain_problems import LETTERS
from jaxreset.tasks.localization import Answer, parse_answer

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
repeatable = settings(derandomize=True, deadline=None, max_examples=60)
problems = st.builds(
    lambda split, i: TASK.problems(split, 10_000)[i],
    st.sampled_from(["train", "test"]),
    st.integers(0, 9_999),
)


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- problems ----


def test_problems_are_the_same_on_every_machine():
    assert [(p.id, p.question, p.answer) for p in TASK.problems("train", 2)] == [
        ("train:0", "a6b5c2d3e0f0g0h1", "7"),
        ("train:1", "a5b7c9d0e1", "2"),
    ]
    assert [(p.id, p.question, p.answer) for p in TASK.problems("test", 2)] == [
        ("test:0", "a8b9c5d3e8f2", "5"),
        ("test:1", "a8b8c4", "0"),
    ]


def test_a_problem_depends_on_its_number_only():
    few, many = TASK.problems("train", 10), TASK.problems("train", 100_000)
    assert [few[i] for i in range(9, -1, -1)] == [many[i] for i in range(9, -1, -1)]
    assert len(few) == len(list(few)) == 10
    for outside in (10, -1):
        with pytest.raises(IndexError):
            few[outside]


def test_no_question_is_in_both_splits():
    short = ChainTask(min_terms=2, max_terms=3)  # 1100 questions: most of them are met
    train, test = ({p.question for p in short.problems(s, 2500)} for s in ("train", "test"))
    assert len(train) > 700
    assert 50 < len(test) < 200
    assert not train & test


def test_lengths_and_digits_are_those_asked_for():
    drawn = TASK.problems("train", 1500)
    lengths = Counter(len(p.question) // 2 for p in drawn)
    assert set(lengths) == set(range(3, 9))
    assert min(lengths.values()) > 1500 / 6 * 0.75
    digits = Counter("".join(p.question[1::2] for p in drawn))
    assert len(digits) == 10
    assert max(digits.values()) < 1.2 * min(digits.values())


@repeatable
@given(problem=problems)
def test_questions_are_lettered_numbers_and_answers_their_sum(problem):
    letters, numbers = problem.question[::2], problem.question[1::2]
    assert letters == "abcdefgh"[: len(numbers)]
    assert problem.answer == str(sum(map(int, numbers)) % 10)
    assert TASK.prompt(problem) == problem.question + "\n"


def test_too_few_questions_for_both_splits_are_refused():
    task = ChainTask(min_terms=3, max_terms=3, modulus=2)
    assert len(task.problems("train", 5)) == 5
    with pytest.raises(
        ValueError, match="none of the 8 questions is in the test split; allow more"
    ):
        task.problems("test", 5)


LONG = ChainTask(min_terms=26, max_terms=26, modulus=7)


def test_a_chain_has_up_to_26_numbers():
    [problem] = LONG.problems("train", 1)
    assert problem.question[::2] == "abcdefghijklmnopqrstuvwxyz"
    lines = LONG.solution(problem)
    assert len(lines) == 27
    assert lines[25:] == [
        f"z{problem.question[-1]}={problem.answer}",
        f"\\boxed{{{problem.answer}}}",
    ]
    assert LONG.first_wrong_step(problem, [*lines[:20], "u0=0", *lines[21:]]) == 21


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_terms": 27}, "max_terms=27: expected 1 <= min_terms <= max_terms <= 26, a letter"),
        ({"min_terms": 9}, "min_terms=9, max_terms=8: expected"),
        ({"min_terms": 0}, "min_terms=0"),
        ({"modulus": 11}, "modulus=11: expected 2 to 10"),
        ({"mistakes": 1.5}, "mistakes=1.5: expected a share of the sums, 0 to 1"),
        ({"mistakes": -0.1}, "mistakes=-0.1"),
        (
            {"misread": 5, "modulus": 5},
            "misread=5: expected 0 to 4, the largest number with modulus=5",
        ),
        ({"misread": -1}, "misread=-1: expected 0 to 9"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ChainTask(**settings)


# ---- the checker ----


@repeatable
@given(problem=problems, step=st.integers(1, 9), offset=st.integers(1, 9))
def test_solutions_score_one_and_planted_errors_are_found(problem, step, offset):
    right = TASK.solution(problem)
    assert len(right) == len(problem.question) // 2 + 1
    step = min(step, len(right))
    wrong = planted(problem, step, offset)
    texts = ["".join(f"{line}\n" for line in lines) for lines in (right, wrong)]
    scores = TASK.score([(problem, texts[0]), (problem, texts[1]), (problem, texts[0][:-1])])
    assert scores.rewards.tolist() == [1, 0, 1]
    assert scores.rewards.dtype == np.float64
    assert len(scores.timeouts) == 0
    assert TASK.first_wrong_step(problem, wrong) == step
    # What follows the first error doesn't matter.
    assert TASK.first_wrong_step(problem, [*wrong[:step], *right[step:]]) == step


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("\\boxed{6}\n", 1),  # only the last line counts
        ("a3=4\nb8=1\nc5=6\n\\boxed{6}", 1),
        ("a3=3\nb8=1\nc5=6\n\\boxed{7}\n", 0),
        ("a3=3\nb8=1\nc5=6\n", 0),
        ("a3=3\nb8=1\nc5=6\n\\boxed{6", 0),
        ("\\boxed{6}\na3=3\n", 0),
        ("c5=6\\boxed{6}\n", 0),
        ("\\boxed{6}}\n", 0),
        ("\\boxed{06}\n", 0),
        ("6\n", 0),
        ("\n", 0),
        ("", 0),
    ],
)
def test_scores(text, reward):
    assert TASK.score([(PROBLEMS[0], text)]).rewards.tolist() == [reward]


STRICT = dataclasses.replace(TASK, strict=True)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("a3=3\nb8=1\nc5=6\n\\boxed{6}\n", 1),
        ("a3=3\nb8=1\nc5=6\n\\boxed{6}", 1),
        (" a3=3\nb8=1 \nc5=6\n\\boxed{6}\n", 1),  # space around a step is nothing wrong
        ("\\boxed{6}\n", 0),  # a guess
        ("a3=4\nb8=2\nc5=6\n\\boxed{6}\n", 0),  # two errors that cancel
        ("a3=3\nb8=2\nc5=6\n\\boxed{6}\n", 0),
        ("a3=3\nc5=6\n\\boxed{6}\n", 0),  # a step left out
        ("a3=3\n\nb8=1\nc5=6\n\\boxed{6}\n", 0),
        ("a3=3\nb8=1\nc5=6\nd0=6\n\\boxed{6}\n", 0),
        ("a3=3\nb8=1\nc5=6\n\\boxed{7}\n", 0),
        ("a3=3\nb8=1\nc5=6\n", 0),
        ("", 0),
    ],
)
def test_strict_scores(text, reward):
    assert STRICT.score([(PROBLEMS[0], text)]).rewards.tolist() == [reward]


@repeatable
@given(problem=problems, changed=st.dictionaries(st.integers(1, 8), st.integers(0, 9), max_size=2))
def test_a_strict_reward_is_one_where_no_step_is_wrong(problem, changed):
    """Sums are replaced by any number, itself among them; the answer stays right."""
    right = TASK.solution(problem)
    lines = list(right)
    for step, number in changed.items():
        step = min(step, len(right) - 1)
        lines[step - 1] = f"{lines[step - 1][:-1]}{number}"
    item = problem, "".join(f"{line}\n" for line in lines)
    assert TASK.score([item]).rewards.tolist() == [1]
    assert STRICT.score([item]).rewards.tolist() == [lines == right]
    wrong = STRICT.first_wrong_step(problem, lines)
    assert lines[: wrong - 1] == right[: wrong - 1]
    assert (lines[wrong - 1] == right[wrong - 1]) == (lines == right)


def test_scores_keep_the_order_of_their_items():
    items = [(p, written(p, outcome)) for p in PROBLEMS for outcome in "1S2"]
    assert TASK.score(items).rewards.tolist() == [0, 1, 0] * 3
    assert TASK.score([]).rewards.shape == (0,)


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        (["a3=4"], 1),
        (["a3=3", "b8=2"], 2),
        (["a3=3", "b7=1"], 2),  # a number that isn't asked
        (["a3=3", "c5=8"], 2),  # a step left out
        (["a3=3", ""], 2),
        (["a3=3", "\\boxed{3}"], 2),  # answered too early
        (["a3=3", "b8=1", "c5=6", "d1=7"], 4),  # a number too many
        (["a3=3", "b8=1", "c5=6", "\\boxed{7}"], 4),
        (["a3=3", "b8=1", "c5=6", "\\boxed{6}", "a3=3"], 5),
        ([" a3=3 ", "b8=1\n", "c5=7"], 3),  # space around a step is nothing wrong
        # All right, but cut off: the last step.
        (["a3=3", "b8=1", "c5=6"], 3),
        (["a3=3"], 1),
        (["a3=3", "b8=1", "c5="], 3),
        ([], 1),
    ],
)
def test_first_wrong_step(steps, wrong):
    assert TASK.first_wrong_step(PROBLEMS[0], steps) == wrong


# ---- demonstrations and the localisation question ----


def test_localization_question():
    steps = ["a3=3", "b8=2", "c5=7", "\\boxed{7}"]
    assert TASK.localization(PROBLEMS[0], steps) == (
        "a3b8c5\n1:a3=3\n2:b8=2\n3:c5=7\n4:\\boxed{7}\n?\n"
    )
    assert TASK.localization(PROBLEMS[0], []) == "a3b8c5\n?\n"
    assert TASK.inline_localization(PROBLEMS[0], steps) == "?\n"


def test_an_inline_demonstration_asks_behind_the_attempt():
    fresh, inline = (
        TASK.demonstrate_localization(PROBLEMS[0], np.random.default_rng(0), inline=inline)
        for inline in (False, True)
    )
    assert fresh[1] == inline[1]
    numbered, steps = fresh[0].splitlines()[1:-1], inline[0].splitlines()[1:-1]
    assert numbered == [f"{n}:{step}" for n, step in enumerate(steps, 1)]
    assert inline[0] == "a3b8c5\n" + "".join(f"{step}\n" for step in steps) + "?\n"


def solutions(count, task=TASK):
    """(problem, prompt, completion) triples."""
    generator = rng()
    return [(p, *task.demonstrate_solution(p, generator)) for p in task.problems("train", count)]


def localizations(count, task=TASK):
    """The same, of localisation questions."""
    generator = rng()
    return [
        (p, *task.demonstrate_localization(p, generator)) for p in task.problems("train", count)
    ]


def test_demonstrated_solutions_err_at_the_rate_asked_for_and_carry_it_on():
    sums = wrong = 0
    for problem, prompt, completion in solutions(400):
        assert prompt == TASK.prompt(problem)
        lines = completion.removesuffix("\n").split("\n")
        right = TASK.solution(problem)
        assert [line[:2] for line in lines[:-1]] == [line[:2] for line in right[:-1]]
        totals = [0, *(int(line[-1]) for line in lines[:-1])]
        assert lines[-1] == f"\\boxed{{{totals[-1]}}}"  # the answer repeats the last sum
        for (before, after), line in zip(itertools.pairwise(totals), lines, strict=False):
            sums += 1
            wrong += (before + int(line[1])) % 10 != after
    assert 0.065 < wrong / sums < 0.095  # `mistakes` is 8%


def test_demonstrated_localizations_name_the_first_wrong_step_of_a_wrong_solution():
    named = Counter()
    for problem, prompt, completion in localizations(300):
        question, *numbered, mark = prompt.removesuffix("\n").split("\n")
        assert (question, mark) == (problem.question, "?")
        numbers = [line.partition(":")[0] for line in numbered]
        assert numbers == [str(n) for n in range(1, len(numbered) + 1)]
        steps = [line.partition(":")[2] for line in numbered]
        assert steps != TASK.solution(problem)
        assert TASK.localization(problem, steps) == prompt
        answer = parse_answer(completion, len(steps))
        assert answer == Answer(TASK.first_wrong_step(problem, steps), "boxed")
        named[answer.step] += 1
        *agreed, last = completion.partition("\\boxed{")[0].split("\n")
        checks = [line.split(":") for line in (*agreed, last)]
        claims = [step.partition("=")[2] for step in steps]
        assert [claim for _, claim in checks] == claims[: answer.step]
        assert [sum_ for sum_, _ in checks] == TASK.solution(problem)[: answer.step]
        assert [sum_[-1] == claim for sum_, claim in checks] == [True] * len(agreed) + [False]
    assert set(named) == set(range(1, 9))


@pytest.mark.parametrize("demonstrations", [solutions, localizations])
def test_demonstrations_are_seeded(demonstrations):
    assert demonstrations(20) == demonstrations(20)


class Impatient:
    """A generator that gives up, so that an endless loop fails."""

    def __init__(self):
        self.draws, self.rng = 0, rng(1)

    def random(self):
        self.draws += 1
        if self.draws > 10_000:
            raise TimeoutError("drew 10 000 numbers")
        return self.rng.random()

    def integers(self, *args):
        return self.rng.integers(*args)


def test_localizing_mistakes_that_are_never_made_is_refused():
    with pytest.raises(ValueError, match="mistakes"):
        ChainTask(mistakes=0.0).demonstrate_localization(PROBLEMS[0], Impatient())


def test_a_mistake_is_always_a_wrong_sum():
    careless, generator = ChainTask(mistakes=1.0), rng()
    for problem in TASK.problems("train", 100):
        totals = [0, *(int(line[-1]) for line in careless.solution(problem, rng=generator)[:-1])]
        numbers = map(int, problem.question[1::2])
        for (before, after), number in zip(itertools.pairwise(totals), numbers, strict=True):
            assert (before + number) % 10 != after


def test_misread_numbers_are_mostly_taken_for_one_more():
    task, generator = ChainTask(modulus=5, mistakes=0.1, misread=2), rng()
    off = {number: Counter() for number in range(5)}
    for problem in task.problems("train", 1500):
        totals = [0, *(int(line[-1]) for line in task.solution(problem, rng=generator)[:-1])]
        numbers = map(int, problem.question[1::2])
        for (before, after), number in zip(itertools.pairwise(totals), numbers, strict=True):
            off[number][(after - before - number) % 5] += 1
    for number, counts in off.items():
        misread = number in (1, 2)
        share = counts[1] / counts.total()
        assert share == pytest.approx(0.65 + 0.35 * 0.025 if misread else 0.025, abs=0.03)
        assert set(counts) == set(range(5))  # other mistakes are made too
        assert (counts.most_common(1)[0][0] == 1) == misread


def test_demonstrations_are_those_of_earlier_versions():
    """Of the same random numbers, where the settings are: a warm start can be repeated."""
    careless = ChainTask(mistakes=0.3)
    drawn = [careless.solution(p, rng=rng(i)) for i, p in enumerate(careless.problems("train", 3))]
    assert [" ".join(line[3:] for line in lines[:-1]) for lines in drawn] == [
        "6 4 7 0 0 0 0 1",
        "5 2 9 9 0",
        "3 4 9 3 1 3 4 7",
    ]


def test_a_solution_without_mistakes_is_the_solution():
    assert ChainTask(mistakes=0.0).solution(PROBLEMS[0], rng=rng()) == TASK.solution(PROBLEMS[0])


# ---- the tokenizer ----


def test_demonstrations_round_trip_and_their_lines_are_the_steps():
    unknown = CHAIN_TOKENIZER.unk_token_id
    task = ChainTask(max_terms=26, mistakes=0.3, misread=3)
    for problem, prompt, completion in [*solutions(60, task), *localizations(60, task)]:
        for text in (prompt, completion):
            tokens = encode(text)
            assert unknown not in tokens
            assert decode(tokens) == text
        tokens = encode(completion)
        np.testing.assert_array_equal(  # nothing merges across the seam
            np.concatenate([encode(prompt), tokens]), encode(prompt + completion)
        )
        spans = split_steps(AUTOMATON, tokens, max_step_tokens=16, eos_ids=[1])
        assert [decode(tokens[a:b]) for a, b in spans] == completion.splitlines(keepends=True)
        assert replay(AUTOMATON, tokens, max_step_tokens=16).answered
        if prompt == TASK.prompt(problem):
            before_the_answer = tokens[: spans[-1][0]]
            assert not replay(AUTOMATON, before_the_answer, max_step_tokens=16).answered


def test_each_letter_and_digit_is_a_token_and_the_box_is_one():
    assert len(CHAIN_TOKENIZER) == 45
    for text in (LETTERS, "0123456789", "=:?}\n"):
        assert [decode(t) for t in encode(text)] == list(text)
    # Where older policies have them; what is spelled with letters that were added since is still one.
    assert encode("ai0=\\boxed{4}").tolist() == [14, 22, 4, 23, 26, 8, 27]
    assert encode("jz").tolist() == [28, 44]
    assert encode("bxe").tolist() == [15, 42, 18]


def test_eos_is_a_token_of_its_own_and_leaves_no_text():
    tokens = encode("a3=3\n<eos>")
    assert tokens[-1] == CHAIN_TOKENIZER.eos_token_id
    assert decode(tokens) == "a3=3\n"


def test_the_quickstart_has_room_for_the_longest_prompt_response_and_question():
    config = load_config(QUICKSTART)
    longest = config.task.max_terms
    problem = Problem("longest", "".join(f"{c}9" for c in LETTERS[:longest]), "0")
    solution = TASK.solution(problem)
    response = "".join(f"{line}\n" for line in solution)
    limits = config.sampling
    assert len(encode(TASK.prompt(problem))) <= limits.max_prompt_tokens
    assert max(len(encode(f"{line}\n")) for line in solution) <= limits.max_step_tokens
    # The last step begins only where a full one still fits.
    before_the_last = len(encode(response)) - len(encode(solution[-1] + "\n"))
    assert before_the_last + limits.max_step_tokens <= limits.max_response_tokens
    asked = config.reset.localizer
    assert len(encode(TASK.localization(problem, solution))) <= asked.max_question_tokens
    assert len(encode(f"\\boxed{{{len(solution)}}}")) < asked.max_tokens  # and an EOS
