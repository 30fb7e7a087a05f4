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

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import UngradableError, brief
from jaxreset.tasks.schemas import read_problem

SUFFIXES = (".jsonl", ".parquet")
_FIELDS = ("question", "problem", "answer", "solution")

ReadRecord = Callable[[Mapping[str, Any]], Problem]

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """The problems of a file, and how many more had no answer that can be graded."""

    problems: list[Problem]
    ungradable: int


def load_problems(path: str | Path, read: ReadRecord = read_problem) -> list[Problem]:
    """The problems of a file, as `read_file`, with a warning where some are left out."""
    return read_file(path, read).problems


def read_file(path: str | Path, read: ReadRecord = read_problem) -> Loaded:
    """The problems of a `.jsonl` or `.parquet` file, or of a data set by name.

    Args:
        path: a file; or, where no such file exists, `name`, `name:split` or `name:config:split` of
            a data set that the optional `datasets` library finds (split "train" unless given).
        read: a record as a problem without an id, see `Task.read_record`.

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
    ungradable: list[str] = []
    for number, place, record in records:
        try:
            problems.append(dataclasses.replace(read(record), id=f"{stem}:{number}"))
        except UngradableError as error:
            ungradable.append(f"{path}, {place}: {error}")
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
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


def read_rows(path: str | Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """The records of a `.jsonl`, `.json` (a list of objects) or `.parquet` file, with all their fields.

    Yields:
        number, from 1; its place, for messages; and the record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: for anything wrong inside, naming the file and the place.
    """
    source = Path(path).expanduser()
    suffixes = (*SUFFIXES, ".json")
    if source.is_dir() or source.suffix not in suffixes:
        kind = "is a folder" if source.is_dir() else f"extension {source.suffix!r}"
        raise ValueError(f"{path}: {kind}; expected a file ending in {', '.join(suffixes)}")
    if not source.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if source.suffix == ".parquet":
        yield from _parquet_rows(source, None)
    else:
        yield from _json_lines(source) if source.suffix == ".jsonl" else _json_list(source)


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
                    f"{path}, {place}: {brief(record)}; expected a JSON object with named fields"
                )
            yield number, place, record


def _json_list(path: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    try:
        records = json.loads(
            path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object, parse_float=Decimal
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed JSON ({error}); expected a list of objects") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: {brief(records)}; expected a list of objects")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, record {number}: {brief(record)}; expected a JSON object with named fields"
            )
        yield number, f"record {number}", record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which names each of its fields once."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there more than once")
    return record


def _parquet_rows(
    path: Path, fields: Sequence[str] | None = _FIELDS
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    # Imported late: reward workers import this package, too.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    names = file.schema_arrow.names
    columns = names if fields is None else [field for field in fields if field in names]
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
