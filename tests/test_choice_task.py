"""Multiple choice and yes or no: records, prompts, and scoring that no response can slow down."""

from __future__ import annotations

import json
import time
from pathlib import Path
from string import ascii_uppercase

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxreset.tasks.base import Problem
from jaxreset.tasks.boolean import BooleanTask
from jaxreset.tasks.boxed import unwrapped
from jaxreset.tasks.choice import ChoiceTask, choose
from jaxreset.tasks.classes import find_task
from jaxreset.tasks.fields import UngradableError
from jaxreset.tasks.records import load_problems, read_file

EXAMPLES = Path(__file__).parent.parent / "examples" / "data"
CHOICE, BOOLEAN = ChoiceTask(), BooleanTask()
repeatable = settings(derandomize=True, max_examples=60, deadline=None)

COLOURS = ["red", "green", "blue", "grey"]
LABELLED = {
    "question": "Which is a leaf's?",
    "choices": {"label": ["A", "B", "C", "D"], "text": COLOURS},
    "answerKey": "B",
}
INDEXED = {"question": "Which is a leaf's?", "options": COLOURS, "answer": "B", "answer_index": 1}
NUMBERED = {"question": "Which is a leaf's?", "choices": COLOURS, "answer": 1}
WORDED = {"question": "Which is a leaf's?", "options": COLOURS, "answer": "Green"}
MAPPED = {
    "question": "Which is a leaf's?",
    "options": dict(zip("ABCD", COLOURS, strict=True)),
    "answer": "B",
}
NAMED = {
    "Question": "Which is a leaf's?",
    "Correct Answer": "green",
    "Incorrect Answer 1": "red",
    "Incorrect Answer 2": "blue",
    "Incorrect Answer 3": "grey",
    "Explanation": "Chlorophyll is green.",
}


def without(record, *fields):
    return {key: value for key, value in record.items() if key not in fields}


def rewards(task, problem, *responses):
    return task.score([(problem, response) for response in responses]).rewards.tolist()


# Records of choices


@pytest.mark.parametrize(
    "record",
    [
        LABELLED,
        INDEXED,
        without(INDEXED, "answer"),
        without(INDEXED, "answer_index"),
        NUMBERED,
        NUMBERED | {"answer": "B"},
        WORDED,
        MAPPED,
        LABELLED
        | {"choices": {"label": [1, 2, 3, 4], "text": COLOURS}, "answerKey": 2},  # lettered anew
    ],
)
def test_every_schema_is_the_same_problem(record):
    problem = CHOICE.read_record(record)
    listed = "Which is a leaf's?\n\nA. red\nB. green\nC. blue\nD. grey"
    assert problem == Problem("", listed, "B")
    assert problem.extra == {"options": tuple(COLOURS)}


def test_the_right_answer_of_a_record_that_names_it_has_no_place_of_its_own():
    problem = CHOICE.read_record(NAMED)
    assert problem == CHOICE.read_record(dict(reversed(NAMED.items())))
    assert sorted(problem.extra["options"]) == sorted(COLOURS)
    assert problem.extra["options"][ascii_uppercase.index(problem.answer)] == "green"
    assert problem.solution == "Chlorophyll is green."
    letters = [
        CHOICE.read_record(NAMED | {"Question": f"Which is leaf {n}'s?"}).answer for n in range(400)
    ]
    assert all(60 < letters.count(letter) < 140 for letter in "ABCD")


def test_numbers_are_options_too():
    problem = CHOICE.read_record({"question": "2 + 2?", "options": [2, 4, 8], "answer": 4})
    assert problem.answer == "B"
    assert rewards(CHOICE, problem, r"\boxed{4}", r"\boxed{B}", r"\boxed{2}") == [1, 1, 0]


