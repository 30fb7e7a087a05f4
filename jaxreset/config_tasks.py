"""The sections of a config about what is learnt: task, data, demonstrations, evaluation."""

from __future__ import annotations

import copy
import datetime
import difflib
import inspect
import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxreset import extensions
from jaxreset.config_names import RewardName, Section, TaskName, by_name
from jaxreset.models.encoding import chat_variables
from jaxreset.tasks.asking import Asking, Chat
from jaxreset.tasks.base import Task
from jaxreset.tasks.classes import TASKS, complete_object, find_task
from jaxreset.tasks.records import Selection
from jaxreset.tasks.rewards import Rewards, Weighted, find_reward


class Reward(Section):
    """One of several rewards."""

    function: RewardName = Field(description="import path; task: the task's own verifier")
    weight: float = 1.0


class Example(Section):
    """A solved problem that is shown before the one that is asked."""

    question: str = Field(min_length=1)
    solution: str = Field(min_length=1, description="step by step, in the format that is wanted")


# Keys of the section `task` that tasks of ours take as arguments, each those that it knows.
ARGUMENTS = (
    *("solve_prompt", "localize_prompt", "inline_prompt", "processes", "cpu_seconds"),
    *("min_terms", "max_terms", "modulus", "mistakes", "misread", "strict"),
)
_ATTRIBUTES = ("name", "delimiter", "answer_marker")  # of a task that is a dataclass: no options


