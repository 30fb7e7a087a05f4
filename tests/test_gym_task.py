"""Generated puzzles: the same in every process, shared by weight, split by question, scored."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import byte_tokenizer

from jaxreset.config_file import parse_config
from jaxreset.errors import ConfigError, RunError
from jaxreset.tasks import gym, gym_library
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.gym import Generator, GymProblems, GymTask, read_generators
from jaxreset.tasks.gym_library import Draw, Drawer, score_answer, tagged
from jaxreset.tasks.pipeline import PromptSource, fit_prompts

pytest.importorskip("reasoning_gym", reason="the reasoning-gym library is not installed")

repeatable = settings(derandomize=True, max_examples=60, deadline=None)

CHEAP = (
    *("ab", "basic_arithmetic", "binary_alternation", "bitwise_arithmetic", "caesar_cipher"),
    *(
        "calendar_arithmetic",
        "chain_sum",
        "count_bits",
        "decimal_chain_sum",
        "family_relationships",
    ),
    *("gcd", "largest_island", "lcm", "leg_counting", "letter_counting", "number_sequence"),
    *("products", "simple_equations", "spell_backward", "time_intervals"),
)
# Drawn in the order of a set, from the global generator, all at once, or with a limit of 20 000.
UNRULY = ("isomorphic_strings", "list_functions", "acre", "gsm_symbolic", "word_ladder")
MIXTURE = {"chain_sum": {"weight": 3, "max_terms": 3}, "spell_backward": None, "list_functions": {}}


@pytest.fixture(scope="module")
def task():
    made = GymTask(generators=[*CHEAP, *UNRULY], processes=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def mixed(task):
    """A task of a few generators, that draws in the same process."""
    made = GymTask(generators=MIXTURE, processes=1)
    made._drawer = task._drawer
    yield made
    made.close()


@pytest.fixture(scope="module")
def elsewhere():
    """Draws in a process of its own."""
    drawer = Drawer()
    yield drawer
    drawer.close()


def of(task, name, split="train", size=100, **parameters):
    """The problems of one generator."""
    return GymProblems(split, size, [Generator(name, 1.0, parameters)], task._drawer)


def answered(answer):
    return f"Step by step.\nSo it is\n<answer>\n{answer}\n</answer>\n"


def changed(answer):
    """Another answer of the same kind: its first letter or digit is the next one."""
    place = next(i for i, char in enumerate(answer) if char.isalnum())
    other = {"9": "1", "z": "a", "Z": "A", "y": "a"}.get(answer[place]) or chr(
        ord(answer[place]) + 1
    )
    return answer[:place] + other + answer[place + 1 :]


# Scores


@pytest.mark.parametrize("name", CHEAP)
def test_the_own_answer_scores_one_and_a_changed_one_less(task, name):
    for split in ("train", "test"):
        problem = of(task, name, split)[5]
        assert problem.id == f"{split}:5:{name}"
        assert score_answer(problem, answered(problem.answer)) == 1
        assert score_answer(problem, answered(changed(problem.answer))) < 1
        assert score_answer(problem, problem.answer) == 0  # without tags


def test_workers_score_as_the_library_does(task):
    problems = [of(task, name)[3] for name in ("chain_sum", "list_functions", "word_ladder")]
    items = [
        (p, answered(a)) for p in problems for a in (p.answer, changed(p.answer), "", "[" * 999)
    ]
    scores = task.score(items)
    assert scores.rewards[::4].tolist() == [1, 1, 1]
    assert max(scores.rewards[1::4]) < 1
    assert not scores.rewards[2::4].any()
    assert not scores.rewards[3::4].any()
    assert scores.errors == scores.timeouts == ()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>4</answer>, no, <answer>5</answer> it is", "5"),
        ("<answer>1 2\n3 4\n</answer>", "1 2\n3 4"),
        ("<answer>never closed <answer>5</answer>", "5"),
        ("<answer>{\\boxed{7}}</answer>", "{\\boxed{7}}"),
        ("<answer> </answer>", ""),
        ("<answer>5", None),
        ("5</answer>", None),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_the_answer_stands_in_the_last_tags(response, answer):
    assert tagged(response) == answer


def test_a_malformed_answer_is_wrong_and_a_broken_scorer_an_error(task, monkeypatch):
    problem = of(task, "prime_factorization")[0]
    scorer = gym_library._scorer("prime_factorization", {})
    with pytest.raises(ValueError, match="invalid literal"):
        scorer.score_answer("two", problem.extra["entry"])
    assert score_answer(problem, answered("two")) == 0
    monkeypatch.setattr(scorer, "score_answer", lambda answer, entry: entry["lost"])
    with pytest.raises(KeyError, match="lost"):
        score_answer(problem, answered("two"))


def test_an_answer_is_not_run_as_a_program(task, tmp_path):
    written = tmp_path / "written"
    program = f"[open({str(written)!r}, 'w').write('x')]"
    for name in ("spiral_matrix", "countdown", "binary_matrix", "polynomial_multiplication"):
        problem = of(task, name)[0]
        assert score_answer(problem, answered(problem.answer)) == 1
        for code in (program, program[1:-1], f"print({program})", "E.__class__", "E . func(1)"):
            assert score_answer(problem, answered(code)) < 0.2
    assert not written.exists()


@pytest.mark.parametrize(
    ("name", "answer"), [("game_of_life_halting", "whatever"), ("complex_arithmetic", "nan")]
)
def test_what_the_library_takes_for_right_by_mistake_is_not(task, name, answer):
    for index in range(6):
        problem = of(task, name)[index]
        assert score_answer(problem, answered(problem.answer)) == 1
        assert score_answer(problem, answered(answer)) == 0


# Problems


@pytest.mark.parametrize("name", UNRULY)
def test_a_problem_is_the_same_in_another_process_and_order(task, elsewhere, name):
    here = of(task, name, size=2**22)
    there = GymProblems("train", 2**22, here.generators, elsewhere)
    numbers = [0, 7, 2**22 - 1, *range(41, 81)]
    first = [here[i] for i in numbers]
    second = [there[i] for i in reversed(numbers)][::-1]
    assert first == second
    assert [p.extra for p in first] == [p.extra for p in second]
    assert len({p.question for p in first}) > 0.9 * len(numbers)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("chain_sum", {"max_terms": 2, "max_digits": 1, "min_digits": 1}),
        ("tower_of_hanoi", {"max_disks": 4}),  # a handful of questions
        ("acre", {}),
    ],
)
def test_no_question_is_in_both_splits(task, name, parameters):
    train, test = (of(task, name, split, **parameters) for split in ("train", "test"))
    questions = {p.question for p in train}, {p.question for p in test}
    assert all(questions)
    assert not questions[0] & questions[1]
    assert train[0].extra["entry"] == of(task, name, size=5, **parameters)[0].extra["entry"]
    for outside in (100, -1):
        with pytest.raises(IndexError):
            train[outside]


@repeatable
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    start=st.integers(0, 10**6),
    count=st.integers(1, 3000),
)
def test_shares_follow_the_weights(weights, start, count):
    """In any stretch, and not only on average: within a few problems, as far as multiples of the golden
    ratio are from even."""
    problems = object.__new__(GymProblems)
    GymProblems._share_out(problems, [Generator(str(i), w, {}) for i, w in enumerate(weights)])
    drawn = Counter(problems.generator(i).name for i in range(start, start + count))
    for i, weight in enumerate(weights):
        share = count * weight / sum(weights)
        assert abs(drawn[str(i)] - share) <= 2 + 1.5 * math.log(count + 1)


def test_a_mixture_is_drawn_by_its_weights(mixed):
    problems = mixed.problems("train", 200)
    drawn = Counter(problem.extra["generator"] for problem in map(problems.__getitem__, range(60)))
    assert [round(drawn[name] / 12) for name in MIXTURE] == [3, 1, 1]
    assert all(problems[i].question == problems[i].question for i in range(3))
    assert "weight" not in problems[0].extra["parameters"]


def test_a_source_goes_on_at_any_position(mixed):
    asking = Asking(mixed, byte_tokenizer())

    def source(position):
        made = PromptSource(mixed.problems("train", 50), asking, seed=3)
        made.position = position
        return made

    whole = source(0).next(24)
    for position in (1, 10, 23):
        rest = source(position).next(24 - position)
        for prompt, expected in zip(rest, whole[position:], strict=True):
            assert prompt.problem == expected.problem
            assert prompt.problem.extra == expected.problem.extra
            assert prompt.number == expected.number
            assert prompt.tokens.tolist() == expected.tokens.tolist()


def test_overlong_problems_have_others_in_their_place(task, mixed):
    asking = Asking(mixed, byte_tokenizer())
    every = of(task, "letter_counting", min_words=1, max_words=40)
    lengths = [len(ids) for ids in asking.tokens([every[i] for i in range(100)])]
    limit = sorted(lengths)[50]
    fitting, found = fit_prompts(every, asking, limit, refuse=False)
    assert len(fitting) == 100
    assert found.longest <= limit
    assert max(len(ids) for ids in asking.tokens([fitting[i] for i in range(100)])) <= limit
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    assert all(fitting[i] == every[i] for i in kept)
    with pytest.raises(ValueError, match=r"of 100 prompts exceed sampling.max_prompt_tokens="):
        fit_prompts(every, asking, limit, refuse=True)
    with pytest.raises(
        ConfigError, match=r"letter_counting: of 256 questions none is in the train"
    ):
        fit_prompts(every, asking, 20, refuse=False)


def test_test_problems_are_drawn_once(task, monkeypatch):
    train, test = (of(task, "gcd", split, size=5) for split in ("train", "test"))
    first = [test[i] for i in range(5)], train[0]
    monkeypatch.setattr(task._drawer, "draw", lambda draw: pytest.fail("drawn again"))
    assert [test[i] for i in range(5)] == first[0]
    with pytest.raises(pytest.fail.Exception):
        train[0]


# The process that draws


def test_a_drawer_starts_again_after_its_process_has_ended():
    drawer, draw = Drawer(), Draw("gcd", {}, 0, 1, 0)
    try:
        entry = drawer.draw(draw)
        drawer._running[0].kill()
        drawer._running[0].wait()
        assert drawer.draw(draw) == entry
        with pytest.raises(ValueError, match=r"TypeError: .*unexpected keyword argument 'terms'"):
            drawer.draw(Draw("gcd", {"terms": 3}, 0, 1, 0))
        process = drawer._running[0]
        drawer.close()
        assert process.returncode is not None
    finally:
        drawer.close()


def test_a_generator_that_takes_for_ever_or_ends_its_process_is_named(monkeypatch):
    drawer = Drawer()
    monkeypatch.setattr(gym_library, "_PATIENCE", 0.01)  # importing the library takes longer
    with pytest.raises(
        RunError, match=r"generators.gcd: the process that .* took more than 0.01 s"
    ):
        drawer.draw(Draw("gcd", {}, 0, 1, 0))
    assert not drawer._running
    monkeypatch.undo()
    monkeypatch.setattr(gym_library, "serve", os._exit)
    with pytest.raises(
        RunError, match=r"generators.gcd: the process that draws its problems ended"
    ):
        drawer.draw(Draw("gcd", {}, 0, 1, 0))


def test_the_task_needs_no_jax():
    code = "import sys, jaxreset.tasks.gym_library; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Options


def test_generators_by_name_or_with_parameters():
    assert read_generators(["gcd", "lcm"]) == [Generator("gcd", 1, {}), Generator("lcm", 1, {})]
    given = {"gcd": None, "chain_sum": {"weight": 2, "min_terms": 3}}
    assert read_generators(given) == [
        Generator("gcd", 1, {}),
        Generator("chain_sum", 2, {"min_terms": 3}),
    ]


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ("gcd", "task.options.generators is 'gcd'; expected names, or names with parameters"),
        ({}, r"task.options.generators is \{\}; expected names"),
        ([], r"task.options.generators is \[\]; expected names"),
        ([5], r"task.options.generators is \[5\]; expected names"),
        ({"chian_sum": {}}, "no generator is called 'chian_sum'; did you mean chain_sum"),
        (["gcd", "composite"], "no generator is called 'composite'"),
        ({5: {}}, "no generator is called 5"),
        ({"gcd": 3}, "task.options.generators.gcd is 3; expected parameters by name"),
        ({"gcd": {"weight": 0}}, "generators.gcd.weight is 0; expected a positive, finite number"),
        ({"gcd": {"weight": math.inf}}, "generators.gcd.weight is inf; expected a positive"),
        ({"gcd": {"weight": True}}, "generators.gcd.weight is True; expected a positive"),
        ({"gcd": {"weight": "2"}}, "generators.gcd.weight is '2'; expected a positive"),
        ({"gcd": {"seed": 5}}, "generators.gcd.seed: problems are numbered by jaxreset"),
        ({"gcd": {"size": 5}}, "generators.gcd.size: problems are numbered by jaxreset"),
        (
            {"chain_sum": {"max_term": 5}},
            "generators.chain_sum.max_term: no such parameter; did you mean max_terms",
        ),
        (
            {"chain_sum": {"min_terms": 5, "max_terms": 2}},
            r"generators.chain_sum: \{'min_terms': 5, 'max_terms': 2\} is refused by the library: ",
        ),
        ({"chain_sum": {"min_terms": "two"}}, "generators.chain_sum: .* is refused by the library"),
    ],
)
def test_refused_generators(generators, message):
    with pytest.raises(ValueError, match=message):
        GymTask(generators=generators)


def test_what_only_drawing_shows_is_refused_before_the_first_prompt(task, monkeypatch):
    monkeypatch.setattr(gym, "_TRIES", 12)
    with pytest.raises(
        ConfigError, match=r"generators.gcd: the library can't draw problems of \{'x'"
    ):
        of(task, "gcd", x=1)
    with pytest.raises(ConfigError, match=r"4194305 problems of task.name=gym; expected at most"):
        of(task, "gcd", size=2**22 + 1)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(
        ValueError, match=r"needs the reasoning-gym library: pip install 'jaxreset\[gym"
    ):
        GymTask(generators=["gcd"])


def test_a_record_is_refused(mixed):
    with pytest.raises(
        ValueError, match=r"task.name=gym generates its problems; leave data.path out"
    ):
        mixed.read_record({"question": "?", "answer": "1"})


def test_a_config_names_generators():
    config = parse_config(
        {
            "task": {"name": "gym", "options": {"generators": MIXTURE}},
            "model": {"path": "./model"},
        }
    )
    made = config.task.make()
    assert [g.name for g in made.generators] == list(MIXTURE)
    assert made.delimiter == "\n"


# Prompts


def test_prompts_ask_for_tags(mixed):
    problem = mixed.problems("train", 1)[0]
    for asked in (mixed.prompt(problem), mixed.message(problem)):
        assert asked.count(problem.question) == 1
        assert "<answer> and </answer>" in asked
        assert "a line break" in asked
        assert "{" not in asked.replace(problem.question, "")
    assert problem.question in mixed.localization(problem, ["one\n", "two\n"])
    assert mixed.first_wrong_step(problem, ["one"]) is None
    assert mixed.reference(problem) is None


@pytest.mark.slow
def test_every_generator_draws_and_scores():
    """At its defaults; those that give no answer of their own score none."""
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})
    task = GymTask(generators=names, processes=2, cpu_seconds=30)
    try:
        problems = [of(task, name, split)[1] for name in names for split in ("train", "test")]
        scores = task.score([(p, answered(p.answer)) for p in problems])
    finally:
        task.close()
    assert scores.errors == scores.timeouts == ()
    unanswered = {p.extra["generator"] for p in problems if not p.answer}
    assert len(unanswered) < 10
    wrong = {p.extra["generator"] for p, r in zip(problems, scores.rewards, strict=True) if r != 1}
    assert wrong == unanswered
