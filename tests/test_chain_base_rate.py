"""How often an imitation of the demonstrations is right: predicted, counted out, and drawn."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxreset.config_file import load_config
from jaxreset.run.dry_run import base_rate, describe
from jaxreset.tasks.chain import ChainTask
from jaxreset.tasks.chain_base_rate import MISREAD_RATE, predicted_accuracy

REPOSITORY = Path(__file__).parent.parent
QUICKSTART, TASKS = REPOSITORY / "configs" / "quickstart.yaml", REPOSITORY / "docs" / "tasks.md"
repeatable = settings(derandomize=True, deadline=None, max_examples=60)
tasks = st.integers(2, 10).flatmap(
    lambda modulus: st.builds(
        ChainTask,
        min_terms=st.integers(1, 5),
        max_terms=st.integers(5, 26),
        modulus=st.just(modulus),
        mistakes=st.floats(0, 1),
        misread=st.integers(0, modulus - 1),
        strict=st.booleans(),
    )
)


@pytest.mark.parametrize("misread", [0, 1, 2])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_prediction_is_what_counting_out_all_demonstrations_gives(terms, misread):
    modulus, mistakes = 3, 0.2
    right = all_right = 0.0
    for numbers in itertools.product(range(modulus), repeat=terms):
        for errors in itertools.product(range(modulus), repeat=terms):
            chance = modulus**-terms
            for number, error in zip(numbers, errors, strict=True):
                slip = MISREAD_RATE if 1 <= number <= misread else 0.0
                other = mistakes / 2 if error else 1 - mistakes
                chance *= (1 - slip) * other + (slip if error == 1 else 0.0)
            right += chance * (sum(errors) % modulus == 0)
            all_right += chance * (not any(errors))
    for strict, share in ((False, right), (True, all_right)):
        predicted = predicted_accuracy(
            min_terms=terms,
            max_terms=terms,
            modulus=modulus,
            mistakes=mistakes,
            misread=misread,
            strict=strict,
        )
        assert predicted == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(
    "task",
    [
        ChainTask(),
        ChainTask(strict=True),
        ChainTask(min_terms=4, max_terms=6, modulus=5, mistakes=0.05, misread=1),
        ChainTask(min_terms=4, max_terms=6, modulus=5, mistakes=0.05, misread=1, strict=True),
        ChainTask(min_terms=10, max_terms=26, modulus=2, mistakes=0.02, misread=1),
    ],
    ids=str,
)
def test_demonstrations_are_right_as_often_as_predicted(task):
    rng, count = np.random.default_rng(0), 2000
    problems = task.problems("train", count)
    items = [(p, task.demonstrate_solution(p, rng)[1]) for p in problems]
    share = task.score(items).rewards.mean()
    predicted = task.predicted_accuracy()
    assert abs(share - predicted) < 3 * (predicted * (1 - predicted) / count) ** 0.5


def test_greedily_all_misread_numbers_are_and_nothing_else_goes_wrong():
    task = ChainTask(min_terms=4, max_terms=6, modulus=5, mistakes=0.05, misread=1)
    problems = list(task.problems("train", 4000))
    ones = np.array([sum(n == "1" for n in p.question[1::2]) for p in problems])
    for strict, right in ((True, ones == 0), (False, ones % 5 == 0)):
        predicted = ChainTask(**vars(task) | {"strict": strict}).predicted_accuracy(greedy=True)
        assert predicted == pytest.approx(right.mean(), abs=0.02)
    assert ChainTask(mistakes=0.4, strict=True).predicted_accuracy(greedy=True) == 1


@repeatable
@given(mistakes=st.floats(0, 1), modulus=st.integers(2, 10), terms=st.integers(1, 26))
def test_without_misread_numbers_there_is_a_closed_form(mistakes, modulus, terms):
    predicted = predicted_accuracy(
        min_terms=terms, max_terms=terms, modulus=modulus, mistakes=mistakes
    )
    chance = 1 / modulus
    kept = 1 - mistakes * modulus / (modulus - 1)
    assert predicted == pytest.approx(chance + (1 - chance) * kept**terms, abs=1e-9)


@repeatable
@given(task=tasks, greedy=st.booleans())
def test_a_prediction_is_a_probability_and_strictness_never_raises_it(task, greedy):
    strict, lenient = (
        ChainTask(**vars(task) | {"strict": strict}).predicted_accuracy(greedy=greedy)
        for strict in (True, False)
    )
    assert 0 <= strict <= lenient + 1e-12 <= 1 + 2e-12


def test_what_the_documentation_says_of_the_dial():
    rows = re.findall(r"^\| `(\{.*?\})`.* \| (\S+)% \| (\S+)% \|$", TASKS.read_text(), re.MULTILINE)
    assert len(rows) == 7
    quickstart = re.search(r"^\| `(\{.*?\})` \(the quickstart\)", TASKS.read_text(), re.MULTILINE)
    assert (
        yaml.safe_load(quickstart[1]) | {"name": "chain"}
        == yaml.safe_load(QUICKSTART.read_text())["task"]
    )
    for written, *said in rows:
        task = ChainTask(**yaml.safe_load(written))
        for share, greedy in zip(said, (False, True), strict=True):
            unit = 10.0 ** -len(share.partition(".")[2])  # of its last digit, in percent
            assert abs(float(share) - 100 * task.predicted_accuracy(greedy=greedy)) <= 0.51 * unit


@pytest.mark.usefixtures("hasty")
def test_the_dry_run_says_what_a_warm_start_will_come_to():
    shown = io.StringIO()
    overrides = ["task.min_terms=4", "task.max_terms=6", "task.modulus=5", "task.mistakes=0.05"]
    config = load_config(QUICKSTART, [*overrides, "task.misread=1", "task.strict=true"])
    describe(config, Console(file=shown, width=200))
    [line] = [line for line in shown.getvalue().splitlines() if line.startswith("base rate")]
    assert "about 39% sampled at temperature 1, 33% greedily" in line
    assert "predicted from task.mistakes=0.05 and task.misread=1" in line


def test_a_base_rate_is_told_where_the_demonstrations_decide_it():
    def told(*overrides):
        config = load_config(QUICKSTART, overrides)
        return base_rate(config, config.task.make())

    rare = ["task.min_terms=19", "task.max_terms=19", "task.misread=4", "task.mistakes=0.12"]
    assert "about 8e-08 sampled at temperature 1, 5e-14 greedily" in told(*rare)
    assert told("warm_start.steps=0") is None
    assert told("warm_start.path=demonstrations.jsonl") is None
    assert told("task.reward={correct: task}") is None  # who knows what else
    config = load_config(QUICKSTART)

    class Other(ChainTask):
        """Its verifier may be another."""

    assert base_rate(config, Other()) is None
    assert base_rate(config, config.task.make()) is not None
