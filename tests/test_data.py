"""Data as people have it: schemas, kinds of files, columns of other names, filters, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import UngradableError
from jaxreset.tasks.records import Selection, as_written, load_problems, read_file
from jaxreset.tasks.schemas import read_problem

ASKED = "Nine boxes hold eight pens each. How many pens are there?"
WORKED = "Nine times eight is <<9*8=72>>72."
TURN = {"role": "user", "content": ASKED}
SYSTEM = {"role": "system", "content": "Think first."}

# The same problem as each of these writes it.
FORMS = {
    "GSM8K": {"question": ASKED, "answer": f"{WORKED}\n#### 72"},
    "MATH": {
        "problem": ASKED,
        "solution": rf"So $\boxed{{72}}$. {WORKED}",
        "level": "Level 5",
        "type": "Algebra",
    },
    "MATH with an answer": {
        "problem": ASKED,
        "solution": r"$\boxed{72}$",
        "answer": "72",
        "subject": "Algebra",
        "level": 5,
        "unique_id": "test/algebra/1.json",
    },
    "NuminaMath": {"source": "olympiads", "problem": ASKED, "solution": r"$\boxed{72}$"},
    "NuminaMath 1.5": {"problem": ASKED, "solution": "By counting.", "answer": "72"},
    "verl": {
        "data_source": "openai/gsm8k",
        "prompt": [TURN],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 0, "answer": f"{WORKED}\n#### 72"},
    },
    "TRL, text and answer": {"prompt": ASKED, "answer": "72"},
    "TRL, text and solution": {"prompt": ASKED, "solution": rf"It is $\boxed{{72}}$. {WORKED}"},
    "TRL, a formula": {"prompt": [TURN], "solution": "$72$"},
    "TRL, a number": {"prompt": [TURN], "solution": 72},
    "TRL, ground truth": {"prompt": [TURN], "ground_truth": "72"},
    "TRL, completion": {"prompt": ASKED, "completion": f"{WORKED}\n#### 72"},
    "TRL, messages": {
        "prompt": [TURN],
        "completion": [{"role": "assistant", "content": r"It is \boxed{72}."}],
    },
    "OpenMathReasoning": {
        "problem": ASKED,
        "expected_answer": "72",
        "generated_solution": "Let me see. It is \\boxed{73}. No: \\boxed{72}.",
        "problem_source": "a forum",
    },
    "AIME": {"id": 60, "problem": ASKED, "solution": "Count.", "answer": 72, "url": "", "year": 24},
    "AIME, capitalised": {"ID": "2024-I-1", "Problem": ASKED, "Solution": "Count.", "Answer": 72},
    "AIME of all years": {"ID": "1983-1", "Year": 1983, "Question": ASKED, "Answer": "72"},
    "HMMT": {"problem_idx": 1, "problem": ASKED, "answer": "72", "problem_type": ["Counting"]},
}
PROBLEM = Problem("", ASKED, "72")


def write(path, *records):
    """Records in one of the kinds of files, as its ending says."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    elif path.suffix == ".gz":
        listed = path.stem.endswith(".json")
        text = json.dumps(records) if listed else lines
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(json.dumps(records, indent=1) if path.suffix == ".json" else lines)
    return path


# Schemas


@pytest.mark.parametrize("form", FORMS)
def test_one_problem_in_every_form(form, tmp_path):
    record = FORMS[form]
    assert read_problem(record) == PROBLEM
    for ending in ("jsonl", "json", "parquet", "jsonl.gz", "json.gz"):
        [problem] = load_problems(write(tmp_path / f"data.{ending}", record))
        assert problem == dataclasses.replace(PROBLEM, id="data:1"), ending


