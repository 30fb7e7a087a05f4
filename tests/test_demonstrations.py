"""What is learnt from records and solutions: which tokens, how answers end, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoding import characters, spelt
from test_real_input import byte_pairs

from jaxreset.models.encoding import fill_chat
from jaxreset.tasks.answers import same_answer, unboxed
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem, Task
from jaxreset.tasks.demonstrations import (
    Answers,
    Demonstration,
    fitting,
    localized,
    read_demonstrations,
    solved,
    solved_problems,
)
from jaxreset.tasks.math import MathTask
from jaxreset.tasks.records import load_problems
from jaxreset.tasks.schemas import read_problem

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
# The end of a turn is the end of sequence, and a line break follows.
TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As OLMo 3's: an end of turn of its own between turns, the end of sequence behind the last one.
LAST = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ eos_token if loop.last and not add_generation_prompt else ';' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNENDED = "{% for m in messages %}({{ m.role }}){{ m.content }} {% endfor %}"
SPACED = TURNS.replace("</s>", " ~</s>")


class Plain(Task):
    """Asks what it is given, with a word before it."""

    name = "plain"

    def prompt(self, problem):
        return f"Q: {problem.question}\n"

    def score(self, items):
        return [float(text == problem.answer) for problem, text in items]


def answers_of(chat=TURNS, eos_ids=(2,), task=None, added="$A", **asked):
    return Answers(Asking(task or Plain(), characters(added, chat), **asked), eos_ids)


def read(tmp_path, answers, *records, name="some.jsonl"):
    file = tmp_path / name
    if name.endswith(".jsonl"):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name.endswith(".json"):
        file.write_text(json.dumps(records))
    else:
        pq.write_table(pa.Table.from_pylist(list(records)), file)
    found = read_demonstrations(file, answers)
    tokenizer = answers.asking.tokenizer
    return [(spelt(tokenizer, one.prompt), spelt(tokenizer, one.answer)) for one in found]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "texts": {"prompt": "1+1", "completion": "2"},
    "a chat and a text": {"prompt": [user("1+1")], "completion": "2"},
    "a chat and a message": {"prompt": [user("1+1")], "completion": [assistant("2")]},
    "messages": {"messages": [user("1+1"), assistant("2")]},
    "messages with fields of others": {"messages": [user("1+1"), assistant("2")], "source": "us"},
}


@pytest.mark.parametrize("name", ["some.jsonl", "some.json", "some.parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_one_record_in_all_its_forms_and_files(tmp_path, form, name):
    """One beginning of sequence, one end, which is the last token that is learnt."""
    asked = "<s>[user]1+1</s>\n[assistant]"
    assert read(tmp_path, answers_of(), FORMS[form], name=name) == [(asked, "2</s>")]
    assert read(tmp_path, raw_answers(), FORMS[form], name=name) == [("<s>1+1", "2</s>")]


def raw_answers():
    """There is a template, and prompts are raw text all the same."""
    asking = Asking(Plain(), characters("<s> $A </s>", TURNS), chat="raw")
    return Answers(asking, (2,))


def test_a_prompt_is_asked_as_in_training(tmp_path):
    """With the system's text and the examples; a question in the task's words too."""
    given = {"system": "Be brief.", "examples": [("2+2", "4")]}
    answers = answers_of(**given)
    before = "<s>[system]Be brief.</s>\n[user]Q: 2+2\n</s>\n[assistant]4</s>\n"
    records = (
        {"prompt": "1+1", "completion": "2"},
        {"question": "1+1", "completion": "2"},
        {"problem": "1+1", "completion": "2"},
    )
    asked = [f"{before}[user]{text}</s>\n[assistant]" for text in ("1+1", "Q: 1+1\n", "Q: 1+1\n")]
    assert [prompt for prompt, _ in read(tmp_path, answers, *records)] == asked
    training = answers.asking.tokens([Problem("", "1+1", "2")])[0]
    assert spelt(answers.asking.tokenizer, training) == asked[1]
    raw = Answers(Asking(Plain(), characters(), chat="raw", **given), (2,))
    before = "Be brief.\n\nQ: 2+2\n4\n\n"
    assert [p for p, _ in read(tmp_path, raw, *records)] == [
        f"{before}{text}" for text in ("1+1", "Q: 1+1\n", "Q: 1+1\n")
    ]
    assert spelt(raw.asking.tokenizer, raw.asking.tokens([Problem("", "1+1", "2")])[0]) == (
        f"{before}Q: 1+1\n"
    )


def test_of_a_chat_the_last_answer_is_learnt(tmp_path):
    turns = [{"role": "system", "content": "Add."}, user("1+1"), assistant("2"), user("+1")]
    asked = "<s>[system]Add.</s>\n[user]1+1</s>\n[assistant]2</s>\n[user]+1</s>\n[assistant]"
    for record in (
        {"messages": [*turns, assistant("3")]},
        {"prompt": turns, "completion": "3"},
    ):
        assert read(tmp_path, answers_of(), record) == [(asked, "3</s>")]
        with pytest.raises(
            ValueError, match="line 1: a chat of several turns, and there is no tem"
        ):
            read(tmp_path, raw_answers(), record)
    own = read(tmp_path, answers_of(system="Be brief."), {"prompt": turns, "completion": "3"})
    assert own[0][0] == asked.replace("Add.", "Be brief.")


@pytest.mark.parametrize(
    ("chat", "eos_ids", "end"),
    [
        (TURNS, (2,), "</s>"),  # and not the line break behind it
        (LAST, (2,), "</s>"),
        (SPACED, (2,), " ~</s>"),  # what the template puts before the end is its own
        (UNENDED, (2,), "</s>"),
        (None, (2,), "</s>"),
        (TURNS, (3, 4), "<x>"),  # the tokenizer's own ends no response
        (TURNS, (), ""),
    ],
)
@pytest.mark.parametrize("written", ["2", "2</s>", "2</s></s>", "2</s>\n"])
def test_an_answer_ends_once(chat, eos_ids, end, written):
    if 2 not in eos_ids:
        written = "2"
    answers = answers_of(chat, eos_ids)
    tokens = answers.tokens(written, in_template=answers.asking.in_template)
    assert tokens.dtype == np.int32
    assert spelt(answers.asking.tokenizer, tokens) == f"2{end}"
    assert sum(int(token) in eos_ids for token in tokens) == bool(eos_ids)


def test_a_turn_of_byte_pairs_ends_by_its_special_token(tmp_path):
    """As Qwen2.5's: the prompt and what is learnt are the filled template, up to its last line break."""
    tokenizer = byte_pairs(["How many pages in 5 days? 5 x 3 = 15"])
    answers = Answers(Asking(MathTask(), tokenizer), (0, 2))
    messages = [user("How many?"), assistant("5 x 3 = 15\n\\boxed{15}\n")]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    [one] = read_demonstrations(file, answers)
    whole = fill_chat(tokenizer, messages, {}, answered=True)
    assert tokenizer.decode([*one.prompt, *one.answer]) == whole.removesuffix("\n")
    assert tokenizer.decode(one.answer) == "5 x 3 = 15\n\\boxed{15}\n<|im_end|>"
    assert [int(token) for token in one.answer if token in (0, 2)] == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "1+1"}, "fields found: prompt; expected 'prompt' and 'completion', 'question'"),
        ({"completion": "2"}, "fields found: completion; expected"),
        ({}, "fields found: none; expected"),
        (
            {"prompt": "1", "question": "1", "completion": "2"},
            "fields found: completion, prompt, q",
        ),
        (
            {"messages": [user("1"), assistant("2")], "completion": "2"},
            "'messages' and 'completion'",
        ),
        ({"prompt": 7.5, "completion": None}, "missing field 'completion'|'completion' is None"),
        ({"prompt": " ", "completion": "2"}, "field 'prompt' is ' '; expected text, or messages"),
        ({"prompt": "1", "completion": ""}, "field 'completion' is ''"),
        ({"prompt": "1", "completion": "</s>"}, "the answer '</s>' has no tokens to learn"),
        (
            {"prompt": "1", "completion": "2</s>3"},
            "'2</s>3' goes on behind .* '</s>'.*leave it out",
        ),
        ({"prompt": [], "completion": "2"}, "field 'prompt' is \\[\\]; expected messages"),
        (
            {"prompt": ["1"], "completion": "2"},
            "field 'prompt', message 1 is '1'; expected messages",
        ),
        (
            {"prompt": [user("1"), assistant("2")], "completion": "2"},
            "'prompt' ends with the assis",
        ),
        (
            {"prompt": "1", "completion": [user("2")]},
            "'completion' holds messages of user; expected",
        ),
        ({"messages": "1+1"}, "field 'messages' is '1\\+1'; expected messages"),
        (
            {"messages": [assistant("2")]},
            "'messages' ends with the message of 'assistant'; expected",
        ),
        (
            {"messages": [user("1")]},
            "'messages' ends with the message of 'user'; expected the assis",
        ),
        (
            {"messages": [user("1"), {"role": "assistant", "content": None}]},
            "field 'messages', message 2: missing field 'content'",
        ),
        (
            {"messages": [{"content": "1"}, assistant("2")]},
            "field 'messages', message 1: missing field 'role'",
        ),
    ],
)
def test_a_malformed_record_is_refused_by_file_line_and_field(tmp_path, record, words):
    with pytest.raises(ValueError, match=words) as refused:
        read(tmp_path, answers_of(), FORMS["texts"], record)
    assert f"{tmp_path / 'some.jsonl'}, line 2: " in str(refused.value)