def test_twenty_six_options_are_enough():
    options = [f"word {n}" for n in range(26)]
    problem = CHOICE.read_record({"question": "Which?", "options": options, "answer_index": 25})
    assert problem.answer == "Z"
    assert problem.question.endswith("\nZ. word 25")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without(LABELLED, "question"), "missing field 'question'; expected the question's text"),
        (LABELLED | {"question": 5.5, "answerKey": True}, "field 'answerKey' is True"),
        (LABELLED | {"question": ["?"]}, r"field 'question' is \['\?'\]"),
        (
            without(LABELLED, "choices"),
            "missing field 'options' or 'choices'; expected a list of 2",
        ),
        (
            LABELLED | {"answerKey": "E"},
            "'answerKey' is 'E'; expected a label of field 'choices': A",
        ),
        (LABELLED | {"answerKey": "b"}, "'answerKey' is 'b'; expected a label of field 'choices'"),
        (
            LABELLED | {"choices": {"label": ["A", "B", "B", "D"], "text": COLOURS}},
            "field 'choices' has the label 'B' more than once",
        ),
        (
            LABELLED | {"choices": {"label": ["A", "B"], "text": COLOURS}},
            "field 'choices' has 2 labels for 4 options; expected one each",
        ),
        (LABELLED | {"choices": {"label": "ABCD", "text": COLOURS}}, "field 'choices' is {'label'"),
        (without(LABELLED, "answerKey"), "missing field 'answer', 'answer_index' or 'answerKey'"),
        (INDEXED | {"options": []}, "field 'options' has 0 options; expected a list of 2 to 26"),
        (INDEXED | {"options": ["red"]}, "field 'options' has 1 options"),
        (INDEXED | {"options": [str(n) for n in range(27)]}, "field 'options' has 27 options"),
        (INDEXED | {"options": "red, green"}, "field 'options' is 'red, green'; expected a list"),
        (INDEXED | {"options": ["red", ["green"]]}, r"field 'options\[1\]' is \['green'\]"),
        (INDEXED | {"options": ["red", " "]}, r"field 'options\[1\]' is ' '; expected an option's"),
        (INDEXED | {"options": ["red", None]}, r"missing field 'options\[1\]'"),
        (INDEXED | {"answer_index": 4}, "'answer_index' is 4; expected a whole number from 0 to 3"),
        (INDEXED | {"answer_index": -1}, "'answer_index' is -1; expected a whole number from 0"),
        (INDEXED | {"answer_index": 1.5}, "'answer_index' is 1.5; expected a whole number"),
        (INDEXED | {"answer_index": True}, "'answer_index' is True; expected a whole number"),
        (INDEXED | {"answer_index": 2}, "'answer_index' is 2, 'answer' is 'B': different options"),
        (INDEXED | {"answer": "F"}, "'answer' is 'F'; expected one of A, B, C, D, or an option's"),
        (NUMBERED | {"answer": 4}, "field 'answer' is 4; expected a whole number from 0 to 3"),
        (WORDED | {"answer": "mauve"}, "field 'answer' is 'mauve'; expected one of A, B, C, D"),
        (WORDED | {"options": ["B", "A"], "answer": "A"}, "which names options A, B; expected one"),
        (without(NAMED, "Question"), "missing field 'Question'"),
        (NAMED | {"Incorrect Answer 2": None}, "missing field 'Incorrect Answer 2'"),
        (
            {"Question": "?", "Correct Answer": "x"},
            "0 fields 'Incorrect Answer 1' and so on; expected 1 to 25",
        ),
    ],
)
def test_refused_choices(record, message):
    with pytest.raises(ValueError, match=message) as error:
        CHOICE.read_record(record)
    assert not isinstance(error.value, UngradableError)


def test_choices_that_nothing_can_answer_are_left_out_and_counted(tmp_path):
    path = tmp_path / "some.jsonl"
    twice = INDEXED | {"options": ["red", "green", "green"]}
    records = [LABELLED, LABELLED | {"answerKey": ""}, twice]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    loaded = read_file(path, CHOICE.read_record)
    assert (len(loaded.problems), loaded.ungradable) == (1, 2)
    with pytest.raises(UngradableError, match="the right option, 'green', is there more than once"):
        CHOICE.read_record(twice)
    genes = {"question": "Which?", "options": ["AA", "Aa", "aa"], "answer": "Aa"}
    assert CHOICE.read_record(genes).answer == "B"  # the same in small letters, and another