class TaskConfig(Section):
    """What is learnt, and how it is asked."""

    name: TaskName = Field(
        "chain",
        description="chain, sums, math, choice, boolean, code, gym, or a class by its import path",
    )
    options: dict[str, Any] = Field(
        {}, description="arguments of the task's class, beside the keys here"
    )
    reward: Annotated[dict[str, Reward] | None, BeforeValidator(by_name)] = Field(
        None,
        description="import path of a function, or several by names of your own; null: the task's own",
    )
    failed_below: float | None = Field(
        None, description="a reward under it is a failure; null: the task's own, most have 0.5"
    )
    chat: Chat = Field(
        "auto",
        description="ask in the tokenizer's chat template, or in raw text; auto: the template where "
        "there is one",
    )
    system: str | None = Field(
        None, description="text of the system's turn; null: the template's own"
    )
    examples: tuple[Example, ...] = Field((), description="solved problems shown as earlier turns")
    delimiter: str | None = Field(
        None, min_length=1, description="what ends a step; null: the task's"
    )
    answer_marker: str | None = Field(
        None, min_length=1, description="what makes a step the last one; null: the task's"
    )
    stop: tuple[str, ...] = Field((), description="texts that end a response")
    solve_prompt: str | None = Field(
        None, description="a text with {problem} in it, or a file with one; null: the task's"
    )
    localize_prompt: str | None = Field(
        None, description="the same for the question where it went wrong"
    )
    inline_prompt: str | None = Field(None, description="the same for that question asked inline")
    min_terms: int = Field(3, ge=2, description="chain: fewest numbers in a sum")
    max_terms: int = Field(8, le=26, description="chain: most numbers in a sum")
    modulus: int = Field(10, ge=2, le=10, description="chain: sums are modulo this")
    mistakes: float = Field(0.08, ge=0, lt=1, description="chain: errors in demonstrations")
    misread: NonNegativeInt = Field(
        0, description="chain: most demonstrations take the numbers from 1 to this for one more"
    )
    strict: bool = Field(
        False, description="chain: each step must be right, else only the boxed sum"
    )
    processes: PositiveInt = Field(2, description="answer-checking processes")
    cpu_seconds: PositiveFloat = Field(5.0, description="deadline of one answer")
    date: datetime.date | None = Field(
        None, description="what a chat template takes for today; null: the day of the run's start"
    )
    enable_thinking: bool | None = Field(
        None, description="switch of chat templates that have one; null: left to the template"
    )

    @property
    def threshold(self) -> float:
        """A reward under it is a failure."""
        if self.failed_below is not None:
            return self.failed_below
        return find_task(self.name).failed_below

    def make_asking(self, task: Task, tokenizer: Any) -> Asking:
        """How its problems are put to a policy with this tokenizer; raises `ValueError`."""
        return Asking(
            task,
            tokenizer,
            chat=self.chat,
            system=self.system,
            examples=[(one.question, one.solution) for one in self.examples],
            variables=chat_variables(self.date, self.enable_thinking),
        )

    def make(self) -> Task:
        """The task; raises as its class does."""
        if extensions.handed_over(self.name):
            task = complete_object(extensions.load(self.name))
        else:
            kind = find_task(self.name)
            known = inspect.signature(kind).parameters if self.name in TASKS else ()
            ours = {key: getattr(self, key) for key in ARGUMENTS if key in known}
            task = kind(**self.options | ours)
        written = {"delimiter": self.delimiter, "answer_marker": self.answer_marker}
        if any(written.values()):
            task = copy.copy(task)
            vars(task).update({name: text for name, text in written.items() if text})
        return task

    def check_options(self, kind: type[Task]) -> None:
        """That `options` are arguments of the task's class; raises `ValueError`."""
        if self.name not in TASKS:
            expected = f"task.options to be the arguments of {self.name}"
            extensions.check_call(kind, expected, count=0, keywords=self.options)
            return
        parameters = inspect.signature(kind).parameters
        known = [name for name in parameters if name not in (*ARGUMENTS, *_ATTRIBUTES)]
        for name in self.options:
            if name in TaskConfig.model_fields:
                raise ValueError(f"task.options.{name}: it is a key of its own; set task.{name}")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise ValueError(
                    f"task.options.{name}: task.name={self.name} has no such option; "
                    f"{hint if known else 'it has none'}"
                )
        for name in known:
            if name not in self.options and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"task.options.{name} is missing; task.name={self.name} needs it")

    def make_rewards(self, task: Task) -> Rewards | None:
        """What scores in place of the task; None: nothing does."""
        if self.reward is None:
            return None
        parts = {
            name: Weighted(find_reward(one.function), one.weight)
            for name, one in self.reward.items()
        }
        return Rewards(task, parts, processes=self.processes, cpu_seconds=self.cpu_seconds)

    @model_validator(mode="after")
    def _ordered(self) -> TaskConfig:
        if self.min_terms > self.max_terms:
            raise ValueError(
                f"min_terms {self.min_terms} must not exceed max_terms {self.max_terms}"
            )
        if self.misread >= self.modulus:
            raise ValueError(
                f"misread {self.misread} must be under modulus {self.modulus}: it is the largest number "
                "that demonstrations misread"
            )
        return self


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


class WarmStart(Section):
    """Supervised steps before the first RL step. A fresh model learns all its parameters, another one what
    training trains."""

    steps: NonNegativeInt = 0
    path: str | None = Field(
        None,
        description="JSONL, JSON or Parquet file of demonstrations; null: the task's own, else the "
        "problems' solutions",
    )
    batch: PositiveInt = Field(64, description="demonstrations in a step")
    optimizer: Literal["muon", "adamw"] | None = Field(
        None, description="null: muon for a fresh model, adamw for another one"
    )
    learning_rate: PositiveFloat | None = Field(
        None,
        description="at its peak; muon's Adam takes a tenth. null: 2e-2 for muon, for adamw 2e-3 (a fresh "
        "model), 1e-5, or 2e-4 (adapters)",
    )


class Eval(Section):
    """Accuracy on held-out problems."""

    every_steps: PositiveInt | None = Field(
        None, description="null: before and after training only"
    )
    temperature: PositiveFloat = 1.0
    top_p: float | None = Field(None, gt=0, le=1, description="null: sampling.top_p")
    top_k: NonNegativeInt | None = Field(None, description="0 keeps all; null: sampling.top_k")
    samples: PositiveInt = Field(
        1, description="responses to each problem; over 1 there are pass@k and majority@k"
    )
    batch: PositiveInt = Field(128, description="responses drawn at once")