def test_malformed_files_are_refused(tmp_path):
    answers = answers_of()
    for name, text, words in (
        ("none.jsonl", None, "no such file"),
        ("some.csv", "a,b", "extension '.csv'; expected one of .jsonl, .parquet, .json"),
        ("empty.jsonl", "\n", "empty; expected at least one record with 'prompt' and 'completion'"),
        ("cut.jsonl", '{"prompt": "1', "line 1: malformed JSON"),
        ("cut.json", '[{"prompt": "1"', "malformed JSON .*expected a list of objects"),
        ("object.json", '{"prompt": "1"}', "expected a list of objects"),
        ("numbers.json", "[1]", "record 1 in line 1: 1; expected a JSON object"),
        ("twice.json", '[{"prompt": "1", "prompt": "2"}]', "'prompt' is there more than once"),
        ("fake.parquet", "PAR", "not a Parquet file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*{words}"):
            read_demonstrations(tmp_path / name, answers)
    with pytest.raises(ValueError, match="is a folder"):
        read_demonstrations(tmp_path, answers)


def test_what_is_too_long_is_left_out_and_counted(caplog):
    def one(prompt, answer, place):
        return Demonstration(np.zeros(prompt, np.int32), np.zeros(answer, np.int32), place)

    found = [one(3, 4, "line 1"), one(9, 1, "line 2"), one(1, 9, "line 3"), one(3, 3, "line 4")]
    kept = fitting(found, prompt=3, answer=4, source="warm_start.path")
    assert [d.place for d in kept] == ["line 1", "line 4"]
    assert "warm_start.path: 2 of 4 demonstrations are left out" in caplog.text
    assert "the first, line 2, has 9 tokens of prompt and 1 of answer" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"none of 4 demonstrations fits sampling.max_prompt_tokens=2 and "
        r"sampling.max_response_tokens=4; the shortest, line 4, has 3 tokens of prompt and 3",
    ):
        fitting(found, prompt=2, answer=4, source="x")