def test_parquet_holds_the_same_choices(tmp_path):
    for name, record in (("labelled", LABELLED), ("indexed", INDEXED), ("numbered", NUMBERED)):
        pq.write_table(pa.Table.from_pylist([record] * 2), tmp_path / f"{name}.parquet")
        (first, second) = load_problems(tmp_path / f"{name}.parquet", CHOICE.read_record)
        assert first.question == second.question == CHOICE.read_record(record).question
        assert (first.answer, first.id) == ("B", f"{name}:1")


# Letters and texts


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"So \boxed{B}", 1),
        (r"\boxed{A}, no, \boxed{B}", 1),
        (r"\boxed{B}, no, \boxed{A}", 0),
        (r"\boxed{(B)}", 1),
        (r"\boxed{[b].}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{\text{(B)}}", 1),
        (r"\boxed{\mathbf{B}}", 1),
        (r"\boxed{$B$}", 1),
        (r"\boxed{ B. }", 1),
        (r"\boxed{B. green}", 1),
        (r"\boxed{\text{B) Green}}", 1),
        (r"\boxed{(B) a kind of green}", 1),
        (r"\boxed{  GREEN }", 1),
        (r"\boxed{B. red}", 0),
        (r"\boxed{B. C}", 0),
        (r"\boxed{A. green}", 0),
        (r"\boxed{E}", 0),
        (r"\boxed{A, B}", 0),
        (r"\boxed{A and B}", 0),
        (r"\boxed{AB}", 0),
        (r"\boxed{red or green}", 0),
        (r"\boxed{Better}", 0),
        (r"\boxed{}", 0),
        (r"\boxed{B", 0),
        ("The answer is B.", 0),
        ("", 0),
    ],
)
def test_what_a_box_says(response, reward):
    assert rewards(CHOICE, CHOICE.read_record(LABELLED), response) == [reward]


def test_letters_come_before_texts_and_texts_before_small_letters():
    options = ["B", "a", "A", "c"]
    assert [choose(text, options) for text in ("A", "a", "B", "b", "D", "d", "C", "c")] == [
        *(0, None, 1, 0, 3, 3, 2, 3),
    ]


def test_latex_and_white_space_in_options():
    options = [r"$\frac{1}{2}$", r"$\frac{1}{3}$", "one  half\nof it"]
    written = (
        r"\frac{1}{2}",
        r"\frac{1}{3}",
        r"\frac{12}{}",
        "One half of it",
        "A: $\\frac{1}{2}$",
    )
    assert [choose(unwrapped(text), options) for text in written] == [0, 1, None, 2, 0]


