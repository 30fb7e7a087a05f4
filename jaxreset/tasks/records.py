r"""Problems from files: JSON lines, Parquet, or a data set of the `datasets` library.

A record is understood by its field names:

- `question`, `answer` (GSM8K): the final answer is what follows the last `####` of `answer`; a
  `\boxed{…}` in it, or a bare number, serves too;
- `problem`, `solution` (MATH): the last `\boxed{…}` of `solution`;
- `problem`, `answer` (NuminaMath): `answer` itself; `solution` is then not read.

Other fields are ignored. Problems are named by file and line (`train:17`), so a log line leads back
to the record.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxreset.tasks.answers import final_answer, plain_number
from jaxreset.tasks.base import Problem

SUFFIXES = (".jsonl", ".parquet")
_FIELDS = ("question", "problem", "answer", "solution")
_IN_ANSWER = "the final answer: '#### 72' as the last line, or \\boxed{72}"
_IN_SOLUTION = "the final answer in its last \\boxed{...}"
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def load_problems(path: str | Path) -> list[Problem]:
    """The problems of a `.jsonl` or `.parquet` file, or of a data set by name.

    Args:
        path: a file; or, where no such file exists, `name`, `name:split` or `name:config:split` of
            a data set that the optional `datasets` library finds (split "train" unless given).

    Returns:
        The problems in the file's order, at least one.

    Raises:
        FileNotFoundError: when `path` looks like a file and there is none.
        ImportError: when `path` can only be a data set's name, and `datasets` is missing.
        ValueError: for anything wrong inside, naming the file, the line (or row), the field and
            what was expected.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file ending in {' or '.join(SUFFIXES)}")
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise ValueError(
                f"{path}: extension {source.suffix!r}; expected one of {', '.join(SUFFIXES)}"
            )
        records = _json_lines(source) if source.suffix == ".jsonl" else _parquet_rows(source)
        stem = source.stem
    elif source.suffix in SUFFIXES or source.is_absolute() or str(path).startswith("."):
        raise FileNotFoundError(f"{path}: no such file")
    else:
        records, stem = _dataset_rows(str(path)), str(path)
    problems = [
        _problem(record, f"{stem}:{number}", f"{path}, {place}")
        for number, place, record in records
    ]
    if not problems:
        raise ValueError(f"{path}: empty; expected at least one problem")
    return problems


def _problem(record: Mapping[str, Any], name: str, place: str) -> Problem:
    """One record as a `Problem` with id `name`; `place` begins its error messages."""
    asked = "question" if record.get("question") is not None else "problem"
    question = _text(record, asked, place, "the problem's text (in field 'question' or 'problem')")
    solved = record.get("answer") is None and record.get("solution") is not None
    field, expected = ("solution", _IN_SOLUTION) if solved else ("answer", _IN_ANSWER)
    written = _text(record, field, place, expected)
    answer = final_answer(_CALCULATOR_MARK.sub("", written))
    # A NuminaMath answer is final as it stands; GSM8K's is a solution, unless it is just a number.
    is_final = asked == "problem" or plain_number(written) is not None
    if answer is None and is_final and not solved:
        answer = written.strip()
    if not answer:
        raise ValueError(
            f"{place}: no final answer in field {field!r}, {_brief(written)}; expected {expected}"
        )
    return Problem(name, question, answer)


def _text(record: Mapping[str, Any], field: str, place: str, expected: str) -> str:
    """The text of a field; numbers are accepted as they would be written."""
    value = record.get(field)
    if value is None:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(
            f"{place}: missing field {field!r}; expected {expected}; fields found: {found}"
        )
    # Python reads NaN and Infinity as JSON, and they stand for missing values in tables.
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: field {field!r} is {_brief(value)}; expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        odd = value[error.start]
        raise ValueError(
            f"{place}: field {field!r} holds half a character, \\u{ord(odd):04x}, at position "
            f"{error.start} (a surrogate without its other half); expected Unicode text"
        ) from error
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    # Read as bytes: text mode also ends lines at characters that JSON strings may contain.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, {place}: malformed JSON ({error}); expected one object a line"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, {place}: {_brief(record)}; expected a JSON object with named fields"
                )
            yield number, place, record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which names each of its fields once."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there more than once")
    return record


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    # Imported late: reward workers import this package, too.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    columns = [field for field in _FIELDS if field in file.schema_arrow.names]
    number = 0
    try:
        for batch in file.iter_batches(columns=columns):
            for record in _text_rows(batch):
                number += 1
                yield number, f"row {number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, row {number + 1}: can't be read ({error})") from error


def _text_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch; where one is no text, those before it come first."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            yield from batch.slice(row, 1).to_pylist()


def _dataset_rows(name: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}: no such file, and loading it as a data set needs the datasets library: "
            "pip install 'jaxreset[datasets]'"
        ) from error
    repository, *config, split = name.split(":") if ":" in name else (name, "train")
    if len(config) > 1 or not all((repository, *config, split)):
        raise ValueError(
            f"{name}: expected a data set as 'name', 'name:split' or 'name:config:split'"
        )
    try:
        rows = datasets.load_dataset(repository, *config, split=split)
    except Exception as error:  # the library raises many kinds: network, hub, parsing
        raise ValueError(
            f"{name}: datasets could not load split {split!r} of {repository!r}: {error}"
        ) from error
    for number, record in enumerate(rows, start=1):
        yield number, f"row {number}", record


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:38]} … {shown[-38:]}"
