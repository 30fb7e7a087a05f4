"""Puzzles that the reasoning-gym library generates and scores: arithmetic, logic, games, graphs, code.

    task: {name: gym, options: {generators: {chain_sum: {min_terms: 2, max_terms: 4}, sudoku: {weight: 2}}}}

Each generator of the library takes the parameters of its own config class; `weight` (1 unless given) is
its share of the problems. A list of names takes each as it is.

The answer stands between `<answer>` and `</answer>`, as in the library's own prompts, and not in a box:
many answers are grids or lists of moves, which take several lines and hold braces. `</answer>` is the
answer marker, so the step that it is in is the last one; a grid of n lines is about n steps of
`sampling.max_steps` where steps are lines.

A reward is the library's score, 0 to 1, as it is: some generators give a little for an answer in the
right form. Where the library's scorer takes anything for an answer, or runs it as a program, answers
must be of the expected form first (`gym_library`). Reward workers bound what a scorer takes of time and
memory, not what it does.

Problem number i is the same in every process, whatever the hash seed and the order in which problems are
asked for. A question is of one split alone, by its hash; a quarter of them are the test split's.
"""

from __future__ import annotations

import difflib
import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxreset.errors import ConfigError
from jaxreset.tasks.base import ANSWERED_WITHIN, Item, Problem, Scores
from jaxreset.tasks.gym_library import MOST, Draw, Drawer, prepare_scorers, score_answer, tagged
from jaxreset.tasks.templated import TemplatedTask
from jaxreset.tasks.workers import RewardWorkers

KEY = "task.options.generators"
EXPECTED = (
    "names, or names with parameters, such as {chain_sum: {max_terms: 4}, sudoku: {weight: 2}}"
)
_TRIES = 2**8  # of a problem, each with a seed of its own
_FIRST_SEED = {"train": 0, "test": 2**31}  # further apart than MOST * _TRIES
_FAULTS = 8  # tries that may raise
_TEST_SHARE = 4  # one of so many questions
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: its multiples are spread evenly over 2**64


class Generator(NamedTuple):
    """A generator of the library, its share of the problems, and its parameters."""

    name: str
    weight: float
    parameters: Mapping[str, Any]


class GymProblems(Sequence[Problem]):
    """Generated problems; number i is always the same, and no question is in both splits.

    Args:
      split: `"train"` or `"test"`.
      size: how many.
      generators: of which they are.
      drawer: draws them.
      fits: which problems may be among them.

    Raises:
      ValueError: a generator has no problem for this split.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int,
        generators: Sequence[Generator],
        drawer: Drawer,
        fits: Callable[[Problem], bool] = lambda problem: True,
    ):
        if size > MOST:
            raise ConfigError(f"{size} problems of task.name=gym; expected at most {MOST}")
        self.split, self.size = split, size
        self._drawer, self._fits = drawer, fits
        self._kept: dict[int, Problem] = {}  # of the test split: they are asked at each evaluation
        self._share_out(generators)
        for generator in generators:
            self._problem(generator, 0)

    def _share_out(self, generators: Sequence[Generator]) -> None:
        self.generators = generators
        ends = list(accumulate(g.weight for g in generators))
        self._ends = [int(end / ends[-1] * 2**64) for end in ends[:-1]]

    def fitting(self, fits: Callable[[Problem], bool]) -> GymProblems:
        """The same with another one in place of each that doesn't fit."""
        return GymProblems(self.split, self.size, self.generators, self._drawer, fits)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        if index in self._kept:
            return self._kept[index]
        problem = self._problem(self.generator(index), index)
        if self.split == "test":
            self._kept[index] = problem
        return problem

    def generator(self, index: int) -> Generator:
        """Whose problem number `index` is; of any stretch of them each has its share."""
        return self.generators[bisect_right(self._ends, index * _GOLDEN % 2**64)]

    def _problem(self, generator: Generator, index: int) -> Problem:
        """The first of its tries that is in the split, and fits."""
        name, _, parameters = generator
        faults: list[str] = []
        seed = _FIRST_SEED[self.split]
        for attempt in range(_TRIES):
            try:
                entry = self._drawer.draw(Draw(name, parameters, seed, index, attempt))
            except ValueError as error:
                faults.append(str(error))
                if len(faults) < _FAULTS:
                    continue
                raise ConfigError(
                    f"{KEY}.{name}: the library can't draw problems of {dict(parameters)}: {faults[0]}"
                ) from None
            if not self._holds(entry["question"]):
                continue
            problem = Problem(
                f"{self.split}:{index}:{name}",
                entry["question"],
                entry["answer"] or "",  # some have many right answers, and give none
                extra={"generator": name, "parameters": parameters, "entry": entry},
            )
            if self._fits(problem):
                return problem
        raise ConfigError(
            f"{KEY}.{name}: of {_TRIES} questions none is in the {self.split} split and fits "
            "sampling.max_prompt_tokens; raise the limit, or give parameters that allow shorter or more "
            "questions"
        )

    def _holds(self, question: str) -> bool:
        in_test = zlib.crc32(question.encode()) % _TEST_SHARE == 0
        return in_test == (self.split == "test")