@repeatable
@given(
    options=st.lists(
        st.text("abcdeé $\\{}.\n", min_size=1).filter(str.strip), min_size=2, max_size=26
    ),
    data=st.data(),
)
def test_letters_name_their_option_whatever_the_options_say(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    assume([o.strip() for o in options].count(options[index].strip()) == 1)
    record = {"question": "Which?", "options": options, "answer_index": index}
    problem, letter = CHOICE.read_record(record), ascii_uppercase[index]
    boxes = [rf"\boxed{{{letter}}}", rf"\boxed{{({letter})}}", rf"\boxed{{\text{{{letter}}}}}"]
    assert rewards(CHOICE, problem, *boxes) == [1, 1, 1]
    others = [o for o in ascii_uppercase if o != letter]
    assert not any(rewards(CHOICE, problem, *(rf"\boxed{{{o}}}" for o in others)))


@repeatable
@given(
    text=st.text("aB.() {}$\\\n", max_size=12), options=st.lists(st.text(max_size=3), max_size=3)
)
def test_nothing_in_a_box_makes_an_error(text, options):
    chosen = choose(unwrapped(text), options)
    assert chosen is None or 0 <= chosen < len(options)


# Yes or no


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (True, "yes"),
        (False, "no"),
        ("yes", "yes"),
        ("No", "no"),
        ("TRUE", "yes"),
        (" false ", "no"),
    ],
)
def test_answers_are_yes_or_no(answer, meaning):
    problem = BOOLEAN.read_record({"question": "Is it?", "answer": answer})
    assert problem == Problem("", "Is it?", meaning)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (r"\boxed{yes}", "yes"),
        (r"\boxed{Yes.}", "yes"),
        (r"\boxed{\text{TRUE}}", "yes"),
        (r"\boxed{$\mathrm{true}$}", "yes"),
        (r"\boxed{no}", "no"),
        (r"\boxed{\text{ False! }}", "no"),
        (r"\boxed{yes}, no, \boxed{no}", "no"),
        (r"\boxed{yes and no}", None),
        (r"\boxed{not yes}", None),
        (r"\boxed{1}", None),
        (r"\boxed{}", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_what_a_box_says_of_yes_and_no(response, says):
    for answer in ("yes", "no"):
        assert rewards(BOOLEAN, Problem("p", "?", answer), response) == [float(says == answer)]


def test_facts_are_the_solution():
    record = {"question": "Is it?", "answer": True, "facts": ["One.", "Two."], "decomposition": "?"}
    problem = BOOLEAN.read_record(record)
    assert problem.solution == "One.\nTwo."
    assert BOOLEAN.reference(problem) == ["One.", "Two.", r"\boxed{yes}"]
    assert BOOLEAN.read_record(record | {"solution": "So."}).solution == "So."
    assert BOOLEAN.read_record(record | {"facts": []}).solution == "?"
    assert BOOLEAN.reference(Problem("p", "?", "yes")) is None
    boxed = Problem("p", "?", "yes", "So \\boxed{no}, but\n\\boxed{yes}.\n")
    assert BOOLEAN.reference(boxed) == ["So no, but", "yes.", r"\boxed{yes}"]
    assert BOOLEAN.reference(Problem("p", "?", "yes", "yes")) is None  # no more than the answer


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": True}, "missing field 'question'"),
        ({"question": "?"}, "missing field 'answer'; expected true or false, or the text yes, no"),
        ({"question": "?", "answer": "maybe"}, "field 'answer' is 'maybe'; expected true or false"),
        ({"question": "?", "answer": 1}, "field 'answer' is 1; expected true or false"),
        ({"question": "?", "answer": ["yes"]}, r"field 'answer' is \['yes'\]; expected true or"),
        ({"question": "?", "answer": True, "facts": 7}, "field 'facts' is 7; expected text or a"),
        ({"question": "?", "answer": True, "facts": ["a", 7]}, r"field 'facts' is \['a', 7\]"),
    ],
)
def test_refused_questions(record, message):
    with pytest.raises(ValueError, match=message):
        BOOLEAN.read_record(record)


# Both


HOSTILE = [
    "{" * 1_000_000,
    "\\boxed{" + "{" * 1_000_000,
    "\\boxed{" + "{}" * 500_000,
    "\\boxed{" * 1_000 + "{" * 500_000 + "}" * 500_000,
    "}" * 1_000_000,
    "\\boxed{" * 140_000,
    "\\boxed{" * 70_000 + "A" + "}" * 70_000,
    "\\boxed " * 140_000,
    "\\boxed{" + "(" * 1_000_000 + "}",
    "\\boxed{" + "\\text{" * 80_000 + "B" + "}" * 80_000 + "}",
    "\\boxed{" + "{" * 400_000 + "B" + "}" * 400_000 + "}",
    "\\boxed{" + "$" * 1_000_000 + "x}",
    "\\boxed{" + "$" * 500_000 + "x" + "$" * 500_000 + "}",
    "\\boxed{\\text" + " " * 1_000_000 + "}",
    "\\boxed{" + "\\(" * 250_000 + "\\)" * 250_000 + "}",
    "\\boxed{" + " B " * 300_000 + "}",
    "\\boxed{B" + "." * 1_000_000 + "}",
    "\\boxed{B. " + "B. " * 300_000 + "}",
    "\\boxed{yes" + ".!" * 500_000 + "no}",
    "\\boxed{" + "\\\\{" * 300_000 + "}",
    "\\" * 1_000_000,
    "\n" * 1_000_000,
]


