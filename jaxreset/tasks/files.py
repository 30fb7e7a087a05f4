"""Records of data files: JSON lines, a JSON list, Parquet, or a data set of the `datasets` library.

Whatever the file, a record is an object with named fields; numbers are as they were written.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreset.tasks.fields import brief

SUFFIXES = (".jsonl", ".parquet", ".json")
_ZIPPED = ".gz"  # of JSON
_SPACE = re.compile(r"\s*")


class Row(NamedTuple):
    """A record, its number in its file, and how a message says where it stands."""

    number: int
    place: str
    record: Mapping[str, Any]


def open_rows(path: str | Path) -> tuple[str, Iterator[Row]]:
    """A file's name without its ending, or a data set's, and its records.

    Args:
        path: a file; or, where no such file exists, `name`, `name:split` or `name:config:split` of
            a data set that the optional `datasets` library finds (split "train" unless given).

    Raises:
        FileNotFoundError: when `path` looks like a file and there is none.
        ImportError: when `path` can only be a data set's name, and `datasets` is missing.
        ValueError: it is no such file, or something in it no record; names the line or row.
    """
    source = Path(path).expanduser()
    stem, kind = _kind(source)
    if source.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file ending in {' or '.join(SUFFIXES)}")
    if source.is_file():
        if kind not in SUFFIXES:
            raise ValueError(f"{path}: extension {kind!r}; expected one of {', '.join(SUFFIXES)}")
        if kind == ".parquet":
            return stem, _parquet_rows(source)
        return stem, _json_lines(source) if kind == ".jsonl" else _json_list(source)
    if kind in SUFFIXES or source.is_absolute() or str(path).startswith("."):
        raise FileNotFoundError(f"{path}: no such file")
    return str(path), _dataset_rows(str(path))


def _kind(path: Path) -> tuple[str, str]:
    """A file's name without its ending, and that; `.gz` counts as part of JSON's."""
    inner = Path(path.stem)
    if path.suffix == _ZIPPED and inner.suffix in (".json", ".jsonl"):
        return inner.stem, inner.suffix
    return path.stem, path.suffix


def _lines(path: Path) -> Iterator[bytes]:
    """Its lines as bytes: text mode also ends lines at characters that JSON strings may contain."""
    try:
        with gzip.open(path) if path.suffix == _ZIPPED else path.open("rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
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
        yield Row(number, place, _named(path, place, record))


def _json_list(path: Path) -> Iterator[Row]:
    """Records of a file that is one list, read one by one, so that each has its line."""
    try:
        text = b"".join(_lines(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: malformed JSON ({error})") from error
    expected = (
        "expected a list of objects, [{…}, {…}]; a file with one object a line ends in .jsonl"
    )
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=Decimal)
    at, line, counted = _skip(text, 0), 1, 0
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}: begins with {brief(text[at : at + 20])}; {expected}")
    at, number = _skip(text, at + 1), 0
    closed = text[at : at + 1] == "]"
    while not closed:
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        place = f"record {number} in line {line}"
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, {place}: malformed JSON ({error}); {expected}") from error
        yield Row(number, place, _named(path, place, record))
        at = _skip(text, at)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            found = brief(text[at : at + 20]) if at < len(text) else "nothing"
            raise ValueError(f"{path}, {place}: followed by {found}; expected ',' or ']'")
        at = at if closed else _skip(text, at + 1)
    if (at := _skip(text, at + 1)) < len(text):
        raise ValueError(f"{path}: {brief(text[at : at + 20])} behind the list; {expected}")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def _named(path: Path, place: str, record: Any) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}, {place}: {brief(record)}; expected a JSON object with named fields"
        )
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which names each of its fields once."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there more than once")
    return record


def _parquet_rows(path: Path) -> Iterator[Row]:
    # Imported late: reward workers import this package, too.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    arrow_names = {"float": "float32", "halffloat": "float16"}
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    types = {name: arrow_names[kind] for name, kind in kinds.items() if kind in arrow_names}
    number = 0
    try:
        for batch in file.iter_batches():
            for record in _narrowed(_text_rows(batch), types):
                number += 1
                yield Row(number, f"row {number}", record)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}, row {number + 1}: can't be read ({error})") from error


def _text_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch; where one is no text, those before it come first."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            yield from batch.slice(row, 1).to_pylist()


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


def _dataset_rows(name: str) -> Iterator[Row]:
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
        yield Row(number, f"row {number}", record)
