"""The sections of a config about what is learnt: task, demonstrations, evaluation; not the problems."""

from __future__ import annotations

import copy
import datetime
import difflib
import inspect
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from jaxreset import extensions
from jaxreset.config_names import RewardName, Section, TaskName, by_name
from jaxreset.models.encoding import chat_variables
from jaxreset.tasks.asking import Asking, Chat
from jaxreset.tasks.base import Task
from jaxreset.tasks.classes import TASKS, complete_object, find_task
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
