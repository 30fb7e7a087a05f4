"""Prompts: chat turns and raw text, examples, systems, questions behind an attempt, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_helpers import byte_tokenizer

from jaxreset.config_file import load_config
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem, Task
from jaxreset.tasks.math import MathTask
from jaxreset.tasks.sums import SumsTask

CONFIGS = Path(__file__).parent.parent / "configs"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
PROBLEM = Problem("p", "What is 1 + 2?", "3")
EXAMPLES = [("What is 3 + 4?", "3 + 4 = 7\n\\boxed{7}")]


def tokenizer(chat=CHAT):
    made = byte_tokenizer()
    made.chat_template = chat
    return made


def asking(chat="auto", template=CHAT, task=None, **options):
    return Asking(SumsTask() if task is None else task, tokenizer(template), chat=chat, **options)


def test_a_chat_is_system_examples_and_question_in_turns():
    one = "<user>What is 1 + 2?</user><assistant>"
    shown = "<user>What is 3 + 4?</user><assistant>3 + 4 = 7\n\\boxed{7}</assistant>"
    assert asking().text(PROBLEM) == asking("template").text(PROBLEM) == one
    assert asking(examples=EXAMPLES).text(PROBLEM) == shown + one
    assert (
        asking(system="Add.", examples=EXAMPLES).text(PROBLEM)
        == "<system>Add.</system>" + shown + one
    )


@pytest.mark.parametrize("options", [{"chat": "raw"}, {"template": None}])
def test_raw_text_is_one_behind_the_other(options):
    assert asking(**options).text(PROBLEM) == "What is 1 + 2?\n"
    text = asking(**options, system="Add.", examples=EXAMPLES).text(PROBLEM)
    assert text == "Add.\n\nWhat is 3 + 4?\n3 + 4 = 7\n\\boxed{7}\n\nWhat is 1 + 2?\n"


def test_messages_that_a_problem_brings_along_stand_before_its_question():
    context = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    problem = Problem("p", "What is 1 + 2?", "3", context=context)
    turns = "<user>Hi</user><assistant>Hello</assistant><user>What is 1 + 2?</user><assistant>"
    assert asking().text(problem) == "<system>Be brief.</system>" + turns
    assert asking(system="Add.").text(problem) == "<system>Add.</system>" + turns
    assert asking("raw").text(problem) == "Be brief.\n\nHi\n\nHello\n\nWhat is 1 + 2?\n"


def test_tokens_are_those_of_the_text():
    made = asking(examples=EXAMPLES)
    [tokens] = made.tokens([PROBLEM])
    assert tokens.dtype == np.int32
    assert made.tokenizer.decode(tokens) == made.text(PROBLEM)


class Messages(Task):
    """A task that gives messages itself."""

    def prompt(self, problem):
        return [
            {"role": "user", "content": "Listen."},
            {"role": "user", "content": problem.question},
        ]


def test_a_task_may_give_messages():
    made = asking(task=Messages())
    assert made.text(PROBLEM) == "<user>Listen.</user><user>What is 1 + 2?</user><assistant>"
    with pytest.raises(ValueError, match=r"problem p: .*messages.*no template.*task.chat=template"):
        asking("raw", task=Messages()).text(PROBLEM)


def test_what_cannot_be_asked_so_is_refused():
    with pytest.raises(
        ValueError, match=r"task.chat=template: .*no chat template; set task.chat=raw"
    ):
        asking("template", template=None)
    with pytest.raises(
        ValueError, match=r"refuses messages of system, user: no system; leave task.system"
    ):
        asking(template=STRICT, system="Add.").text(PROBLEM)


def test_the_question_behind_an_attempt_is_the_users_next_turn():
    made = asking(examples=EXAMPLES, task=MathTask(inline_prompt="Which of {count}?"))
    tokens = made.inline_question(PROBLEM, ["1 + 2 = 4", "\\boxed{4}"])
    assert made.tokenizer.decode(tokens) == "</assistant><user>Which of 2?</user><assistant>"
    raw = asking("raw", task=MathTask(inline_prompt="Which of {count}?"))
    assert raw.tokenizer.decode(raw.inline_question(PROBLEM, ["a"])) == "Which of 1?"


def test_the_fresh_question_is_a_chat_even_where_problems_are_raw_text():
    for chat in ("raw", "auto"):
        made = asking(chat, task=MathTask(localize_prompt="{problem}|{steps}|{count}"))
        text = made.tokenizer.decode(made.question(PROBLEM, ["1 + 2 = 4"]))
        assert text == "<user>What is 1 + 2?|Step 1: 1 + 2 = 4|1</user><assistant>"


def test_math_asks_otherwise_in_a_chat_and_says_what_ends_a_step():
    task = MathTask()
    raw, chat = task.prompt(PROBLEM), task.message(PROBLEM)
    assert raw != chat
    assert raw.endswith("Problem:\nWhat is 1 + 2?\n\nSolution:\n")
    for text in (raw, chat):
        assert "a line break" in text
        assert "What is 1 + 2?" in text
    task.delimiter = "</thought>"
    assert "</thought>" in task.prompt(PROBLEM)
    assert "</thought>" in task.message(PROBLEM)


def test_the_config_says_how_it_is_asked():
    config = load_config(
        CONFIGS / "gsm8k.yaml",
        [
            "model.path=m",
            "data.path=d.jsonl",
            "task.solve_prompt='{problem}'",
            "task.delimiter=;",
            "task.answer_marker='A:'",
        ],
    )
    task = config.task.make()
    assert (task.delimiter, task.answer_marker) == (";", "A:")
    assert task.message(PROBLEM) == task.prompt(PROBLEM) == PROBLEM.question
    assert MathTask.delimiter == "\n"
    task.close()


def test_sums_know_their_first_wrong_step():
    task = SumsTask(min_terms=4)
    problem = Problem("p", "What is 7 + 8 + 6 + 1?", "22")
    right = ["7 + 8 = 15", "15 + 6 = 21", "21 + 1 = 22", "\\boxed{22}"]
    for steps, wrong in [
        (right, 4),
        (["7 + 8 = 15", "15 + 6 = 20", "20 + 1 = 21", "\\boxed{21}"], 2),
        (["7 + 8 = 15", "15 + 1 = 16", "\\boxed{16}"], 2),  # skips a term
        (["7 + 8 = 15", "\\boxed{15}"], 2),  # stops too early
        ([*right[:3], "\\boxed{21}"], 4),
        ([*right[:3], "So it is 22.", "\\boxed{22}"], 4),
        (["Let us add."], 1),
    ]:
        assert task.first_wrong_step(problem, steps) == wrong, steps
    texts = ["\n".join(right), "\\boxed{21} or \\boxed{ 22 }", "\\boxed{22", "22", "\\boxed{21}"]
    rewards = task.score([(problem, text) for text in texts]).rewards
    np.testing.assert_array_equal(rewards, [1, 1, 0, 0, 0])


def test_sums_are_numbered_and_their_splits_apart():
    task = SumsTask(min_terms=2, max_terms=3)
    train, test = task.problems("train", 400), task.problems("test", 100)
    assert [p.question for p in train] == [p.question for p in task.problems("train", 400)]
    assert not {p.question for p in train} & {p.question for p in test}
    assert {p.question.count("+") for p in train} == {1, 2}
    for problem in [*train, *test]:
        terms = problem.question.removeprefix("What is ").removesuffix("?").split(" + ")
        assert int(problem.answer) == sum(map(int, terms))
        assert task.score([(problem, problem.solution)]).rewards[0] == 1
        steps = problem.solution.split("\n")
        assert task.first_wrong_step(problem, steps) == len(steps)
    with pytest.raises(ValueError, match="min_terms=1, max_terms=4: expected 2"):
        SumsTask(min_terms=1)
