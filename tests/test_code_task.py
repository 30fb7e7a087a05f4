"""The code task: records, what of a response is its program, verdicts, prompts, how a response ends."""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import json
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxreset
from jaxreset.config_file import dump_config, load_config, parse_config
from jaxreset.errors import ConfigError
from jaxreset.run.objects import with_objects
from jaxreset.steps import Progress, advance, build_automaton, split_steps
from jaxreset.tasks.base import Problem
from jaxreset.tasks.chain import ChainTask
from jaxreset.tasks.code import CodeTask
from jaxreset.tasks.fields import UngradableError
from jaxreset.tasks.fingerprint import fingerprint
from jaxreset.tasks.programs.records import (
    PackedTests,
    ProgramTest,
    packed,
    read_record,
    unpacked,
)
from jaxreset.tasks.programs.verdicts import last_program, same_output, same_value
from jaxreset.tasks.records import load_problems
from jaxreset.tasks.rollouts import holds_marker

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "data" / "code.jsonl"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux alone")

PROBLEM = Problem("p", "?", "")
DOUBLE = {"question": "Print twice the number.", "tests": [{"input": "2\n", "output": "4\n"}]}
PUBLIC = [{"input": "3\n[1]", "output": "[1, 3]", "testtype": "functional"}]
PRIVATE = [{"input": '"a"\n[]', "output": '["a"]', "testtype": "functional"}]
BENCH = {
    "question_content": "Append it.",
    "starter_code": "class Solution:\n    def append(self, x, xs):\n        ",
    "public_test_cases": json.dumps(PUBLIC),
    "private_test_cases": json.dumps(PRIVATE),
    "metadata": json.dumps({"func_name": "append"}),
}


@pytest.fixture(scope="module")
def task():
    code = CodeTask(processes=2, cpu_seconds=0.5)
    yield code
    code.close()


