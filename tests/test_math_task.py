"""The math task: answers, records, prompts, and the verifier, over all of GSM8K if at hand."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_programs import tree_below

from jaxreset.tasks.answers import (
    answers_equal,
    final_answer,
    last_boxed,
    plain_number,
    prepare_verifier,
)
from jaxreset.tasks.base import Problem
from jaxreset.tasks.math import MathTask, score_answer
from jaxreset.tasks.records import load_problems
from jaxreset.tasks.workers import RewardWorkers

GSM8K = Path(__file__).parents[1].parent / "shared/data/gsm8k"

CLIPS = {
    "question": "Ada sold 48 clips in April and half as many in May. How many altogether?",
    "answer": "In May: 48/2 = <<48/2=24>>24.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
}
BARN = {
    "question": "A barn costs $1,000 and a roof $80 more than nothing. What do both cost?",
    "answer": "Both cost 1000+80 = $<<1000+80=1080>>1,080.\n#### 1,080",
}
FROST = {"question": "It is 5 degrees and gets 12 colder.", "answer": "5-12=<<5-12=-7>>-7\n#### -7"}
AREA = {
    "problem": r"A square has side $\frac{1}{2}$. What is its area?",
    "solution": r"Since $\boxed{x}$ is notation here, the area is $\boxed{\frac{1}{4}}$.",
    "level": "Level 1",
}
ROOTS = {"problem": r"Solve $x^2 = 4$.", "solution": r"So $\boxed{\{-2, 2\}}$.", "answer": "-2, 2"}


@pytest.fixture(scope="module")
def task():
    math_task = MathTask(processes=2, cpu_seconds=2.0)
    math_task.delimiter = "</thought>"
    yield math_task
    math_task.close()


def write_jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\text{a {nested} one}}", r"\text{a {nested} one}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),
        (r"\boxed{7} and \boxed{8 is never closed", "7"),
        (r"\boxed{9 is never closed \boxed{10}", "10"),
        (r"\boxed{\boxed{11}}", "11"),
        (r"\fbox{12}", "12"),
        (r"\boxed {13}", "13"),
        (r"thus $\boxed 14$.", "14"),
        (r"\boxed{15} #### 16", "15"),
        ("one\n#### 17\nand more", "17"),
        ("#### 1\n#### 18", "18"),
        (r"\boxed{}", ""),
        ("no answer at all, just 19", None),
        (r"} \boxed", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@given(st.text(alphabet="ab{}\\ $", max_size=30), st.text(max_size=30))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_a_box_is_found_behind_any_text(before, contents):
    contents = contents.replace("\\", "").replace("{", "").replace("}", "")
    assert last_boxed(before.removesuffix("\\") + f" \\boxed{{{contents}}}") == contents.strip()


def test_many_open_boxes_take_linear_time():
    assert last_boxed("\\boxed{" * 200_000) is None
    assert last_boxed("\\boxed " * 200_000) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", "72"),
        ("1,080", "1080"),
        ("109,200,000", "109200000"),
        (r"10,\!000", "10000"),
        (r"10{,}000", "10000"),
        (r"10\,000", "10000"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("$-7", "-7"),
        (r"-\$7.50", "-7.50"),
        (r"$\$18$", "18"),
        (r"\(18\)", "18"),
        ("18.", "18"),
        ("18.00", "18.00"),
        (".5", "0.5"),
        ("+4", "4"),
        ("18 dollars", "18"),
        (r"18 \text{ cm}^2", "18"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
    ],
)
def test_plain_numbers(text, value):
    number = plain_number(text)
    assert number is not None
    assert number.value == Decimal(value)
    assert number.percent == (text == r"50\%")


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1/2", "1,2", "12,34", "1 2", "3:00", "5x", "5ab", "2^3", "1e9", "--1", "-$-1"),
        *("5 million", "5 pm", r"5\text{ or 6}", r"5\text{i}", "5 pi", "half", "9" * 1000, "٣"),
    ],
)
def test_not_plain_numbers(text):
    assert plain_number(text) is None


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1080", "1,080"),
        ("18.0", "18"),
        ("50%", "50"),
        ("0.5", "50%"),
        (r"\dfrac{1}{2}", r"\frac12"),
        ("0.25", r"\frac{1}{4}"),
        (r"\frac{36}{2}", "18"),
        ("x = 18", "18"),
        ("2, -2", "-2, 2"),
        ("(1,2)", r"\left( 1, 2 \right)"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\text{east}", "east"),
        (r"\text{(B)}", "B"),
        ("not an expression ]", "not an expression ]"),
    ],
)
def test_equal_answers(answer, gold):
    assert answers_equal(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("", "18"),
        ("1081", "1,080"),
        ("-18", "18"),
        ("0.33", "0.333"),
        ("0.333", r"\frac{1}{3}"),
        ("5%", "50%"),
        ("5", "0.05"),
        ("17, 18", "18"),
        (r"5 \text{ or } 18", "18"),
        ("5 million", "5"),
        ("[1,2]", "(1,2)"),
        ("2x", "x^2"),
        ("the answer is 18", "18"),
        ("18x", "18"),
        ("not an expression [", "not an expression ]"),
    ],
)
def test_different_answers(answer, gold):
    assert not answers_equal(answer, gold)


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9
    ),
    st.sampled_from(["{}", "{:,}", "${}$", r"\${}", "{} dollars", r"{}\text{{ m}}", "{:,}."]),
)
@settings(derandomize=True, max_examples=200, deadline=None)
def test_however_a_number_is_written_it_is_itself_and_nothing_else(number, form):
    written = form.format(number)
    assert answers_equal(written, f"{number:f}")
    assert not answers_equal(written, f"{number + Decimal('0.001'):f}")


# Records


def test_gsm8k_and_math_and_numina_records(tmp_path):
    path = write_jsonl(tmp_path / "mixed.jsonl", CLIPS, BARN, FROST, AREA, ROOTS)
    problems = load_problems(path)
    assert [problem.id for problem in problems] == [f"mixed:{line}" for line in range(1, 6)]
    assert [problem.answer for problem in problems] == [
        "72",
        "1,080",
        "-7",
        r"\frac{1}{4}",
        "-2, 2",
    ]
    assert problems[0].question == CLIPS["question"]
    assert problems[3].question == AREA["problem"]


def test_parquet_holds_the_same_problems(tmp_path):
    records = [CLIPS, BARN, FROST]
    lines = load_problems(write_jsonl(tmp_path / "same.jsonl", *records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "same.parquet")
    assert load_problems(tmp_path / "same.parquet") == lines


def test_lines_end_only_at_line_feeds_and_blank_ones_count(tmp_path):
    odd = {"problem": "first\u2028second\x85third", "answer": 5}
    path = tmp_path / "odd.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(odd, ensure_ascii=False).encode() + b"\r\n\n"
        b'{"question": "?", "answer": "7"}'
    )
    first, second = load_problems(path)
    assert first == Problem("odd:1", odd["problem"], "5")
    assert second == Problem("odd:3", "?", "7")


@pytest.mark.parametrize(
    ("name", "expected_call"),
    [
        ("org/data", (("org/data",), "train")),
        ("org/data:test", (("org/data",), "test")),
        ("org/data:main:test", (("org/data", "main"), "test")),
    ],
)
def test_a_data_set_by_name(monkeypatch, name, expected_call):
    calls = []

    def load_dataset(*names, split):
        calls.append((names, split))
        return [CLIPS, AREA]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [problem.id for problem in load_problems(name)] == [f"{name}:1", f"{name}:2"]
    assert calls == [expected_call]


def test_a_data_set_that_does_not_load(monkeypatch):
    def load_dataset(*names, split):
        raise ConnectionError("the hub is away")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"org/data:test: .*'test' of 'org/data': the hub is away"):
        load_problems("org/data:test")
    with pytest.raises(ValueError, match="expected a data set as 'name', 'name:split'"):
        load_problems("a:b:c:d")


def test_a_data_set_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"org/data: no such file.*'jaxreset\[datasets\]'"):
        load_problems("org/data")


GOOD = json.dumps(CLIPS) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"empty; expected at least one problem"),
        ("\n\n", r"empty; expected at least one problem"),
        (
            GOOD + '\n{"question": "\\ud83d?", "answer": "1"}',
            r"train.jsonl, line 3: field 'question' holds half a character, \\ud83d, at position 0",
        ),
        (
            '{"question": "?", "answer": "#### 7\\udc00"}',
            r"line 1: field 'answer' holds half a character, \\udc00, at position 6",
        ),
        ('{"problem": "?", "solution": "\\ud800"}', "line 1: field 'solution' holds half"),
        ('{"question": NaN, "answer": "1"}', "line 1: field 'question' is nan; expected the prob"),
        ('{"question": -Infinity, "answer": "1"}', "line 1: field 'question' is -inf"),
        ('{"question": true, "answer": "1"}', "line 1: field 'question' is True"),
        ('{"question": ["?"], "answer": "1"}', r"line 1: field 'question' is \['\?'\]"),
        ('{"question": " \\n", "answer": "1"}', r"line 1: field 'question' is ' \\n'"),
        (
            GOOD + '{"question": "a", "question": "b", "answer": "1"}',
            "line 2: malformed JSON .the field 'question' is there more than once.; expected one",
        ),
        ('{"question": "a\0b", "answer": "1"}', "line 1: malformed JSON .Invalid control char"),
        (GOOD + "\0\0\0\0", "line 2: malformed JSON"),
        ('{"question": "?", "answer": ' + "9" * 5000 + "}", "line 1: malformed JSON"),
        (GOOD + '{"question": "?', r"line 2: malformed JSON \(.*expected one object a line"),
        (GOOD + GOOD.strip() + GOOD, r"line 2: malformed JSON \(Extra data"),
        (GOOD + "[1, 2]", r"line 2: \[1, 2\]; expected a JSON object with named fields"),
        ('{"answer": "#### 1"}', r"line 1: missing field 'problem'.*fields found: answer"),
        (GOOD + '{"question": "?"}', r"line 2: missing field 'answer'; expected the final answer"),
        ('{"question": "?", "answer": null}', r"line 1: missing field 'answer'"),
        ('{"question": 5, "answer": true}', r"line 1: field 'answer' is True; expected"),
        ('{"question": " ", "answer": "1"}', r"line 1: field 'question' is ' '; expected the"),
        ('{"question": ["?"], "answer": "1"}', r"line 1: field 'question' is \['\?'\]; expected"),
        (
            GOOD + '{"question": "?", "answer": "It is 5 apples."}',
            r"line 2: no final answer in field 'answer', 'It is 5 apples.'; expected.*'#### 72'",
        ),
        ('{"question": "?", "answer": "so\\n#### "}', r"line 1: no final answer in field 'answer'"),
        (
            '{"problem": "?", "solution": "thus 5"}',
            r"line 1: no final answer in field 'solution', 'thus 5'; expected .*last \\boxed",
        ),
        ('{"problem": "?", "solution": "\\\\boxed{5"}', r"line 1: no final answer"),
    ],
)
def test_refused_json_lines(tmp_path, text, message):
    path = tmp_path / "train.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_problems(path)
    assert str(error.value).startswith(str(path))


def test_refused_files(tmp_path):
    for missing in (tmp_path / "away.jsonl", "data/away.parquet", "./away", "~/away.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"away.*: no such file"):
            load_problems(missing)
    (tmp_path / "train.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"extension '.csv'; expected one of .jsonl, .parquet"):
        load_problems(tmp_path / "train.csv")
    with pytest.raises(ValueError, match=r"is a folder; expected a file ending in .jsonl"):
        load_problems(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'{"question": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"line 2: malformed JSON \('utf-8' codec can't decode"):
        load_problems(tmp_path / "latin.jsonl")
    spelt = pa.py_buffer(b"goodcaf\xe9")  # a table is written without being looked at
    ends = pa.py_buffer(np.array([0, 4, 8], np.int32))
    questions = pa.StringArray.from_buffers(2, ends, spelt)
    pq.write_table(pa.table({"question": questions, "answer": ["1", "2"]}), tmp_path / "l.parquet")
    with pytest.raises(ValueError, match=r"l.parquet, row 2: can't be read \('utf-8' codec can't"):
        load_problems(tmp_path / "l.parquet")
    (tmp_path / "text.parquet").write_text(GOOD)
    with pytest.raises(ValueError, match=r"text.parquet: not a Parquet file"):
        load_problems(tmp_path / "text.parquet")
    pq.write_table(pa.Table.from_pylist([CLIPS, {"question": "?"}]), tmp_path / "half.parquet")
    with pytest.raises(ValueError, match=r"half.parquet, row 2: missing field 'answer'"):
        load_problems(tmp_path / "half.parquet")


# Prompts


def test_the_prompt_keeps_latex_and_asks_once(task):
    question = r"What is $\frac{1}{2}$ of {steps} and {problem}?"
    text = task.prompt(Problem("p", question, "417"))
    assert question in text
    assert text.count("What is") == 1
    assert "{delimiter}" not in text
    assert task.delimiter in text
    assert task.answer_marker in text
    assert "417" not in text


def test_the_localization_question_numbers_the_steps(task):
    steps = [
        "Take $\\frac{1}{2}$. </thought>",
        "Then {count} is\n{problem}.</thought>",
        "</thought>",
    ]
    text = task.localization(Problem("p", "How many?", "417"), steps)
    assert "How many?" in text
    assert (
        "Step 1: Take $\\frac{1}{2}$.\n\nStep 2: Then {count} is\n{problem}.\n\nStep 3: (" in text
    )
    assert "in 3 numbered steps" in text
    assert "1 <= N <= 3" in text
    assert r"\boxed{N}" in text.splitlines()[-1]
    assert task.delimiter not in text
    assert "417" not in text
    with pytest.raises(ValueError, match="problem 'p': steps is empty"):
        task.localization(Problem("p", "How many?", "417"), [])


def test_steps_lose_a_delimiter_that_ends_in_white_space():
    task = MathTask()
    task.delimiter = "</thought>\n"
    text = task.localization(Problem("p", "?", "1"), ["one</thought>\n", "</thought>\n", "two"])
    assert "Step 1: one\n" in text
    assert "Step 2: (empty)\n" in text
    assert "Step 3: two\n" in text


def test_the_inline_question_stands_behind_the_attempt(task):
    text = task.inline_localization(Problem("p", "How many?", "417"), ["a", "b", "c"])
    assert "numbered 1 to 3" in text
    assert "1 <= N <= 3" in text
    assert r"\boxed{N}" in text.splitlines()[-1]
    assert task.delimiter in text  # which ends the steps
    assert "How many?" not in text
    assert "417" not in text


def test_the_task_does_not_know_the_first_wrong_step(task):
    assert task.first_wrong_step(Problem("p", "?", "1"), ["wrong"]) is None


def test_templates_of_ones_own(tmp_path):
    solve, localize = tmp_path / "solve.txt", tmp_path / "localize.txt"
    solve.write_text("Q: {problem} \\boxed{N} {delimiter}")
    localize.write_text("{count} in {problem}: {steps}")
    inline = tmp_path / "inline.txt"
    inline.write_text("Which of {count}, {N}?")
    own = MathTask(solve_prompt=solve, localize_prompt=str(localize), inline_prompt=inline)
    problem = Problem("p", "x?", "1")
    assert own.prompt(problem) == own.message(problem) == "Q: x? \\boxed{N} a line break"
    assert own.localization(problem, ["a", "b"]) == "2 in x?: Step 1: a\n\nStep 2: b"
    assert own.inline_localization(problem, ["a", "b"]) == "Which of 2, {N}?"


LACKING = {
    "solve_prompt": "{problem}",
    "localize_prompt": "{problem}, {count}",
    "inline_prompt": "{count}",
}


@pytest.mark.parametrize("argument", LACKING)
def test_refused_templates(tmp_path, argument):
    with pytest.raises(FileNotFoundError, match=f"{argument}: no such file: .*away.txt"):
        MathTask(**{argument: tmp_path / "away.txt"})
    (tmp_path / "bare.txt").write_text("Solve $problem, {steps}.")
    with pytest.raises(ValueError, match=f"{argument}: .*bare.txt lacks {LACKING[argument]};"):
        MathTask(**{argument: tmp_path / "bare.txt"})


# The verifier


def variants(problem: Problem, solution: str) -> list[tuple[str, float]]:
    """A gold solution as it stands, boxed, and with its final number changed; with rewards."""
    body = solution.rpartition("####")[0]
    changed = f"{int(problem.answer.replace(',', '')) + 1:,}"
    return [
        (solution, 1.0),
        (f"{body}\\boxed{{{problem.answer}}}", 1.0),
        (f"{body}#### {changed}", 0.0),
        (f"{body}\\boxed{{{changed}}}", 0.0),
    ]


def test_gold_solutions_through_the_workers(task, tmp_path):
    records = [CLIPS, BARN, FROST]
    problems = load_problems(write_jsonl(tmp_path / "made.jsonl", *records))
    cases = [
        (problem, response, reward)
        for problem, record in zip(problems, records, strict=True)
        for response, reward in variants(problem, record["answer"])
    ]
    scores = task.score([(problem, response) for problem, response, _ in cases])
    np.testing.assert_array_equal(scores.rewards, [reward for *_, reward in cases])
    assert scores.timeouts == ()


def test_responses_as_a_policy_writes_them(task):
    half = Problem("half", "?", r"\frac{1}{2}")
    responses = {
        "One.</thought>Two, so \\boxed{0.5}.</thought>": 1,
        "One.</thought>#### \\frac{2}{4}</thought>": 1,
        "\\boxed{1} was too fast.</thought>\\boxed{\\dfrac12}</thought>": 1,
        "\\boxed{0.5} was too fast.</thought>\\boxed{1}</thought>": 0,
        "The answer is 0.5.</thought>": 0,
        "": 0,
    }
    scores = task.score([(half, response) for response in responses])
    np.testing.assert_array_equal(scores.rewards, list(responses.values()))


def test_pathological_answers_are_ended_counted_and_named(task, caplog):
    problem = Problem("train:7", "?", "81")
    responses = [
        r"\boxed{81}",
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{\frac{162}{2}}",
        "\\boxed{" + "(" * 3000 + "81" + ")" * 3000 + "}",
        r"\boxed{80}",
        r"\boxed{81.0}",
    ]
    with caplog.at_level(logging.WARNING, "jaxreset.tasks.workers"):
        scores = task.score([(problem, response) for response in responses])
    np.testing.assert_array_equal(scores.rewards[[0, 1, 2, 4, 5]], [1, 0, 1, 0, 1])
    assert 1 in scores.timeouts
    assert set(scores.timeouts) <= {1, 3}
    assert any(repr(responses[1]) in record.message for record in caplog.records)
    assert all("'train:7'" in record.message for record in caplog.records)


HOSTILE = [
    r"\boxed{9^{9^9}}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{(10^{10^{10}})!}",
    "\\boxed{" + "(" * 2**19 + "81" + ")" * 2**19 + "}",
    "\\boxed{" + "{" * 2**20,
    "\\boxed{" * 2**17,
    "\\boxed{81" + " and so on" * 2**17,
    "\\boxed{" + "9" * 2**20 + "}",
    "\\boxed{" + "\\frac{" * 2**17 + "}" * 2**17 + "}",
    "\\boxed{" + "\\sqrt{" * 200 + "81" + "}" * 201,
    r"\boxed{\sum_{n=1}^{10^{12}} \prod_{k=1}^{n} k^k}",
    r"\boxed{\int_0^1 x^{x^{x^{x}}} \sin(x^x) dx}",
    "\\boxed{" + "+".join(["x^{99999}"] * 2**14) + "}",
]


def test_a_batch_with_hostile_answers():
    """256 responses, 5% hostile: all others are judged right, in time, and no worker is left."""
    honest = [
        (r"\boxed{81}", 1),
        ("#### 81.0", 1),
        (r"So \boxed{\frac{162}{2}}", 1),
        (r"\boxed{80}", 0),
    ]
    problem = Problem("square", "?", "81")
    responses, rewards = map(list, zip(*(honest[n % 4] for n in range(256)), strict=True))
    for place, answer in zip(range(7, 256, 20), HOSTILE, strict=True):
        responses[place], rewards[place] = answer, 0
    deadline, before = 20.0, tree_below(os.getpid())
    workers = RewardWorkers(
        score_answer, cpu_seconds=0.5, wall_seconds=deadline, prepare=prepare_verifier
    )
    with workers:
        workers.score([(problem, honest[0][0])] * 4)  # all have started
        start = time.perf_counter()
        scores = workers.score([(problem, response) for response in responses])
        seconds = time.perf_counter() - start
        assert len(tree_below(os.getpid()) - before) == 2
    np.testing.assert_array_equal(scores.rewards, rewards)
    assert seconds < 2 * deadline
    assert not tree_below(os.getpid()) - before


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K files are not at hand")
def test_all_of_gsm8k(task):
    sample = []
    total = 0
    for file in (GSM8K / "train.jsonl", GSM8K / "test.jsonl"):
        problems = load_problems(file)
        solutions = [json.loads(line)["answer"] for line in file.open(encoding="utf-8")]
        for number, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
            for response, reward in variants(problem, solution):
                assert score_answer(problem, response) == reward, (problem.id, response[-40:])
                if number % 40 == 0:
                    sample.append((problem, response, reward))
        total += len(problems)
    assert total == 8792
    scores = task.score([(problem, response) for problem, response, _ in sample])
    np.testing.assert_array_equal(scores.rewards, [reward for *_, reward in sample])
    assert scores.timeouts == ()