def test_solutions_are_kept_where_there_are_some():
    """Without the calculator's marks; an answer that is final is no solution of itself."""
    shown = {form: read_problem(record).solution for form, record in FORMS.items()}
    worked = "Nine times eight is 72."
    assert shown["GSM8K"] == f"{worked}\n#### 72"
    assert shown["TRL, completion"] == f"{worked}\n#### 72"
    assert shown["MATH"] == rf"So $\boxed{{72}}$. {worked}"
    assert shown["OpenMathReasoning"].startswith("Let me see.")
    assert shown["AIME, capitalised"] == "Count."
    assert shown["TRL, messages"] == r"It is \boxed{72}."
    for form in ("verl", "HMMT", "TRL, ground truth"):
        assert shown[form] == ""


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.integers(-(10**9), 10**9),
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text("ab c", min_size=1))
    ),
)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_any_question_loads_alike_from_every_form(question, number, turns):
    turns = tuple((role, text) for role, text in turns if text.strip())
    messages = [{"role": role, "content": text} for role, text in turns]
    messages.append({"role": "user", "content": question})
    gsm8k = read_problem({"question": question, "answer": f"It is so.\n#### {number}"})
    assert gsm8k == Problem("", question, str(number))
    for record in (
        {"problem": question, "solution": rf"\boxed{{{number}}}"},
        {"problem": question, "answer": number},
        {"Problem": question, "Answer": str(number)},
        {"problem": question, "expected_answer": str(number)},
        {"prompt": question, "answer": str(number)},
        {"prompt": question, "solution": f"${number}$"},
        {"prompt": question, "ground_truth": number},
        {"prompt": messages[-1:], "reward_model": {"ground_truth": str(number)}},
    ):
        assert read_problem(record) == gsm8k
    with_context = {"prompt": messages, "reward_model": {"ground_truth": str(number)}}
    assert read_problem(with_context) == dataclasses.replace(gsm8k, context=turns)


def test_messages_before_the_question_are_its_context(tmp_path):
    earlier = [SYSTEM, TURN | {"content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    record = {"prompt": [*earlier, TURN], "reward_model": {"ground_truth": "72", "style": "rule"}}
    context = (("system", "Think first."), ("user", "Hello"), ("assistant", "Hello!"))
    expected = Problem("data:1", ASKED, "72", context=context)
    for ending in ("jsonl", "parquet"):
        assert load_problems(write(tmp_path / f"data.{ending}", record)) == [expected]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "q", "problem": "p", "prompt": "r", "answer": "1"}, ("q", "1")),
        ({"question": None, "problem": "p", "prompt": "r", "answer": "1"}, ("p", "1")),
        ({"Problem": "P", "prompt": "r", "answer": "1"}, ("P", "1")),
        ({"problem": "p", "answer": "1", "expected_answer": "2", "solution": "3"}, ("p", "1")),
        ({"problem": "p", "answer": None, "expected_answer": "2", "ground_truth": "3"}, ("p", "2")),
        ({"prompt": "r", "ground_truth": "3", "reward_model": {"ground_truth": "4"}}, ("r", "3")),
        ({"prompt": "r", "reward_model": {"ground_truth": "4"}, "solution": "5"}, ("r", "4")),
        ({"prompt": "r", "solution": "5", "completion": "#### 6"}, ("r", "5")),
        ({"prompt": "r", "solution": "$$ \\frac{1}{2} $$"}, ("r", "\\frac{1}{2}")),
        ({"prompt": "r", "answer": "\\frac{1}{2}"}, ("r", "\\frac{1}{2}")),
        ({"problem": "p", "expected_answer": "so \\boxed{7}"}, ("p", "7")),
        ({"problem": "p", "expected_answer": 0.5}, ("p", "0.5")),
        ({"prompt": "r", "reward_model": {"ground_truth": 1e-5}}, ("r", "0.00001")),
        ({"reward_model.ground_truth": "8", "prompt": "r"}, ("r", "8")),
    ],
)
def test_the_order_in_which_fields_are_looked_for(record, expected):
    problem = read_problem(record)
    assert (problem.question, problem.answer) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "answer": "It is five"},
        {"Question": "q", "Answer": "It is five"},
        {"prompt": "r", "completion": "5"},
    ],
)
def test_a_solution_without_a_marked_answer_is_refused(record):
    with pytest.raises(ValueError, match="no final answer in field") as refused:
        read_problem(record)
    assert not isinstance(refused.value, UngradableError)


@pytest.mark.parametrize(
    "record",
    [
        {"problem": "p", "expected_answer": float("nan")},
        {"problem": "p", "Answer": float("inf")},
        {"prompt": "r", "ground_truth": float("nan")},
        {"prompt": "r", "reward_model": {"ground_truth": float("nan")}},
        {"prompt": "r", "reward_model": {"ground_truth": "proof"}},
        {"problem": "p", "expected_answer": "not found"},
        {"problem": "p", "solution": "This proves it, with 5."},
        {"problem": "p", "solution": "5"},
        {"prompt": "r", "solution": "$5$ or $6$"},
        {"prompt": "r", "solution": "It is five"},
    ],
)
def test_golds_of_every_name_may_be_missing(record):
    with pytest.raises(UngradableError, match="expected the final answer"):
        read_problem(record)


# Files


