"""The section `data` of a config: files of problems, and which of their records are taken."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxreset.config_names import Section
from jaxreset.tasks.records import Selection


def _in_one_level(values: Any, prefix: str = "") -> Any:
    """Objects inside objects as dotted paths: `{reward: {style: rule}}` is `{reward.style: rule}`."""
    if not isinstance(values, dict):
        return values
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        inside = isinstance(value, dict) and value
        flat |= _in_one_level(value, f"{path}.") if inside else {path: value}
    return flat


def _listed(values: Any) -> Any:
    """Single values as lists of one."""
    values = _in_one_level(values)
    if not isinstance(values, dict):
        return values
    return {name: v if isinstance(v, list | tuple) else [v] for name, v in values.items()}


def _with_paths(files: Any) -> Any:
    """Files in short, each by its path, as the schema has them."""
    if not isinstance(files, dict):
        return files
    return {name: {"path": file} if isinstance(file, str) else file for name, file in files.items()}


def _scalars(values: tuple[Any, ...]) -> tuple[Any, ...]:
    nan = [value for value in values if isinstance(value, float) and not math.isfinite(value)]
    if nan or not values or not all(isinstance(v, bool | int | float | str) for v in values):
        raise ValueError(
            f"{list(values)!r:.80}: expected texts or numbers, one of which the field has to be"
        )
    return values


def _simple(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{name!r:.80}: expected a name of letters, digits, _ and -")
    return name


Values = Annotated[tuple[Any, ...], AfterValidator(_scalars)]
Columns = dict[str, str]
Where = Annotated[dict[str, Values], BeforeValidator(_listed)]
FileName = Annotated[str, AfterValidator(_simple)]


class ProblemFile(Section):
    """One of several files of problems."""

    path: str = Field(description="JSONL, JSON or Parquet file, or a `datasets` name")
    columns: Columns | None = Field(None, description="null: data.columns")
    where: Where | None = Field(None, description="null: data.where")
    size: PositiveInt | None = Field(None, description="the first so many problems; null: all")


class MixedFile(ProblemFile):
    """One of several files that are trained on."""

    weight: PositiveFloat = Field(1.0, description="its share of the prompts, beside the others")


F = TypeVar("F", bound=ProblemFile)
# What is given is told apart first, so that an error is about the one that was meant. Tags with a space in
# them are no keys.
Files = Annotated[
    Annotated[str, Tag("a path")]
    | Annotated[
        dict[FileName, F], Field(min_length=1), BeforeValidator(_with_paths), Tag("by name")
    ],
    Discriminator(lambda given: "by name" if isinstance(given, dict) else "a path"),
]


class Data(Section):
    """Problems. Tasks that make their own, such as chain, need none of a file."""

    path: Files[MixedFile] | None = Field(
        None,
        description="file, or a `datasets` name; or several, by names of your own, with weights",
    )
    eval_path: Files[ProblemFile] | None = Field(
        None, description="held-out problems, or sets of them by name; null: the end of `path`"
    )
    columns: Columns = Field(
        {}, description="what fields are called in the records: {question: Frage, answer: a.target}"
    )
    where: Where = Field(
        {}, description="records that are kept, by values of a field: {level: [4, 5]}"
    )
    size: PositiveInt | None = Field(
        None, description="the first so many problems that are kept; null: all"
    )
    eval_size: PositiveInt = Field(500, description="held-out problems evaluated, of each set")
    chain_size: PositiveInt = Field(
        100_000, description="training problems of a task that generates them"
    )
    overlong: Literal["drop", "refuse"] = Field("drop", description="prompts over the limit")

    def selections(self) -> dict[str, Selection]:
        """The files that are trained on, by their names; that of a single path is ""."""
        if isinstance(self.path, str):
            return {"": Selection(self.path, self.columns, self.where, self.size)}
        return {
            n: self._selection(f)._replace(weight=f.weight) for n, f in (self.path or {}).items()
        }

    def eval_selections(self) -> dict[str, Selection] | None:
        """The same of what is held out; None: the end of those."""
        if self.eval_path is None:
            return None
        if isinstance(self.eval_path, str):
            return {"": Selection(self.eval_path, self.columns, self.where)}
        return {name: self._selection(file) for name, file in self.eval_path.items()}

    def _selection(self, file: ProblemFile) -> Selection:
        columns = self.columns if file.columns is None else file.columns
        where = self.where if file.where is None else file.where
        return Selection(file.path, columns, where, file.size)

    @model_validator(mode="after")
    def _of_files(self) -> Data:
        given = {
            "eval_path": self.eval_path,
            "columns": self.columns,
            "where": self.where,
            "size": self.size,
        }
        if self.path is None and (stray := [key for key, value in given.items() if value]):
            raise ValueError(
                f"{', '.join(stray)} without path: they are about files of problems; name one, or leave "
                "them out"
            )
        if isinstance(self.path, dict) and self.size is not None:
            raise ValueError(
                f"size {self.size} with several files: say for each how many, as path.NAME.size"
            )
        return self
