r"""Problems from files: JSON lines, Parquet, or a data set of the `datasets` library.

A record is understood by its field names:

- `question`, `answer` (GSM8K): the final answer is what follows the last `####` of `answer`; a
  `\boxed{…}` in it, or a bare number, serves too;
- `problem`, `solution` (MATH): the last `\boxed{…}` of `solution`;
- `problem`, `answer` (NuminaMath): `answer` itself; `solution` is then not read.

Other fields are ignored. Problems are named by file and line (`train:17`), so a log line leads back
to the record. Numbers are written out as they were meant: 1e-5 is `0.00001`, a float32 0.1 is `0.1`.
Records whose answer nothing could equal (`proof`, `not found`, NaN) are left out and counted.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreset.tasks.answers import final_answer, is_gradable, plain_number
from jaxreset.tasks.base import Problem

SUFFIXES = (".jsonl", ".parquet")
_FIELDS = ("question", "problem", "answer", "solution")
_IN_ANSWER = "the final answer: '#### 72' as the last line, or \\boxed{72}"
_IN_SOLUTION = "the final answer in its last \\boxed{...}"
_LONGEST_NUMBER = 1000  # digits before the point, or behind it
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """The problems of a file, and how many more had no answer that can be graded."""

    problems: list[Problem]
    ungradable: int


class UngradableError(ValueError):
    """A record whose answer can't be compared with anything."""


def load_problems(path: str | Path) -> list[Problem]:
    """The problems of a file, as `read_file`, with a warning where some are left out."""
    return read_file(path).problems


def read_file(path: str | Path) -> Loaded:
    """The problems of a `.jsonl` or `.parquet` file, or of a data set by name.

    Args:
        path: a file; or, where no such file exists, `name`, `name:split` or `name:config:split` of
            a data set that the optional `datasets` library finds (split "train" unless given).

    Returns:
        The problems in the file's order, at least one, and how many records were left out because
        their answer can't be graded; a warning names the first of these.

    Raises:
        FileNotFoundError: when `path` looks like a file and there is none.
        ImportError: when `path` can only be a data set's name, and `datasets` is missing.
        ValueError: for anything wrong inside, naming the file, the line (or row), the field and
            what was expected; and where no answer at all can be graded.
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
    problems: list[Problem] = []
    ungradable: list[UngradableError] = []
    for number, place, record in records:
        try:
            problems.append(_problem(record, f"{stem}:{number}", f"{path}, {place}"))
        except UngradableError as error:
            ungradable.append(error)
    if not problems:
        if ungradable:
            raise ValueError(
                f"{path}: no answer of {len(ungradable)} records can be graded; the first: "
                f"{ungradable[0]}"
            )
        raise ValueError(f"{path}: empty; expected at least one problem")
    if ungradable:
        logger.warning(
            "%s: %d of %d records are left out, for their answers can't be graded; the first: %s",
            path,
            len(ungradable),
            len(ungradable) + len(problems),
            ungradable[0],
        )
    return Loaded(problems, len(ungradable))


def _problem(record: Mapping[str, Any], name: str, place: str) -> Problem:
    """One record as a `Problem` with id `name`; `place` begins its error messages."""
    asked = "question" if record.get("question") is not None else "problem"
    question = _text(record, asked, place, "the problem's text (in field 'question' or 'problem')")
    solved = record.get("answer") is None and record.get("solution") is not None
    field, expected = ("solution", _IN_SOLUTION) if solved else ("answer", _IN_ANSWER)
    written = _text(record, field, place, expected)
    if isinstance(record[field], str) and not is_gradable(written):
        raise UngradableError(
            f"{place}: field {field!r} is {_brief(written)}, which no answer equals; expected {expected}"
        )
    answer = final_answer(_CALCULATOR_MARK.sub("", written))
    # A NuminaMath answer is final as it stands; GSM8K's is a solution, unless it is just a number.
    is_final = asked == "problem" or plain_number(written) is not None
    if answer is None and is_final and not solved:
        answer = written.strip()
    if not answer:
        raise ValueError(
            f"{place}: no final answer in field {field!r}, {_brief(written)}; expected {expected}"
        )
    if not is_gradable(answer):
        raise UngradableError(
            f"{place}: field {field!r} ends in {_brief(answer)}, which no answer equals; "
            f"expected {expected}"
        )
    shown = record.get("solution") or (written if asked == "question" else "")
    solution = _CALCULATOR_MARK.sub("", shown) if isinstance(shown, str) else ""
    return Problem(name, question, answer, solution)


def _text(record: Mapping[str, Any], field: str, place: str, expected: str) -> str:
    """The text of a field; numbers are accepted as they would be written.

    Raises:
        UngradableError: for NaN and infinity.
        ValueError: for anything else that is no text and no number.
    """
    value = record.get(field)
    if value is None:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(
            f"{place}: missing field {field!r}; expected {expected}; fields found: {found}"
        )
    if (number := written_out(value)) is not None:
        if not number:
            kind = UngradableError if field in ("answer", "solution") else ValueError
            raise kind(f"{place}: field {field!r} is {_brief(value)}; expected {expected}")
        value = number
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


def written_out(value: object) -> str | None:
    """A number in plain digits, "" where it has none (NaN), or None for what is no number.

    Of a binary float the shortest decimal that is rounded to it in its own precision. A double that
    is a float32 to the last bit, 0.10000000149011612, was one: 0.1.
    """
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return ""
        # str rounds to the scalar's own type, and numpy's float64 is a float.
        value = Decimal(str(float(value) if isinstance(value, np.float64) else value))
    if not isinstance(value, Decimal):
        return None
    if not value.is_finite() or not -_LONGEST_NUMBER < value.adjusted() < _LONGEST_NUMBER:
        return ""
    double = float(value)
    single = np.float32(double) if abs(double) < np.finfo(np.float32).max else np.float32(0)
    # Exact expansions are kept: 2^-15 is a float32, too, and means what it says.
    is_single = float(single) == double and double % 1 != 0 and Decimal(double) != value
    if is_single and len(value.as_tuple().digits) > 10:
        value = Decimal(str(single))
    return f"{value:f}"


def _narrowed(
    rows: Iterator[Mapping[str, Any]], types: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Rows whose floats have the precision of their column, `float32` or `float16`, again."""
    narrow = {name: np.dtype(kind).type for name, kind in types.items()}
    for row in rows:
        yield {
            name: narrow[name](value) if name in narrow and isinstance(value, float) else value
            for name, value in row.items()
        }


def _json_lines(path: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    # Read as bytes: text mode also ends lines at characters that JSON strings may contain.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"line {number}"
            if not line.strip():
                continue
            try:
                # Decimals as they are written; ValueError is also for integers beyond Python's limit.
                record = json.loads(
                    line.decode("utf-8-sig"), object_pairs_hook=_object, parse_float=Decimal
                )
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
    arrow_names = {"float": "float32", "halffloat": "float16"}
    types = {
        field: arrow_names[str(file.schema_arrow.field(field).type)]
        for field in columns
        if str(file.schema_arrow.field(field).type) in arrow_names
    }
    number = 0
    try:
        for batch in file.iter_batches(columns=columns):
            for record in _narrowed(_text_rows(batch), types):
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
    features = getattr(rows, "features", None) or {}
    kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    types = {name: kind for name, kind in kinds.items() if kind in ("float16", "float32")}
    for number, record in enumerate(_narrowed(rows, types), start=1):
        yield number, f"row {number}", record


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:38]} … {shown[-38:]}"