@pytest.mark.parametrize("task", [CHOICE, BOOLEAN], ids=lambda task: task.name)
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:14]!r}-{text[-4:]!r}")
def test_no_response_takes_more_than_a_second(task, text):
    """By a wide margin: what takes the square of a million steps takes hours."""
    problem = CHOICE.read_record(LABELLED) if task is CHOICE else Problem("p", "?", "yes")
    before = time.process_time()
    rewards(task, problem, text)
    assert time.process_time() - before < 1


@pytest.mark.parametrize("name", ["choice", "boolean"])
def test_examples_are_read_asked_and_solved(name):
    task = find_task(name)()
    problems = load_problems(EXAMPLES / f"{name}.jsonl", task.read_record)
    assert len(problems) == 3
    for number, problem in enumerate(problems, 1):
        assert problem.id == f"{name}:{number}"
        for asked in (task.prompt(problem), task.message(problem)):
            assert asked.count(problem.question) == 1
            assert task.answer_marker in asked
            assert "a line break" in asked
            assert "{delimiter}" not in asked
        wrong = {"yes": "no", "no": "yes", "A": "B"}.get(problem.answer, "A")
        boxes = rf"\boxed{{{problem.answer}}}", rf"\boxed{{{wrong}}}"
        assert rewards(task, problem, *boxes) == [1, 0]
        steps = ["It is so.\n", f"{boxes[1]}\n"]
        assert problem.question in task.localization(problem, steps)
        assert "numbered 1 to 2" in task.inline_localization(problem, steps)
        reference = task.reference(problem)
        if reference is not None:
            assert reference[-1] == boxes[0]
            assert rewards(task, problem, "".join(f"{step}\n" for step in reference)) == [1]
    assert any(task.reference(problem) for problem in problems)


@pytest.mark.parametrize("kind", [ChoiceTask, BooleanTask])
def test_templates_and_delimiters_of_ones_own(kind):
    task = kind(
        solve_prompt="Q: {problem} {delimiter}",
        localize_prompt="{count}: {problem}: {steps}",
        inline_prompt="Which of {count}?",
    )
    task.delimiter = "</step>"
    problem = kind().read_record(
        LABELLED if kind is ChoiceTask else {"question": "?", "answer": True}
    )
    assert task.prompt(problem) == task.message(problem) == f"Q: {problem.question} </step>"
    assert task.localization(problem, ["a</step>"]) == f"1: {problem.question}: Step 1: a"
    assert task.inline_localization(problem, ["a"]) == "Which of 1?"
    assert rewards(task, problem, f"So.</step>\\boxed {problem.answer}</step>") == [1]
    with pytest.raises(ValueError, match=r"localize_prompt: the text lacks \{problem\};"):
        kind(localize_prompt="{count}, {steps}")


def test_a_response_votes_for_a_letter_or_a_word_however_it_is_written():
    problem = Problem("p", "Which?", "B", extra={"options": ("red", "blue")})
    for text, letter in (("\\boxed{(b)}", "B"), ("\\boxed{blue}", "B"), ("\\boxed{A. red}", "A")):
        assert ChoiceTask().answer(problem, text) == letter
    assert ChoiceTask().answer(problem, "B") is ChoiceTask().answer(problem, "\\boxed{C}") is None
    question = Problem("q", "Is it?", "yes")
    assert BooleanTask().answer(question, "\\boxed{\\text{True}}") == "yes"
    assert BooleanTask().answer(question, "\\boxed{perhaps}") is None