# Of tasks


def test_problems_are_shown_with_their_solutions():
    answers = answers_of(system="Add.")
    problems = [
        Problem("a", "1+1", "2", "1+1=2\n\nso 2"),
        Problem("b", "2+2", "4"),
        Problem("c", "3+3", "6", "6"),
    ]
    found = solved_problems(problems, answers)
    tokenizer = answers.asking.tokenizer
    assert [(one.place, spelt(tokenizer, one.answer)) for one in found] == [
        ("a", "1+1=2\nso 2\n</s>"),
        ("c", "6\n</s>"),
    ]
    for one, problem in zip(found, (problems[0], problems[2]), strict=True):
        np.testing.assert_array_equal(one.prompt, answers.asking.tokens([problem])[0])


class Showing(Plain):
    """Shows another prompt than it asks, and where an attempt went wrong."""

    def __init__(self, asked):
        self.asked = asked

    def demonstrate_solution(self, problem, rng):
        return None if self.asked is None else (self.asked, f"{rng.integers(7, 8)}\n")

    def demonstrate_localization(self, problem, rng, *, inline=False):
        return "where?\n", "\\boxed{1}"


def test_a_prompt_of_a_tasks_own_is_the_users_message():
    rng, problem = np.random.default_rng(0), Problem("a", "1+1", "2")
    for asked, shown in (("Try 1+1", "Try 1+1"), ([user("Try")], "Try"), ("Q: 1+1\n", "Q: 1+1\n")):
        answers = answers_of(task=Showing(asked))
        one = solved(problem, answers, rng)
        tokenizer = answers.asking.tokenizer
        assert spelt(tokenizer, one.prompt) == f"<s>[user]{shown}</s>\n[assistant]"
        assert spelt(tokenizer, one.answer) == "7\n</s>"
    with pytest.raises(ValueError, match="'plain' demonstrates no solution of problem 'a'"):
        solved(problem, answers_of(task=Showing(None)), rng)


def test_localising_is_shown_as_it_is_asked():
    rng, problem = np.random.default_rng(0), Problem("a", "1+1", "2")
    for chat in ("auto", "raw"):  # the question is a chat wherever there is a template
        answers = Answers(Asking(Showing("x"), characters("$A", SPACED), chat=chat), (2,))
        one = localized(problem, answers, rng, inline=False)
        assert spelt(answers.asking.tokenizer, one.prompt) == "<s>[user]where?\n ~</s>\n[assistant]"
        assert spelt(answers.asking.tokenizer, one.answer) == "\\boxed{1} ~</s>"
    one = localized(problem, answers, rng, inline=True)
    assert spelt(answers.asking.tokenizer, one.prompt) == "where?\n"
    assert spelt(answers.asking.tokenizer, one.answer) == "\\boxed{1}</s>"
    with pytest.raises(ValueError, match=r"mode=inline: .*set task.chat=raw"):
        localized(problem, answers_of(task=Showing("x")), rng, inline=True)


