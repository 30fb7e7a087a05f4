"""From a config's `task` and `data` to batches of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxreset.models.encoding import continuation_tokens
from jaxreset.parallel import gather, own_share
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem
from jaxreset.tasks.records import Loaded, ReadRecord, read_file, read_problem


class Prompt(NamedTuple):
    """A problem of a batch: its tokens [p] int32, and the `number` that seeds its draws."""

    problem: Problem
    tokens: np.ndarray
    number: int


class Problems(NamedTuple):
    """The two splits, and how many records were left out because their answer can't be graded."""

    train: Sequence[Problem]
    test: Sequence[Problem]
    ungradable: int = 0


def own_problems(task: Any, *, train_size: int, test_size: int) -> Problems:
    """Those that a task makes itself."""
    return Problems(task.problems("train", train_size), task.problems("test", test_size))


def read_problems(
    path: str, eval_path: str | None, *, test_size: int, read: ReadRecord = read_problem
) -> Problems:
    """Problems of a file; without `eval_path`, the last of them (at most a tenth) are held out.

    Raises:
      ValueError: what `records.read_file` refuses, or a single problem; names the config's key.
    """
    train, ungradable = _load("data.path", path, read)
    if eval_path is not None:
        test, more = _load("data.eval_path", eval_path, read)
        return Problems(train, test[:test_size], ungradable + more)
    if len(train) == 1:
        raise ValueError(
            f"data.path: {path} holds 1 problem, and it would be held out; add problems, or name "
            "data.eval_path"
        )
    held_out = min(test_size, max(len(train) // 10, 1))
    return Problems(train[:-held_out], train[-held_out:], ungradable)


def _load(key: str, path: str, read: ReadRecord) -> Loaded:
    try:
        return read_file(path, read)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"{key}: {error}") from error


@dataclass
class Overlong:
    """How many problems had prompts over the limit, and the longest prompt."""

    dropped: int = 0
    longest: int = 0


def fit_prompts(
    problems: Sequence[Problem], asking: Asking, limit: int, *, refuse: bool
) -> tuple[Sequence[Problem], Overlong]:
    """Leaves out problems whose prompt has more than `limit` tokens.

    Generated problems are bounded by construction: only the first hundred are looked at, and an
    overlong one is refused. Those that aren't have a method `fitting(fits)`, which gives others in place
    of overlong ones.

    Raises:
      ValueError: an overlong prompt with `refuse`, or no problem left; with the numbers.
    """
    generated = not isinstance(problems, list)
    if not refuse and hasattr(problems, "fitting"):
        problems = problems.fitting(lambda problem: len(asking.tokens([problem])[0]) <= limit)
    looked_at = [problems[i] for i in range(min(len(problems), 100))] if generated else problems
    encoded = asking.tokens(looked_at)
    lengths = np.array([len(ids) for ids in encoded])
    over = np.flatnonzero(lengths > limit)
    found = Overlong(len(over), int(lengths.max(initial=0)))
    if len(over) and (refuse or generated):
        first = looked_at[over[0]]
        raise ValueError(
            f"{len(over)} of {len(looked_at)} prompts exceed sampling.max_prompt_tokens={limit}; the "
            f"first is {first.id} with {lengths[over[0]]} tokens, the longest has {found.longest}; "
            f"raise the limit{'' if generated else ' or set data.overlong=drop'}"
        )
    if generated:
        return problems, found
    kept = [p for p, length in zip(problems, lengths, strict=True) if length <= limit]
    if not kept:
        raise ValueError(
            f"all {len(problems)} prompts exceed sampling.max_prompt_tokens={limit} (the shortest has "
            f"{lengths.min()} tokens); raise the limit"
        )
    return kept, found


class PromptSource:
    """An endless, shuffled source of prompts; its whole state is `position`.

    Each pass over the problems has an order of its own, and each prompt of the source a number of its
    own, so that a problem met again draws other random numbers.

    Args:
      problems: of one split.
      seed: of the shuffle.
    """

    def __init__(self, problems: Sequence[Problem], asking: Asking, *, seed: int):
        source: Any = problems
        self._order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        self._asking = asking
        self.position = 0

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts, of which each process reads and encodes its share."""
        own = [self.position + i for i in own_share(count)]
        self.position += count
        problems = [self._order[i] for i in own]
        return gather(encode_prompts(problems, self._asking, own))


def encode_prompts(
    problems: Sequence[Problem], asking: Asking, numbers: Sequence[int]
) -> list[Prompt]:
    """Prompts of given problems, numbered as given."""
    return [Prompt(*p) for p in zip(problems, asking.tokens(problems), numbers, strict=True)]


def steps_writer(
    asking: Asking, *, max_response: int, max_steps: int | None, room: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from steps to the token ids that a response begins with: as many steps as leave `room`.

    Args:
      asking: its task's delimiter ends each step.
      max_response, max_steps: limits of a response; room for one more step is left.
      room: tokens that a step may take.
    """

    def write(steps: Sequence[str]) -> np.ndarray:
        steps = list(steps)[: None if max_steps is None else max_steps - 1]
        while steps:
            text = "".join(f"{step}{asking.task.delimiter}" for step in steps)
            tokens = continuation_tokens(asking.tokenizer, text)
            if len(tokens) + room <= max_response:
                return tokens
            steps = steps[:-1]
        return np.zeros(0, np.int32)

    return write