def test_parquet_loads_as_json_would(tmp_path):
    """All columns, structs and lists among them, and floats in their own precision."""
    rows = [
        {"prompt": [SYSTEM, TURN], "reward_model": {"ground_truth": "72", "n": 3}, "tags": ["a"]},
        {"prompt": [TURN], "reward_model": {"ground_truth": "7.5", "n": None}, "tags": []},
    ]
    seen = {}

    def keep(kind):
        def read(record):
            seen.setdefault(kind, []).append(record)
            return read_problem(record)

        return read

    problems = {
        kind: read_file(write(tmp_path / f"data.{kind}", *rows), keep(kind)).problems
        for kind in ("jsonl", "parquet")
    }
    assert seen["jsonl"] == seen["parquet"] == rows
    assert problems["jsonl"] == problems["parquet"]
    single = pa.array(
        [{"ground_truth": np.float32(0.1)}], pa.struct({"ground_truth": pa.float32()})
    )
    table = pa.table({"prompt": ["?"], "reward_model": single})
    pq.write_table(table, tmp_path / "single.parquet")
    assert load_problems(tmp_path / "single.parquet")[0].answer == "0.1"


def test_records_of_a_list_are_numbered_and_have_their_lines(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(
        '\ufeff[\n {"problem": "[a, b]", "answer": 1e-5},\n\n {"problem":\n "}", "answer": "2"} ]\n',
        encoding="utf-8",
    )
    first, second = load_problems(path)
    assert first == Problem("list:1", "[a, b]", "0.00001")
    assert second == Problem("list:2", "}", "2")
    path.write_text('[{"problem": "a", "answer": 1},\n\n {"problem": "b"}]')
    with pytest.raises(ValueError, match=r"list.json, record 2 in line 3: missing field 'answer'"):
        load_problems(path)
    path.write_text("[ ]")
    with pytest.raises(ValueError, match=r"list.json: empty; expected at least one problem"):
        load_problems(path)


def test_what_is_no_gzip_is_named(tmp_path):
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    with pytest.raises(ValueError, match=r"plain.jsonl.gz: not a whole gzip file"):
        load_problems(tmp_path / "plain.jsonl.gz")
    whole = write(tmp_path / "cut.json.gz", *[FORMS["GSM8K"]] * 9).read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"cut.json.gz: not a whole gzip file"):
        load_problems(tmp_path / "cut.json.gz")
    (tmp_path / "odd.txt.gz").write_text("")
    with pytest.raises(ValueError, match=r"extension '.gz'; expected one of .jsonl, .parquet"):
        load_problems(tmp_path / "odd.txt.gz")


# Columns, filters and sizes


def test_columns_of_other_names(tmp_path):
    record = {"Frage": ASKED, "reward": {"target": 72, "kind": "rule"}, "problem": "another"}
    columns = {"question": "Frage", "answer": "reward.target"}
    for ending in ("jsonl", "parquet"):
        path = write(tmp_path / f"german.{ending}", record)
        [problem] = read_file(Selection(str(path), columns=columns)).problems
        assert problem == Problem("german:1", ASKED, "72")


def test_columns_work_for_any_task(tmp_path):
    path = write(
        tmp_path / "choices.jsonl", {"q": {"text": "?", "options": ["x", "y"]}, "key": "B"}
    )

    def read(record):
        return Problem("", record["question"], record["answer"], extra={"all": record["choices"]})

    columns = {"question": "q.text", "choices": "q.options", "answer": "key"}
    [problem] = read_file(Selection(str(path), columns=columns), read).problems
    assert problem == Problem("choices:1", "?", "B")
    assert problem.extra == {"all": ["x", "y"]}