# Solutions of mathematics in our format


def checked(task, problem):
    """The reference, if its steps are as the policy should write them and the verifier takes them."""
    steps = task.reference(problem)
    if steps is None:
        return None
    assert all(step.strip() and task.delimiter not in step for step in steps)
    assert [task.answer_marker in step for step in steps] == [False] * (len(steps) - 1) + [True]
    response = "".join(f"{step}{task.delimiter}" for step in steps)
    assert same_answer(response.replace(task.delimiter, "\n"), problem.answer)
    return steps


NUMBERS = st.integers(-(10**6), 10**6).map(str) | st.sampled_from(["1,080", "0.5", "3.", "$12"])
VALUES = NUMBERS | st.sampled_from(
    [r"\frac{1}{2}", r"x^2 + 1", r"\text{Monday}", r"(1, 2)", r"\{1, 2\}", r"\sqrt{2} \text{ cm}"]
)
PROSE = st.text(st.sampled_from("ab 1+=.{}\\$\n"), max_size=30)


@given(lines=st.lists(PROSE, max_size=4), number=NUMBERS, delimiter=st.sampled_from(["\n", "</s>"]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_gsm8k_solution_becomes_steps_that_score(lines, number, delimiter):
    task = MathTask()
    task.delimiter = delimiter
    record = {"question": "How many?", "answer": "\n".join([*lines, f"#### {number}"])}
    problem = read_problem(record)
    if problem.answer == number.strip():
        steps = checked(task, problem)
        assert (steps is None) == (not [x for x in "\n".join(lines).split("\n") if x.strip()])


@given(
    before=st.lists(PROSE | VALUES.map(lambda v: rf"so \boxed{{{v}}}"), max_size=4),
    value=VALUES,
    behind=st.sampled_from(["", ".", "$.", "\nwhich was to be found", " \\fbox{1"]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_math_solution_becomes_steps_that_score(before, value, behind):
    solution = "\n".join([*before, rf"the answer is \boxed{{{value}}}{behind}"])
    checked(MathTask(), read_problem({"problem": "What?", "solution": solution}))


def test_solutions_of_math_by_example():
    task = MathTask()
    steps = {
        "2 x 3 = <<2*3=6>>6 eggs.\n#### 6": ["2 x 3 = 6 eggs.", r"\boxed{6}"],
        "#### Plan\nAdd.\n#### 6": ["#### Plan", "Add.", r"\boxed{6}"],
        "#### 6": None,
        "6": None,
    }
    for written, expected in steps.items():
        problem = read_problem({"question": "How many?", "answer": written})
        assert task.reference(problem) == expected
    solution = r"First $\boxed{2}$, then $\boxed 3$." + "\n" + r"So \boxed{\frac{1}{2}} remains."
    problem = read_problem({"problem": "What remains?", "solution": solution})
    lines = [r"First $2$, then $3$.", r"So \frac{1}{2} remains."]
    assert task.reference(problem) == [*lines, r"\boxed{\frac{1}{2}}"]
    task.answer_marker = "Answer:"
    assert task.reference(problem)[-1] == r"Answer: \boxed{\frac{1}{2}}"
    task.answer_marker = "remains"
    assert task.reference(problem) == [lines[0], r"remains \boxed{\frac{1}{2}}"]
    numina = read_problem({"problem": "When?", "answer": "x}", "solution": "Soon."})
    assert task.reference(numina) is None  # no box holds it


def _around(before, behind, boxed):
    def wrap(inner):
        whole, bare = inner
        return f"{before}{whole}{behind}", bare if boxed else f"{before}{bare}{behind}"

    return wrap


TEXTS = st.recursive(
    st.sampled_from(["a", " 2 ", "\\{", "\\}", "\\frac"]).map(lambda text: (text, text)),
    lambda inner: st.one_of(
        inner.map(_around("\\boxed{", "}", True)),
        inner.map(_around("\\fbox {", "}", True)),
        inner.map(_around("{", "}", False)),
        st.tuples(inner, inner).map(lambda two: (two[0][0] + two[1][0], two[0][1] + two[1][1])),
    ),
    max_leaves=8,
)


@given(TEXTS)
@settings(derandomize=True, deadline=None)
def test_of_boxes_what_they_hold_stays(texts):
    whole, bare = texts
    assert unboxed(whole) == bare
    assert unboxed(whole + "\\boxed{3") == bare + "3"  # never closed
    assert unboxed(whole + "\\boxed 3.") == bare + "3."


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K isn't there")
def test_all_of_gsm8k_becomes_steps_that_score():
    task = MathTask()
    problems = load_problems(GSM8K)
    assert sum(checked(task, problem) is not None for problem in problems) == len(problems) == 7473
