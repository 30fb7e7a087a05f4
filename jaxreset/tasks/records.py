"""Problems from data files: which fields are meant, which records are kept, and in what order.

What a file holds is `files`' part, and what its fields are called that of a task's `read_record`, see
`schemas`. Problems are named by file and line (`train:17`), so a log line leads back to the record; those
of several files by the name that the config gives the file. Records whose answer nothing could equal
(`proof`, `not found`, NaN) are left out and counted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import UngradableError, brief, field_at, names_of, written_out
from jaxreset.tasks.files import open_rows
from jaxreset.tasks.schemas import read_problem

ReadRecord = Callable[[Mapping[str, Any]], Problem]
Scalar = bool | int | float | str

SHOWN_VALUES = 12
_MISSING = object()

logger = logging.getLogger(__name__)


class Selection(NamedTuple):
    """A file of problems, and what of it is taken.

    Attributes:
        path: see `files.open_rows`.
        columns: the record's field, a dotted path, that stands for a field's name.
        where: the values, one of which a record's field must have, by the field's dotted path.
        size: the first so many problems; None: all.
        weight: of the file among several.
    """

    path: str
    columns: Mapping[str, str] = MappingProxyType({})
    where: Mapping[str, Sequence[Scalar]] = MappingProxyType({})
    size: int | None = None
    weight: float = 1.0


class Loaded(NamedTuple):
    """The problems of a file, and why the others of its records are none.

    Attributes:
        problems: in the file's order.
        ungradable: how many records had no answer that can be graded.
        elsewhere: how many records `where` left out.
    """

    problems: list[Problem]
    ungradable: int = 0
    elsewhere: int = 0

    @property
    def records(self) -> int:
        """How many were read."""
        return len(self.problems) + self.ungradable + self.elsewhere


def load_problems(path: str | Path, read: ReadRecord = read_problem) -> list[Problem]:
    """The problems of a file, as `read_file`, with a warning where some are left out."""
    return read_file(path, read).problems


def read_file(
    file: str | Path | Selection, read: ReadRecord = read_problem, *, name: str = ""
) -> Loaded:
    """The problems of a file, or of a data set by name.

    Args:
        file: its path, or that and what is taken; where there are enough problems, the rest isn't read.
        read: a record as a problem without an id, see `Task.read_record`.
        name: what ids begin with; "": the file's own name.

    Returns:
        The problems in the file's order, at least one, and how many records were left out; a warning names
        the first one whose answer can't be graded.

    Raises:
        FileNotFoundError: when the path looks like a file and there is none.
        ImportError: when it can only be a data set's name, and `datasets` is missing.
        ValueError: for anything wrong inside, naming the file, the line (or row), the field and
            what was expected; and where no answer at all can be graded, or no record is kept.
    """
    taken = file if isinstance(file, Selection) else Selection(str(file))
    path = taken.path
    stem, rows = open_rows(path)
    problems: list[Problem] = []
    ungradable: list[str] = []
    wanted = {
        field: {one for v in values for one in _spellings(as_written(v, field), field)}
        for field, values in taken.where.items()
    }
    others = {field: Counter[str]() for field in wanted}
    elsewhere = 0
    for number, place, record in rows:
        try:
            record = renamed(record, taken.columns)
            if not _kept(record, wanted, others):
                elsewhere += 1
                continue
            problems.append(dataclasses.replace(read(record), id=f"{name or stem}:{number}"))
        except UngradableError as error:
            ungradable.append(f"{path}, {place}: {error}")
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
        if len(problems) == taken.size:
            break
    if not problems:
        raise ValueError(f"{path}: {_why_none(taken.where, ungradable, elsewhere, others)}")
    if ungradable:
        logger.warning(
            "%s: %d of %d records are left out, for their answers can't be graded; the first: %s",
            path,
            len(ungradable),
            len(ungradable) + len(problems),
            ungradable[0],
        )
    return Loaded(problems, len(ungradable), elsewhere)


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A record with the fields that `columns` names; the others stay as they are.

    Raises:
        ValueError: it hasn't one of them; names those that it has.
    """
    if not columns:
        return record
    named = {ours: _field(record, path, f"columns.{ours}") for ours, path in columns.items()}
    return {**record, **named}


def _kept(
    record: Mapping[str, Any],
    wanted: Mapping[str, set[str]],
    others: Mapping[str, Counter[str]],
) -> bool:
    """Whether each field has one of the values that are wanted; if not, those that it has are counted."""
    found = {field: as_written(_field(record, field, "where"), field) for field in wanted}
    if all(_spellings(found[field], field) & values for field, values in wanted.items()):
        return True
    for field, value in found.items():
        others[field][value] += 1
    return False


def _field(record: Mapping[str, Any], path: str, key: str) -> Any:
    value = field_at(record, path, _MISSING)
    if value is _MISSING:
        raise ValueError(f"{key}: no field {path!r}; fields found: {names_of(record)}")
    return value


def as_written(value: Any, field: str) -> str:
    """A value as text, so that numbers equal themselves whatever they are read as.

    >>> as_written(5, "level"), as_written(5.0, "level"), as_written(" Level 5", "level")
    ('5', '5', 'Level 5')

    Raises:
        ValueError: it is a list or an object.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if (number := written_out(value)) is not None:
        whole, _, behind = number.partition(".")
        behind = behind.rstrip("0")
        short = f"{whole}.{behind}" if behind else whole
        return "0" if short == "-0" else short or "nan"
    if not isinstance(value, str):
        raise ValueError(f"where: field {field!r} is {brief(value)}; expected a text or a number")
    return value.strip()


def _spellings(text: str, field: str) -> set[str]:
    """A text, and without the field's own name before it: `Level 5` of the field `level` is `5`, too."""
    first, _, rest = text.partition(" ")
    own = first.casefold() == field.rpartition(".")[2].casefold()
    return {text, rest.strip()} if own and rest.strip() else {text}


def _why_none(
    where: Mapping[str, Sequence[Scalar]],
    ungradable: Sequence[str],
    elsewhere: int,
    others: Mapping[str, Counter[str]],
) -> str:
    if ungradable:
        return f"no answer of {len(ungradable)} records can be graded; the first: {ungradable[0]}"
    if not elsewhere:
        return "empty; expected at least one problem"
    wanted = "; ".join(
        f"{field} {', '.join(repr(as_written(v, field)) for v in values)}"
        for field, values in where.items()
    )
    return f"none of {elsewhere} records is kept by where ({wanted}); found: " + "; ".join(
        f"{field} {_counts(counter)}" for field, counter in others.items()
    )


def _counts(counter: Counter[str]) -> str:
    shown = [f"{brief(value)} ({count})" for value, count in counter.most_common(SHOWN_VALUES)]
    more = len(counter) - len(shown)
    return ", ".join(shown) + (f" and {more} others" if more else "")