LEVELS = [
    {"problem": f"{n}?", "answer": n, "level": level, "info": {"source": source, "ok": ok}}
    for n, (level, source, ok) in enumerate(
        [
            ("Level 1", "olympiads", True),
            ("Level 4", "olympiads", False),
            ("Level 5", "amc", True),
            ("Level 5", "olympiads", True),
            ("Level ?", None, True),
            ("Level 45", "olympiads", True),
        ]
    )
]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"level": (4, 5)}, [1, 2, 3]),
        ({"level": ("Level 4", "Level 5")}, [1, 2, 3]),
        ({"level": ("5",)}, [2, 3]),
        ({"level": (5.0,), "info.source": ("olympiads",)}, [3]),
        ({"info.ok": (False,)}, [1]),
        ({"info.source": ("null", "amc")}, [2, 4]),
        ({"answer": (1, "2", 9)}, [1, 2]),
        ({}, [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_records_are_kept_by_their_values(tmp_path, where, kept, ending):
    path = write(tmp_path / f"levels.{ending}", *LEVELS)
    loaded = read_file(Selection(str(path), where=where))
    assert [problem.answer for problem in loaded.problems] == [str(n) for n in kept]
    assert [problem.id for problem in loaded.problems] == [f"levels:{n + 1}" for n in kept]
    assert loaded.elsewhere == len(LEVELS) - len(kept)
    assert loaded.records == len(LEVELS)


def test_where_nothing_is_kept_the_values_found_are_listed(tmp_path):
    path = write(tmp_path / "levels.jsonl", *LEVELS)
    with pytest.raises(ValueError, match="none of 6 records is kept by where") as refused:
        read_file(Selection(str(path), where={"level": (7, 8), "info.source": ("aime",)}))
    message = str(refused.value)
    assert "(level '7', '8'; info.source 'aime')" in message
    assert "level 'Level 5' (2), 'Level 1' (1)" in message
    assert "info.source 'olympiads' (4), 'amc' (1), 'null' (1)" in message
    many = [{"problem": "?", "answer": 1, "level": n} for n in range(40)]
    with pytest.raises(ValueError, match=r"'11' \(1\) and 28 others"):
        read_file(Selection(str(write(path, *many)), where={"level": (41,)}))


SHORT = st.decimals(-(10**6), 10**6, places=3).map(float)
NUMBERS = st.one_of(st.integers(-30, 30), st.integers(-(10**20), 10**20), SHORT, st.just(-0.0))


@given(NUMBERS, NUMBERS)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_numbers_are_kept_by_equal_numbers_and_by_no_others(one, other):
    assert as_written(json.loads(json.dumps(one)), "level") == as_written(one, "level")
    assert as_written(Decimal(str(one)), "level") == as_written(one, "level")
    same = Decimal(str(one)) == Decimal(str(other))
    assert (as_written(one, "level") == as_written(other, "level")) == same


def test_the_first_so_many_that_can_be_graded(tmp_path):
    """400 problems of a source whose answers can be checked, say; what is behind them isn't read."""
    boxed = [
        "so \\boxed{1}",
        "This proves it.",
        "\\boxed{2}",
        "\\boxed{3}",
        "A proof.",
        "\\boxed{4}",
    ]
    rows = [{"problem": f"{n}?", "solution": s, "source": "o"} for n, s in enumerate(boxed)]
    rows.insert(2, {"problem": "n?", "answer": "9", "source": "other"})
    path = write(tmp_path / "some.jsonl", *rows)
    path.write_text(path.read_text() + "broken\n")
    loaded = read_file(Selection(str(path), where={"source": ("o",)}, size=3))
    assert [problem.answer for problem in loaded.problems] == ["1", "2", "3"]
    assert (loaded.ungradable, loaded.elsewhere, loaded.records) == (1, 1, 5)
    with pytest.raises(ValueError, match="line 8: malformed JSON"):
        read_file(Selection(str(path), where={"source": ("o",)}, size=5))


# What is refused

GOOD = json.dumps(FORMS["GSM8K"])
VERL = json.dumps(FORMS["verl"])


def verl(**changes):
    return json.dumps(FORMS["verl"] | changes)


MALFORMED = [
    ("jsonl", f'{GOOD}\n{{"question": "?', "line 2: malformed JSON (Unterminated string"),
    ("jsonl", f"{GOOD}\n\n17", "line 3: 17; expected a JSON object"),
    (
        "jsonl",
        f"{GOOD}\n" + VERL[:-1] + ', "prompt": []}',
        "line 2: malformed JSON (the field 'prompt'",
    ),
    (
        "jsonl",
        verl(reward_model={}).replace("{}", '{"ground_truth": 1, "ground_truth": 2}'),
        "line 1: malformed JSON (the field 'ground_truth' is there more than once)",
    ),
    ("jsonl", '{"answer": "#### 1"}', "line 1: missing field 'problem'"),
    ("jsonl", f'{GOOD}\n{{"question": "", "answer": "1"}}', "line 2: field 'question' is ''"),
    ("jsonl", '{"Problem": " ", "Answer": 1}', "line 1: field 'Problem' is ' '"),
    ("jsonl", '{"question": NaN, "answer": "1"}', "line 1: field 'question' is nan"),
    ("jsonl", '{"problem": ["?"], "answer": "1"}', "line 1: field 'problem' is ['?']"),
    ("jsonl", '{"prompt": "\\ud83d?", "answer": "1"}', "line 1: field 'prompt' holds half"),
    ("jsonl", '{"question": "?", "answer": null}', "line 1: missing field 'answer'"),
    ("jsonl", '{"problem": "?", "expected_answer": ["1"]}', "field 'expected_answer' is ['1']"),
    ("jsonl", '{"problem": "?", "expected_answer": " "}', "field 'expected_answer' is ' '"),
    ("jsonl", verl(prompt=[]), "line 1: field 'prompt' is []; expected a list of messages"),
    (
        "jsonl",
        verl(prompt={"role": "user"}),
        "line 1: field 'prompt' is {'role': 'user'}; expected",
    ),
    ("jsonl", verl(prompt=[ASKED]), "line 1: field 'prompt[0]' is 'Nine boxes"),
    ("jsonl", verl(prompt=[{"role": "user"}]), "line 1: missing field 'prompt[0].content'"),
    (
        "jsonl",
        verl(prompt=[{"role": "user", "content": [{"type": "text", "text": "?"}]}]),
        "line 1: field 'prompt[0].content' is [{'type': 'text'",
    ),
    (
        "jsonl",
        verl(prompt=[TURN, {"role": "assistant", "content": "72"}]),
        "line 1: field 'prompt[1].role' is 'assistant'; expected a list of messages with 'role' and "
        "'content', the last the user's",
    ),
    (
        "jsonl",
        verl(prompt=[TURN | {"role": "robot"}]),
        "line 1: field 'prompt[0].role' is 'robot'; expected one of system, user, assistant",
    ),
    ("jsonl", verl(prompt=[{"content": "?"}]), "line 1: field 'prompt[0].role' is None; expected"),
    (
        "jsonl",
        verl(reward_model={"style": "rule"}),
        "line 1: missing field 'reward_model.ground_truth'",
    ),
    ("jsonl", verl(reward_model={"ground_truth": True}), "'reward_model.ground_truth' is True"),
    (
        "jsonl",
        verl(reward_model={"ground_truth": "\ud800"}),
        "line 1: field 'reward_model.ground_truth' holds half a character, \\ud800",
    ),
    (
        "jsonl",
        json.dumps({"prompt": [TURN], "completion": [TURN]}),
        "line 1: field 'completion[0].role' is 'user'; expected the solution as text",
    ),
    ("jsonl", json.dumps({"prompt": [TURN], "completion": []}), "line 1: field 'completion' is []"),
    ("json", GOOD, 'bad.json: begins with \'{"question"'),
    ("json", f"{GOOD}\n{GOOD}", "a file with one object a line ends in .jsonl"),
    ("json", "", "bad.json: begins with ''"),
    ("json", f"[{GOOD},\n 5]", "record 2 in line 2: 5; expected a JSON object"),
    ("json", f"[{GOOD}\n {GOOD}]", "record 1 in line 1: followed by '{"),
    ("json", f"[{GOOD},\n", "record 2 in line 2: malformed JSON"),
    ("json", f"[{GOOD},\n{GOOD[:-1]}]", "record 2 in line 2: malformed JSON"),
    ("json", f"[\n{GOOD}", "record 1 in line 2: followed by nothing; expected ',' or ']'"),
    ("json", f"[{GOOD}] {GOOD}", "behind the list"),
    (
        "json",
        '[{"question": "a", "question": "b"}]',
        "record 1 in line 1: malformed JSON (the field",
    ),
    ("json", f"[{GOOD},\n\n{{}}]", "record 2 in line 3: missing field 'problem'"),
]


@pytest.mark.parametrize(("ending", "text", "message"), MALFORMED)
def test_malformed_input_is_refused_by_file_line_and_key(tmp_path, ending, text, message):
    path = tmp_path / f"bad.{ending}"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load_problems(path)
    assert str(refused.value).startswith(str(path))
    assert "expected" in str(refused.value) or "more than once" in str(refused.value)


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        (
            {"columns": {"question": "Frage"}},
            "line 2: columns.question: no field 'Frage'; fields found: answer, info.level, question",
        ),
        ({"columns": {"answer": "info.target"}}, "line 1: columns.answer: no field 'info.target'"),
        ({"columns": {"answer": "question.target"}}, "columns.answer: no field 'question.target'"),
        (
            {"where": {"level": (5,)}},
            "line 1: where: no field 'level'; fields found: Frage, answer, info.level, question",
        ),
        ({"where": {"info.source": ("x",)}}, "line 1: where: no field 'info.source'"),
        (
            {"where": {"info": ("x",)}},
            "line 1: where: field 'info' is {'level': 1}; expected a text",
        ),
    ],
)
def test_fields_that_the_config_names_and_a_record_lacks(tmp_path, taken, message):
    record = {"question": "?", "answer": "1", "info": {"level": 1}}
    path = write(tmp_path / "few.jsonl", record | {"Frage": "!"}, record)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read_file(Selection(str(path), **taken))
    assert str(refused.value).startswith(str(path))