def wrapped(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


# Records


def test_a_plain_record():
    problem = read_record(DOUBLE | {"solution": "Add it to itself."})
    assert problem.question.startswith(
        "Print twice the number.\n\nThe program reads its input from"
    )
    assert problem.solution == "Add it to itself."
    assert problem.answer == ""
    assert problem.extra["function"] == ""
    assert unpacked(problem.extra["tests"]) == [ProgramTest("2\n", "4\n")]
    assert pickle.loads(pickle.dumps(problem)) == problem
    in_text = DOUBLE | {"tests": json.dumps(DOUBLE["tests"])}
    assert read_record(in_text).extra == problem.extra


def test_a_plain_record_of_a_function():
    tests = [{"input": "1\n[2, 3]\n", "output": "true"}, {"input": "", "output": "{}"}]
    problem = read_record({"problem": "Is it?", "tests": tests, "function": "is_it"})
    assert problem.question == "Is it?\n\nWrite it as a function with the name is_it."
    assert problem.extra["function"] == "is_it"
    assert unpacked(problem.extra["tests"])[0] == ProgramTest("1\n[2, 3]\n", "true")


@pytest.mark.parametrize(
    "private",
    [
        json.dumps(PRIVATE),
        PRIVATE,
        wrapped(json.dumps(PRIVATE).encode()),
        *(wrapped(pickle.dumps(json.dumps(PRIVATE), protocol)) for protocol in range(2, 6)),
        wrapped(pickle.dumps(json.dumps(PRIVATE).encode(), 4)),
    ],
)
def test_live_code_bench_in_all_its_wrappings(private):
    problem = read_record(BENCH | {"private_test_cases": private})
    assert unpacked(problem.extra["tests"]) == [
        ProgramTest("3\n[1]", "[1, 3]"),
        ProgramTest('"a"\n[]', '["a"]'),
    ]
    assert problem.extra["function"] == "append"
    assert problem.question.endswith("    def append(self, x, xs):\n```")


def test_live_code_bench_with_standard_input():
    tests = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    record = {"question_content": "Add 1.", "starter_code": "", "public_test_cases": tests}
    problem = read_record(record | {"private_test_cases": json.dumps(tests), "metadata": "{}"})
    assert problem.extra["function"] == ""
    assert len(unpacked(problem.extra["tests"])) == 2


class Trap:
    """What runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_nothing_is_ever_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    trap = Trap(f"touch {sprung}")
    for payload in (trap, [json.dumps(PRIVATE), trap], {"tests": trap}):
        with pytest.raises(ValueError, match=r"'private_test_cases'.*pickle of more than a text"):
            read_record(BENCH | {"private_test_cases": wrapped(pickle.dumps(payload))})
    assert not sprung.exists()
    pickle.loads(pickle.dumps(trap))
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tests": DOUBLE["tests"]}, "missing field 'question'"),
        ({"question": "?"}, "missing field 'tests'"),
        (DOUBLE | {"question": " "}, "'question'"),
        (DOUBLE | {"tests": []}, r"'tests' is \[\]; expected a list of tests"),
        (DOUBLE | {"tests": 3}, "'tests' is 3"),
        (DOUBLE | {"tests": "[{]"}, r"'tests': '\[\{\]' is no JSON"),
        (DOUBLE | {"tests": ["x"]}, r"'tests', test 1: 'x'; expected \{input, output\}"),
        (DOUBLE | {"tests": [{"input": "1"}]}, "test 1: output is None; expected text"),
        (DOUBLE | {"tests": [{"input": 1, "output": "1"}]}, "test 1: input is 1; expected text"),
        (DOUBLE | {"tests": [{"input": "\ud800", "output": "1"}]}, "input is no Unicode text"),
        (DOUBLE | {"function": "no name"}, "'function' names 'no name'"),
        (DOUBLE | {"function": ["f"]}, r"'function' names \['f'\]"),
        (DOUBLE | {"function": "f", "tests": [{"input": "x", "output": "1"}]}, "'x' is no JSON"),
        (DOUBLE | {"function": "f", "tests": [{"input": "1", "output": ""}]}, "'' is no JSON"),
        (DOUBLE | {"starter_code": 7}, "'starter_code' is 7"),
        (BENCH | {"metadata": "{}"}, "'metadata' is {}; expected an object with func_name"),
        (BENCH | {"metadata": None}, "'metadata' is None"),
        (BENCH | {"metadata": "x"}, "'metadata': 'x' is no JSON"),
        (BENCH | {"metadata": {"func_name": 3}}, "'metadata' names 3"),
        (BENCH | {"public_test_cases": DOUBLE["tests"]}, "both of programs and of functions"),
        (BENCH | {"public_test_cases": [PUBLIC[0] | {"testtype": "x"}]}, "testtype is 'x'"),
        (BENCH | {"private_test_cases": "not base64!"}, "'private_test_cases' is 'not base64!'"),
        (BENCH | {"private_test_cases": base64.b64encode(b"xxxx").decode()}, "incorrect header"),
        (BENCH | {"private_test_cases": wrapped(b"x" * 999)[:16]}, "it is cut off"),
        (BENCH | {"private_test_cases": wrapped(b"\xff\xfe")}, "can't decode"),
        (BENCH | {"private_test_cases": wrapped(b"\x80\x04.")}, "pickle of 0 texts"),
        (BENCH | {"private_test_cases": wrapped(b"\x80\x04\x8c")}, "private_test_cases"),
        (BENCH | {"private_test_cases": wrapped(pickle.dumps([1]))}, "more than a text"),
        (BENCH | {"private_test_cases": "", "public_test_cases": ""}, "or none"),
    ],
)
def test_malformed_records_are_refused_by_field(record, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_record(record)
    assert not isinstance(caught.value, UngradableError)
    assert len(str(caught.value)) < 500


def test_a_zip_bomb_is_refused(monkeypatch):
    from jaxreset.tasks.programs import records

    monkeypatch.setattr(records, "UNPACKED_BYTES", 10_000)
    with pytest.raises(ValueError, match="unpacks to more than 10000 bytes"):
        read_record(BENCH | {"private_test_cases": wrapped(b"x" * 10_001)})


def test_tests_that_every_program_passes_are_left_out():
    silent = {"question": "?", "tests": [{"input": "1", "output": " \n"}]}
    with pytest.raises(UngradableError, match="every program would pass"):
        read_record(silent)


@settings(max_examples=50)
@given(st.lists(st.builds(ProgramTest, st.text(max_size=20), st.text(max_size=20)), max_size=3))
def test_tests_are_packed_without_loss(cases):
    assert unpacked(packed(cases)) == cases


def test_the_same_tests_have_the_same_fingerprint(monkeypatch):
    """However they were compressed, and whatever wrapped them."""
    problem = read_record(BENCH)
    assert repr(problem.extra["tests"]).startswith("PackedTests(2 tests, sha256 ")
    otherwise = zlib.compress(json.dumps(unpacked(problem.extra["tests"])).encode(), 9)
    assert otherwise != problem.extra["tests"]
    again = dataclasses.replace(
        problem, extra={"tests": PackedTests(otherwise), "function": "append"}
    )
    wrapped_up = read_record(BENCH | {"private_test_cases": wrapped(json.dumps(PRIVATE).encode())})
    assert fingerprint([problem]) == fingerprint([again]) == fingerprint([wrapped_up])
    assert fingerprint([problem]) != fingerprint([read_record(BENCH | {"private_test_cases": ""})])


# What is a program


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```py\na\n```\nBetter:\n``` Python3 \nb\n\nc\n``` \n", "b\n\nc\n"),
        ("```python\nright\n```\n```text\n1 2\n```", "right\n"),
        ("```python\nright\n```\n```python\nnever closed", "right\n"),
        ("```python\ns = '''\n```x\n'''\n```\n", "s = '''\n```x\n'''\n"),
        ("```python\n```", ""),
        ("```cpp\nint main() {}\n```", None),
        ("print(1)", None),
        ("```python\nprint(1)", None),
        ("text ```python\nprint(1)\n```", None),
        ("", None),
    ],
)
def test_the_last_block_is_the_program(text, expected):
    assert last_program(text) == expected


PROGRAMS = st.text(st.characters(codec="utf-8"), max_size=300).filter(
    lambda text: "```" not in text and "</thought>" not in text
)


@given(PROGRAMS, st.text(st.characters(codec="utf-8"), max_size=50))
def test_every_program_is_found_as_it_is(program, before):
    assume("```" not in before)
    assert last_program(f"{before}\n```python\n{program}\n```\n") == f"{program}\n"


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"3\n", "3", True),
        (b" 1 2 \n3\n\n", "1 2\n3", True),
        (b"1.0 2.50\n", "1 2.5", True),
        (b"1e3", "1000", True),
        (b"0.1000000000000000000001", "0.1", False),
        (b"123456789012345678901", "123456789012345678902", False),
        (b"1 2", "1\n2", False),
        (b"1\n2\n3", "1\n2", False),
        (b"yes", "YES", False),
        (b"a  b", "a b", False),
        (b"1", "one", False),
        (b"nan", "nan", True),
        (b"nan 1", "nan 1.0", False),
        (b"snan", "1", False),
        (b"1e99999999999999999999", "1", False),
        (b"", "0", False),
        (b"\xff\n", "x", False),
        (b"3", "3 ", True),
    ],
)
def test_what_is_printed_is_compared_by_lines_and_numbers(output, expected, same):
    assert same_output(output, expected) is same


@given(st.text(st.characters(codec="utf-8")))
def test_every_output_equals_itself(text):
    assert same_output(text.encode(), text)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.decimals(-(10**12), 10**12, places=6), max_size=4), max_size=3),
    st.integers(0, 3),
)
def test_numbers_may_be_written_otherwise(rows, zeros):
    def written(style):
        return "\n".join(" ".join(style(n) for n in row) for row in rows)

    exact = written(str)
    padded = written(lambda n: f"{n:f}" + ("0" * zeros if "." in f"{n:f}" else ""))
    assert same_output(padded.encode(), exact)
    changed = written(lambda n: str(n + 1))
    assert same_output(changed.encode(), exact) is (not any(rows))


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"[1, [2]]", "[1,[2]]", True),
        (b"2", "2.0", True),
        (b'{"b": 1, "a": null}', '{"a": null, "b": 1}', True),
        (b"[1, 2]", "[2, 1]", False),
        (b'"1"', "1", False),
        (b"", "null", False),
        (b"1 2", "1", False),
        (b"[" * 100_000, "[]", False),
        (b"\xff", "1", False),
        (b"9" * 10_000, "9", False),
    ],
)
def test_what_is_returned_is_compared_as_values(output, expected, same):
    assert same_value(output, expected) is same


# Prompts and how a response ends


def test_prompts(task):
    problem = Problem("p", "Print {problem} twice.", "")
    for text in (task.prompt(problem), task.message(problem)):
        assert "Print {problem} twice." in text
        assert "```python" in text
        assert "</thought>" in text
        assert "{delimiter}" not in text
    asked = task.localization(problem, ["Think.</thought>", "```python\nprint(1)\n```\n</thought>"])
    assert "Step 2: ```python\nprint(1)\n```" in asked
    assert "numbered 1 to 7" in task.inline_localization(problem, ["x"] * 7)
    own = CodeTask(solve_prompt="Solve {problem}, end with {delimiter}.")
    assert own.prompt(problem) == "Solve Print {problem} twice., end with </thought>."
    with pytest.raises(ValueError, match=r"localize_prompt: the text lacks \{steps\}"):
        CodeTask(localize_prompt="{problem} {count}")


VOCABULARY = [bytes([byte]) for byte in range(256)] + [b""]  # and the end of a sequence
EOS = 256
MAX_STEP_TOKENS, MAX_STEPS = 64, 20


automaton_of = functools.cache(functools.partial(build_automaton, VOCABULARY))


def generated(text: str, delimiter: str, marker: str, *, ends: bool = True) -> str:
    """What is sampled of a text by a policy that would write it and go on, as `decoding` ends it."""
    automaton = automaton_of(delimiter=delimiter, answer_marker=marker)
    progress = Progress(np.int32(0), np.int32(0), np.int32(0), np.bool_(False))
    tokens = [*text.encode(), *([EOS] if ends else b" And so on. " * 200)]
    drawn = []
    for token in tokens:
        progress, ended, _ = advance(automaton, progress, token, max_step_tokens=MAX_STEP_TOKENS)
        drawn.append(token)
        if token == EOS or (ended and (progress.answered or progress.steps >= MAX_STEPS)):
            break
    return bytes(token for token in drawn if token != EOS).decode()


LONG = """import sys

def main():
    values = list(map(int, sys.stdin.read().split()))

    total = 0
    for value in values:

        total += value
    print("```", total)


main()
"""
THOUGHTS = "It is a sum.</thought>\nOne pass.</thought>\n"


@pytest.mark.parametrize(
    ("close", "ends"),
    [("```", True), *itertools.product(["```\n", "```\n</thought>", "```\n\n</thought>"], [True, False])],
)  # fmt: skip
def test_a_whole_program_survives_generation(task, close, ends):
    assert len(LONG) > 2 * MAX_STEP_TOKENS
    text = f"{THOUGHTS}```python\n{LONG}{close}"
    drawn = generated(text, task.delimiter, task.answer_marker, ends=ends)
    assert last_program(drawn.replace(task.delimiter, "\n")) == LONG
    assert drawn.startswith(text.removesuffix("</thought>"))
    assert len(drawn) < len(text) + MAX_STEP_TOKENS


def test_it_ends_with_the_step_that_holds_the_program(task):
    text = f"{THOUGHTS}```python\nprint(1)\n```\n</thought>"
    drawn = generated(text, task.delimiter, task.answer_marker, ends=False)
    assert drawn == text
    automaton = automaton_of(delimiter=task.delimiter, answer_marker=task.answer_marker)
    spans = split_steps(automaton, list(drawn.encode()), max_step_tokens=MAX_STEP_TOKENS)
    steps = [drawn[start:end] for start, end in spans]
    assert steps == [
        "It is a sum.</thought>",
        "\nOne pass.</thought>",
        "\n```python\nprint(1)\n```\n</thought>",
    ]


def test_other_markers_and_delimiters_would_cut_programs():
    text = f"{THOUGHTS}```python\n{LONG}```\n</thought>"
    for delimiter, marker in [("</thought>", "```python"), ("\n", "```python"), ("\n\n", "```p")]:
        assert last_program(generated(text, delimiter, marker)) is None


@settings(max_examples=60, deadline=None)
@given(PROGRAMS)
def test_no_program_is_cut(program):
    assume(len(program.encode()) < MAX_STEP_TOKENS * (MAX_STEPS - 2))
    text = f"So:</thought>```python\n{program}\n```\n</thought>"
    drawn = generated(text, CodeTask.delimiter, CodeTask.answer_marker, ends=False)
    assert last_program(drawn.replace("</thought>", "\n")) == f"{program}\n"


def test_an_answer_is_the_program(task):
    assert task.answer(PROBLEM, "So:</thought>```python\nprint(1)\n```</thought>") == "print(1)\n"
    assert task.answer(PROBLEM, "So: 1") is None
    assert holds_marker("```python\nprint(1)\n```", task.answer_marker)
    assert not holds_marker("```python\nprint(1)\n``", task.answer_marker)


# Scores


def test_the_examples_and_their_solutions(task):
    problems = load_problems(EXAMPLES, task.read_record)
    assert [p.id for p in problems] == ["code:1", "code:2", "code:3"]
    assert [p.extra["function"] for p in problems] == ["", "unfold", "wateringTimes"]
    assert [len(unpacked(p.extra["tests"])) for p in problems] == [5, 4, 4]
    solutions = [
        problems[0].solution,
        "```python\ndef unfold(word):\n    return re.sub(r'(\\d+)(.)', "
        "lambda m: m[2] * int(m[1]), word)\n```",
        "```python\nclass Solution:\n    def wateringTimes(self, periods: List[List[int]], step):\n"
        "        return sorted(t for a, b in periods for t in range(a + step, b, step))\n```",
    ]
    wrong = "```python\ndef unfold(word): return word\nprint(3)\n```"
    items = [*zip(problems, solutions, strict=True), *((p, wrong) for p in problems)]
    scores = task.score(items)
    np.testing.assert_allclose(scores.rewards, [1, 1, 1, 3 / 5, 1 / 4, 0])
    assert scores.errors == scores.timeouts == ()
    steps = task.reference(problems[0])
    assert len(steps) == 3
    assert steps[-1].startswith("```python\n")
    assert [task.answer_marker in step for step in steps] == [False, False, True]
    shown = "".join(f"{step}{task.delimiter}" for step in steps)
    assert task.answer(problems[0], shown) == task.answer(problems[0], problems[0].solution)


@pytest.mark.parametrize(
    ("solution", "steps"),
    [
        ("print(1)", ["```python\nprint(1)\n```\n"]),
        ("\nif True:\n    print('a')\n\n", ["```python\nif True:\n    print('a')\n```\n"]),
        (
            "Count.\nThen\n\nprint.\n```py\nprint(1)\n```",
            ["Count.\nThen", "print.", "```python\nprint(1)\n```\n"],
        ),
        ("Add.</thought>```python\n1 + 1\n```</thought>", ["Add.", "```python\n1 + 1\n```\n"]),
        ("Count the words, then print.", None),
        ("```cpp\nint main() {}\n```", None),
        ("", None),
    ],
)
def test_a_reference_ends_in_its_program(task, solution, steps):
    problem = Problem("p", "Print.", "", solution)
    assert task.reference(problem) == steps
    if steps:
        assert task.answer(problem, "".join(f"{step}{task.delimiter}" for step in steps))


def test_the_share_of_tests_and_what_follows_a_timeout(task):
    tests = [{"input": str(n), "output": str(n)} for n in range(4)]
    problem = read_record({"question": "Echo.", "tests": tests})
    programs = [
        "print(input())",
        "n = input()\nprint(n if n != '1' else 'x')",
        "n = input()\nassert n != '1'\nprint(n)",
        "n = input()\nwhile n == '1': pass\nprint(n)",
    ]
    task.score([])
    items = [(problem, f"```python\n{program}\n```") for program in programs]
    np.testing.assert_array_equal(task.score(items).rewards, [1, 0.75, 0.75, 0.25])


def test_all_tests_together_have_a_deadline():
    tests = [{"input": str(n), "output": str(n)} for n in range(100)]
    problem = read_record({"question": "Echo.", "tests": tests})
    slow = CodeTask(processes=1, cpu_seconds=5.0, wall_seconds=2.0)
    try:
        program = "import time\ntime.sleep(0.5)\nprint(input())"
        scores = slow.score([(problem, f"```python\n{program}\n```")])
    finally:
        slow.close()
    assert 0 <= scores.rewards[0] <= 0.04
    assert scores.errors == scores.timeouts == ()


def test_a_delimiter_right_behind_the_fence_hides_nothing(task):
    problem = read_record(DOUBLE)
    text = "Twice.</thought>```python\nprint(2 * int(input()))\n```</thought>"
    np.testing.assert_array_equal(task.score([(problem, text)]).rewards, [1])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"cpu_seconds": 0}, {"wall_seconds": -1}, {"processes": 0}),
        *({"memory_bytes": float("inf")}, {"memory_bytes": 1000}, {"wall_seconds": "1 s"}),
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
        CodeTask(**wrong)


def test_reward_workers_need_no_jax():
    check = "import sys, jaxreset.tasks.code; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


# What counts as a failure


def config(*overrides: str):
    return load_config(
        ROOT / "configs" / "gsm8k.yaml", [f"data.path={EXAMPLES}", "model.path=any", *overrides]
    )


def test_a_failure_of_code_is_one_test_that_fails():
    assert config("task.name=code").task.failed_below == 1.0
    assert config("task.name=math").task.failed_below == 0.5
    assert config("task.name=code", "task.failed_below=0.3").task.failed_below == 0.3
    resolved = config("task.name=code")
    assert "failed_below: 1.0" in dump_config(resolved)
    assert parse_config(resolved.model_dump()) == resolved


def test_its_own_limits_are_options():
    options = config("task.name=code", "task.options={wall_seconds: 7, memory_bytes: 500000000}")
    assert options.task.make()._workers._limits.wall_seconds == 67
    with pytest.raises(
        ConfigError, match=r"task.options.wall: .*known: wall_seconds, memory_bytes"
    ):
        config("task.name=code", "task.options.wall=7")


class Strict:
    """A task from outside, with a threshold of its own."""

    failed_below = 0.9

    def prompt(self, problem):
        return problem.question

    def score(self, items):
        return [0.0] * len(items)


def test_a_task_that_is_handed_over_brings_its_threshold():
    quickstart = ROOT / "configs" / "quickstart.yaml"
    overrides = ["data.path=x.jsonl", "warm_start.steps=0"]
    chain = load_config(quickstart, overrides)
    assert chain.task.failed_below == 0.5
    assert with_objects(chain, task=Strict()).task.failed_below == 0.9
    assert with_objects(chain, task=ChainTask()).task.failed_below == 0.5
    asked = load_config(quickstart, [*overrides, "task.failed_below=0.2"])
    assert with_objects(asked, task=Strict()).task.failed_below == 0.2
    assert jaxreset.Task.failed_below == 0.5