class GymTask(TemplatedTask):
    """A `Task` whose steps are lines, unless told otherwise, and whose answer stands in `<answer>` tags.

    The task can't tell the true first wrong step.

    Args:
      generators: names, or names with parameters, see the module's docstring.
      solve_prompt, localize_prompt, inline_prompt: see `TemplatedTask`, and for what it raises.
      processes: how many reward workers score answers.
      cpu_seconds: CPU time that one answer may take, else it scores 0.

    Raises:
      ValueError: the library isn't there, or has no such generator or parameter.
    """

    name = "gym"
    delimiter = "\n"
    answer_marker = "</answer>"
    templates = ("solve_gym.txt", "solve_gym_chat.txt")

    def __init__(
        self,
        *,
        generators: Mapping[str, Mapping[str, Any] | None] | Sequence[str],
        solve_prompt: str | Path | None = None,
        localize_prompt: str | Path | None = None,
        inline_prompt: str | Path | None = None,
        processes: int = 2,
        cpu_seconds: float = 5.0,
    ):
        super().__init__(
            solve_prompt=solve_prompt, localize_prompt=localize_prompt, inline_prompt=inline_prompt
        )
        self.generators = read_generators(generators)
        self._drawer = Drawer()
        self._workers = RewardWorkers(
            score_answer,
            processes=processes,
            cpu_seconds=cpu_seconds,
            prepare=partial(prepare_scorers, [(g.name, g.parameters) for g in self.generators]),
        )

    def problems(self, split: Literal["train", "test"], size: int) -> GymProblems:
        """`size` problems of a split."""
        return GymProblems(split, size, self.generators, self._drawer)

    def read_record(self, record: Mapping[str, Any]) -> Problem:
        """There are no files of such problems; raises `ValueError`."""
        raise ValueError("task.name=gym generates its problems; leave data.path out")

    def score(self, items: Sequence[Item]) -> Scores:
        """Rewards of (problem, response text) pairs; see `RewardWorkers.score` for its errors."""
        return self._workers.score(items)

    def answer(self, problem: Problem, response: str) -> str | None:
        """What stands between the last tags; see `Task.answer`."""
        return tagged(response[-ANSWERED_WITHIN:])

    def close(self) -> None:
        """Ends the processes that draw and score; they start again when they are needed."""
        self._drawer.close()
        self._workers.close()


def read_generators(given: Any) -> list[Generator]:
    """The generators that an option names, each checked by the library.

    Raises:
      ValueError: naming the option, what is wrong there, and the names that are closest.
    """
    names = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    if not given or not (names or isinstance(given, Mapping)):
        raise ValueError(f"{KEY} is {given!r:.80}; expected {EXPECTED}")
    if names:
        given = dict.fromkeys(given)
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            "task.name=gym needs the reasoning-gym library: pip install 'jaxreset[gym]'"
        ) from error
    kinds = {name: config for name, (_, config) in DATASETS.items() if name != "composite"}
    return [_generator(name, values, kinds) for name, values in given.items()]


def _generator(name: str, values: Any, kinds: Mapping[str, type[Any]]) -> Generator:
    if name not in kinds:
        raise ValueError(f"{KEY}: no generator is called {name!r}; {_closest(name, kinds)}")
    key = f"{KEY}.{name}"
    if not isinstance(values, Mapping | None):
        raise ValueError(
            f"{key} is {values!r:.80}; expected parameters by name, such as {{weight: 2}}"
        )
    parameters = dict(values or {})
    weight = parameters.pop("weight", 1)
    if not _is_positive(weight):
        raise ValueError(f"{key}.weight is {weight!r:.80}; expected a positive, finite number")
    known = [field.name for field in fields(kinds[name])]
    known = [field for field in known if field not in ("seed", "size")]
    for parameter in parameters:
        if parameter in ("seed", "size"):
            raise ValueError(f"{key}.{parameter}: problems are numbered by jaxreset; leave it out")
        if parameter not in known:
            raise ValueError(f"{key}.{parameter}: no such parameter; {_closest(parameter, known)}")
    try:
        config = kinds[name](**parameters, seed=0, size=10)
        if hasattr(config, "validate"):
            config.validate()
    except Exception as error:  # the library asserts, or trips over values of another type
        reason = str(error) or type(error).__name__
        raise ValueError(f"{key}: {parameters} is refused by the library: {reason}") from error
    return Generator(name, float(weight), parameters)


def _is_positive(weight: Any) -> bool:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return number and 0 < weight < math.inf


def _closest(name: Any, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"
