"""Gold answers from files: numbers as they were meant, and what no answer could equal."""

from __future__ import annotations

import json
import logging
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxreset.tasks.answers import answers_equal, is_gradable
from jaxreset.tasks.fields import written_out
from jaxreset.tasks.pipeline import read_problems
from jaxreset.tasks.records import load_problems, read_file


def lines(path, *answers: str):
    """A file of problems with these answers, in JSON."""
    path.write_text("".join(f'{{"problem": "?", "answer": {answer}}}\n' for answer in answers))
    return path


def table(path, values, kind):
    column = pa.array(values, kind)
    pq.write_table(pa.table({"problem": ["?"] * len(values), "answer": column}), path)
    return path


def golds(path):
    return [problem.answer for problem in load_problems(path)]


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("0.00001", "0.00001"),
        ("1e-5", "0.00001"),
        ("1e16", "10000000000000000"),
        ("1.5E+3", "1500"),
        ("0.1", "0.1"),
        ("0.10", "0.10"),
        ("72", "72"),
        ("72.0", "72.0"),
        ("-2.5e-3", "-0.0025"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.10000000149011612", "0.1"),
        ("3.140000104904175", "3.14"),
        ("0.000030517578125", "0.000030517578125"),
        ('"1e-5"', "1e-5"),
        ('"Tuesday"', "Tuesday"),
        ('"no"', "no"),
        ('"even"', "even"),
        ('"ABC"', "ABC"),
        ('"A"', "A"),
        ('"none of them"', "none of them"),
        ('"∞"', "∞"),
        (r'"\\emptyset"', r"\emptyset"),
        (r'"\\boxed{7}"', "7"),
    ],
)
def test_golds_are_written_out(tmp_path, written, gold):
    assert golds(lines(tmp_path / "one.jsonl", written)) == [gold]


def test_numbers_of_parquet_columns_are_rounded_in_their_own_precision(tmp_path):
    numbers = [0.1, 2.5, 1e-5, 1e16, -0.3]
    plain = ["0.1", "2.5", "0.00001", "10000000000000000", "-0.3"]
    for kind in (pa.float32(), pa.float64()):
        assert golds(table(tmp_path / "a.parquet", numbers, kind)) == plain
    half = [np.float16(number) for number in (0.1, 2.5, -0.3)]
    assert golds(table(tmp_path / "b.parquet", half, pa.float16())) == ["0.1", "2.5", "-0.3"]
    money = [Decimal("0.10"), Decimal("1080.00")]
    assert golds(table(tmp_path / "c.parquet", money, pa.decimal128(9, 2))) == ["0.10", "1080.00"]
    assert golds(table(tmp_path / "d.parquet", [4, -7], pa.int16())) == ["4", "-7"]


def test_numbers_of_a_data_set_are_rounded_in_their_own_precision(monkeypatch):
    class Rows(list):
        """With the types of its columns, as that library's data sets have them."""

    rows = Rows([{"problem": "?", "answer": float(np.float32(0.1))}])
    rows.features = {"answer": SimpleNamespace(dtype="float32")}
    scalars = [
        {"problem": "?", "answer": kind(0.5)} for kind in (np.float16, np.float32, np.float64)
    ]
    scalars += [{"problem": "?", "answer": np.float32(0.1)}, {"problem": "?", "answer": np.int8(5)}]
    for found, expected in ((rows, ["0.1"]), (scalars, ["0.5", "0.5", "0.5", "0.1", "5"])):
        library = SimpleNamespace(load_dataset=lambda *_, found=found, **__: found)
        monkeypatch.setitem(__import__("sys").modules, "datasets", library)
        assert golds("org/data") == expected


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.floats(-1e15, 1e15))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_a_written_out_float_is_the_float_and_has_no_exponent(single, double):
    assume(float(np.float32(double)) != double)  # else it is written as the float32 that it was
    for number in (np.float32(single), double):
        text = written_out(number)
        assert "e" not in text.lower()
        assert type(number)(text) == number
        assert answers_equal(text, f"{Decimal(str(number)):f}")


UNGRADABLE = (
    *('"proof"', '"Proof."', '"not found"', '"notfound"', '"NaN"', '"nan"', '"null"', '"None"'),
    *('"N/A"', '"?"', '"-"', '"..."', r'"\\text{proof}"', r'"\\boxed{\\text{not found}}"'),
    *("NaN", "Infinity", "-Infinity"),
)


@pytest.mark.parametrize("answer", UNGRADABLE)
def test_what_nothing_equals_is_left_out_and_counted(tmp_path, caplog, answer):
    with caplog.at_level(logging.WARNING, "jaxreset.tasks.records"):
        problems, ungradable, _ = read_file(lines(tmp_path / "some.jsonl", "1", answer, "2"))
    assert [problem.answer for problem in problems] == ["1", "2"]
    assert [problem.id for problem in problems] == ["some:1", "some:3"]
    assert ungradable == 1
    assert "some.jsonl: 1 of 3 records are left out" in caplog.text
    assert "line 2: field 'answer'" in caplog.text
    with pytest.raises(
        ValueError, match=r"some.jsonl: no answer of 2 records can be graded; .*line 1"
    ):
        load_problems(lines(tmp_path / "some.jsonl", answer, answer))


def test_golds_that_can_be_graded_are():
    kept = [json.loads(line) for line in ('"Tuesday"', '"no"', '"0"', '"ABC"', '"x"', '"proofs 3"')]
    assert all(map(is_gradable, [*kept, r"\infty", "∞", r"\{1\}", "none", "yes", "true", "C", "٣"]))


def test_nan_in_a_column_is_left_out(tmp_path):
    path = table(tmp_path / "nan.parquet", [0.5, float("nan")], pa.float32())
    assert read_file(path)[1] == 1
    assert golds(path) == ["0.5"]


@pytest.mark.parametrize("answer", ["true", "[1]", '{"value": 1}', "null", '""', '" "'])
def test_what_is_no_answer_at_all_is_refused_by_line(tmp_path, answer):
    with pytest.raises(ValueError, match=r"all.jsonl, line 2: (missing )?field 'answer'"):
        load_problems(lines(tmp_path / "all.jsonl", "1", answer))


def test_numbers_that_no_line_holds_are_refused_by_line(tmp_path):
    with pytest.raises(ValueError, match=r"big.jsonl, line 1: malformed JSON \(Exceeds the limit"):
        load_problems(lines(tmp_path / "big.jsonl", "9" * 5000))
    problems, ungradable, _ = read_file(lines(tmp_path / "big.jsonl", "1", "1e999999999"))
    assert (len(problems), ungradable) == (1, 1)
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": NaN, "answer": 1}')
    with pytest.raises(ValueError, match=r"asked.jsonl, line 1: field 'question' is nan"):
        load_problems(path)


def test_the_counts_of_both_files_are_kept(tmp_path):
    train = lines(tmp_path / "train.jsonl", *["1"] * 5, '"proof"', '"not found"')
    test = lines(tmp_path / "test.jsonl", "1", "NaN")
    assert read_problems(str(train), None, test_size=1).ungradable == 2
    assert read_problems(str(train), str(test), test_size=1).ungradable == 3
