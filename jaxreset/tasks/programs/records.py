"""Programming problems in records of data files, and their tests.

Two forms are understood:

- plain: `question`, `tests` (a list of `input`, `output`, or that list as JSON text), and `function` where
  a function is asked for;
- LiveCodeBench's: `question_content`, `starter_code`, `public_test_cases`, `private_test_cases` and
  `metadata`. The private ones may be packed: base64 of zlib of a pickled text. Nothing is unpickled: the
  text is cut out of the pickle, and one that holds anything else is refused.

A test of a program is its input and its output; of a function its arguments, JSON each on a line of its
own, and its result in JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickletools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import UngradableError, brief, text_of

UNPACKED_BYTES = 2**30  # of the tests of one problem
LONGEST_NAME = 100
_ASKED = ("question_content", "question", "problem", "prompt")
_CASES = ("public_test_cases", "private_test_cases")
_TESTS = "a list of tests, {input, output} each, or that list as JSON text"
# What a pickle of nothing but a text is made of.
_TEXT_OPCODES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINBYTES"}
_TEXT_OPCODES |= {"BINBYTES", "BINBYTES8"}
_OTHER_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


class ProgramTest(NamedTuple):
    """A test: what a program is given, and what it must give back."""

    given: str
    expected: str


def read_record(record: Mapping[str, Any]) -> Problem:
    """A programming problem that has no id yet.

    Its `extra` holds `tests`, packed, for they may be many megabytes (`unpacked` reads them), and the name
    of the `function` that is asked for, "" where it is a whole program.

    Raises:
        UngradableError: any program would pass its tests.
        ValueError: anything else wrong with it; names the field and what was expected.
    """
    asked = next((field for field in _ASKED if record.get(field) is not None), "question")
    question = text_of(record, asked, f"the problem's text (in one of {', '.join(_ASKED)})")
    if record.get("tests") is None and all(record.get(field) is None for field in _CASES):
        raise ValueError(f"missing field 'tests'; expected {_TESTS} (or {', '.join(_CASES)})")
    if record.get("tests") is not None:
        function = _function("function", record.get("function"))
        cases = [case for case, _ in _read_cases("tests", record["tests"], bool(function))]
    else:
        function, cases = _live_code_bench(record)
    if not function and not any(case.expected.strip() for case in cases):
        raise UngradableError("no test expects any output: every program would pass")
    starter, solution = (record.get(field) or "" for field in ("starter_code", "solution"))
    if not isinstance(starter, str):
        raise ValueError(f"field 'starter_code' is {brief(starter)}; expected text")
    return Problem(
        "",
        f"{question.strip()}\n\n{_form(function, starter)}",
        "",
        solution if isinstance(solution, str) else "",
        extra={"tests": packed(cases), "function": function},
    )


class PackedTests(bytes):
    """Tests as a problem carries them: compressed, which other machines may do otherwise."""

    def __repr__(self) -> str:
        digest = hashlib.sha256(zlib.decompress(self)).hexdigest()
        return f"{type(self).__name__}({len(unpacked(self))} tests, sha256 {digest})"


def packed(cases: Sequence[ProgramTest]) -> PackedTests:
    """Tests, packed."""
    return PackedTests(zlib.compress(json.dumps(cases).encode(), 1))


def unpacked(tests: bytes) -> list[ProgramTest]:
    """The tests of a problem."""
    return [ProgramTest(*case) for case in json.loads(zlib.decompress(tests))]


def _form(function: str, starter: str) -> str:
    """How a program is run, as its problem says it."""
    if starter.strip():
        return f"Complete this code, and keep its names:\n\n```python\n{starter.rstrip()}\n```"
    if function:
        return f"Write it as a function with the name {function}."
    return "The program reads its input from standard input and prints its output."


def _live_code_bench(record: Mapping[str, Any]) -> tuple[str, list[ProgramTest]]:
    """The function's name, or "", and all tests, the public ones first."""
    found = [
        case
        for field in _CASES
        if record.get(field) not in (None, "")
        for case in _read_cases(field, record[field], None)
    ]
    functional = {kind for _, kind in found}
    if len(functional) != 1:
        raise ValueError(
            f"fields {' and '.join(map(repr, _CASES))} hold tests both of programs and of functions, or "
            "none; expected one or more of one testtype"
        )
    cases = [case for case, _ in found]
    if not functional.pop():
        return "", cases
    metadata = record.get("metadata")
    if isinstance(metadata, str):
        metadata = _from_json("field 'metadata'", metadata)
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    if name is None:
        raise ValueError(
            f"field 'metadata' is {brief(metadata)}; expected an object with func_name, the function that "
            "functional tests call"
        )
    return _function("metadata", name), cases


def _function(field: str, name: Any) -> str:
    if name is None or name == "":
        return ""
    if not isinstance(name, str) or not name.isidentifier() or len(name) > LONGEST_NAME:
        raise ValueError(f"field {field!r} names {brief(name)}; expected the name of a function")
    return name


def _read_cases(
    field: str, value: Any, functional: bool | None
) -> Iterator[tuple[ProgramTest, bool]]:
    """The tests in a field, and whether each is a function's; None: each says it by its testtype."""
    if isinstance(value, str):
        text = value if value.lstrip()[:1] == "[" else _unwrapped(field, value)
        value = _from_json(f"field {field!r}", text)
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"field {field!r} is {brief(value)}; expected {_TESTS}")
    for number, test in enumerate(value, start=1):
        place = f"field {field!r}, test {number}"
        if not isinstance(test, Mapping):
            raise ValueError(f"{place}: {brief(test)}; expected {{input, output}}")
        case = ProgramTest(*(_text(place, test, key) for key in ("input", "output")))
        kind = functional
        if kind is None:
            said = test.get("testtype", "stdin")
            if said not in ("stdin", "functional"):
                raise ValueError(
                    f"{place}: testtype is {brief(said)}; expected stdin or functional"
                )
            kind = said == "functional"
        if kind:
            for line in [*filter(str.strip, case.given.split("\n")), case.expected]:
                _from_json(place, line)
        yield case, kind


def _text(place: str, test: Mapping[str, Any], key: str) -> str:
    text = test.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{place}: {key} is {brief(text)}; expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {key} is no Unicode text ({error}); expected text") from error
    return text


def _from_json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {brief(text)} is no JSON ({error})") from error


def _unwrapped(field: str, value: str) -> str:
    """The text in base64 of zlib of itself or of its pickle."""
    expected = f"expected {_TESTS}, or base64 of zlib of that text or of its pickle"
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(value, validate=True), UNPACKED_BYTES)
        if not inflate.eof:
            raise ValueError(f"it is cut off, or unpacks to more than {UNPACKED_BYTES} bytes")
        text = _text_of_pickle(data) if data[:1] == b"\x80" else data
        return text if isinstance(text, str) else text.decode()
    except (ValueError, zlib.error) as error:
        raise ValueError(f"field {field!r} is {brief(value)}: {error}; {expected}") from error


def _text_of_pickle(data: bytes) -> str | bytes:
    """The text that a pickle is of, without unpickling: it is a program, and may do anything."""
    texts: list[Any] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _TEXT_OPCODES:
            texts.append(argument)
        elif opcode.name not in _OTHER_OPCODES:
            raise ValueError(f"it is a pickle of more than a text ({opcode.name})")
    if len(texts) != 1:
        raise ValueError(f"it is a pickle of {len(texts)} texts")
    text: str | bytes = texts[0]
    return text
