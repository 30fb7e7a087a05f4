"""From a config's `task` and `data` to batches of prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxreset.models.encoding import continuation_tokens
from jaxreset.parallel import gather, own_share
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem
from jaxreset.tasks.fingerprint import Portion, fingerprint
from jaxreset.tasks.mixture import Mixture, shuffled
from jaxreset.tasks.records import Loaded, ReadRecord, Selection, read_file
from jaxreset.tasks.schemas import read_problem

TEST = "test"  # the set of held-out problems where there is one without a name

logger = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """A problem of a batch: its tokens [p] int32, and the `number` that seeds its draws."""

    problem: Problem
    tokens: np.ndarray
    number: int


class Problems(NamedTuple):
    """What is trained on, and what is held out.

    Attributes:
        train: problems; of several files one file after the other.
        test: held-out problems by the name of their set, the main set first.
        ungradable: how many records were left out because their answer can't be graded.
        weights: of the files that are mixed, by the name with which their problems' ids begin.
        portions: what was read, for the record.
        repeated: how many held-out problems are also trained on.
    """

    train: Sequence[Problem]
    test: Mapping[str, Sequence[Problem]]
    ungradable: int = 0
    weights: Mapping[str, float] = MappingProxyType({})
    portions: tuple[Portion, ...] = ()
    repeated: int = 0


def own_problems(task: Any, *, train_size: int, test_size: int) -> Problems:
    """Those that a task makes itself."""
    return Problems(task.problems("train", train_size), {TEST: task.problems("test", test_size)})


def read_problems(
    files: str | Mapping[str, Selection],
    eval_files: str | Mapping[str, Selection] | None,
    *,
    test_size: int,
    read: ReadRecord = read_problem,
) -> Problems:
    """Problems of files; without `eval_files`, the last of each (at most a tenth) are held out.

    Args:
      files: a path, or several files by name; the name of a file that isn't mixed with others is "".
      eval_files: the same for sets of held-out problems.
      test_size: most problems of a set.
      read: see `Task.read_record`.

    Raises:
      ValueError: what `records.read_file` refuses, or a single problem; names the config's key.
    """
    selections = _by_name(files)
    loaded = {
        name: _load("data.path", name, selection, read) for name, selection in selections.items()
    }
    ungradable = sum(one.ungradable for one in loaded.values())
    train, test, portions = {n: one.problems for n, one in loaded.items()}, {}, []
    if eval_files is None:
        held_out = _last_ones({name: len(problems) for name, problems in train.items()}, test_size)
        if not any(held_out.values()):
            path = next(iter(selections.values())).path
            raise ValueError(
                f"data.path: {path} holds 1 problem, and it would be held out; add problems, or name "
                "data.eval_path"
            )
        ends = {
            name: problems[len(problems) - held_out[name] :] for name, problems in train.items()
        }
        train = {
            name: problems[: len(problems) - held_out[name]] for name, problems in train.items()
        }
        test[TEST] = [problem for end in ends.values() for problem in end]
        portions = [_portion(f"{_key('data.path', n)}, end", selections[n], ends[n]) for n in ends]
    else:
        for name, selection in _by_name(eval_files).items():
            one = _load("data.eval_path", name, selection, read)
            ungradable += one.ungradable
            test[name or TEST] = one.problems[:test_size]
            key = _key("data.eval_path", name)
            portions.append(_portion(key, selection, test[name or TEST], records=one.records))
    weights = {name: selection.weight for name, selection in selections.items() if name}
    trained = [
        _portion(
            _key("data.path", n), selections[n], train[n], weights.get(n), records=loaded[n].records
        )
        for n in selections
    ]
    everything = [problem for problems in train.values() for problem in problems]
    repeated = _warn_of_repeated(everything, test)
    return Problems(everything, test, ungradable, weights, (*trained, *portions), repeated)


def _by_name(files: str | Mapping[str, Selection]) -> Mapping[str, Selection]:
    return {"": Selection(files)} if isinstance(files, str) else files


def _key(key: str, name: str) -> str:
    return f"{key}.{name}" if name else key


def _portion(
    key: str,
    selection: Selection,
    problems: Sequence[Problem],
    weight: float | None = None,
    records: int | None = None,
) -> Portion:
    return Portion(key, selection.path, len(problems), fingerprint(problems), weight, records)


def _load(key: str, name: str, selection: Selection, read: ReadRecord) -> Loaded:
    try:
        return read_file(selection, read, name=name)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"{_key(key, name)}: {error}") from error


def _last_ones(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """How many problems of each file are held out: a tenth; of more than `most` in all, in proportion."""
    tenths = {name: min(max(size // 10, 1), size - 1) for name, size in sizes.items()}
    total, most = sum(tenths.values()), min(most, sum(tenths.values()))
    if not total:
        return tenths
    shares = {name: tenth * most // total for name, tenth in tenths.items()}
    lost = sorted(tenths, key=lambda name: (-(tenths[name] * most % total), name))
    for name in lost[: most - sum(shares.values())]:
        shares[name] += 1
    return shares


def _warn_of_repeated(train: Sequence[Problem], test: Mapping[str, Sequence[Problem]]) -> int:
    """How many held-out questions are also trained on, but for white space."""
    known = {" ".join(p.question.split()): p.id for p in reversed(train)}
    held_out = [p for problems in test.values() for p in problems]
    repeated = [(p.id, known[q]) for p in held_out if (q := " ".join(p.question.split())) in known]
    if repeated:
        logger.warning(
            "%d of %d held-out problems are also trained on, so accuracy on them says less; the first: %s "
            "is %s",
            len(repeated),
            len(held_out),
            *repeated[0],
        )
    return len(repeated)


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
      weights: of several files, by the name with which their problems' ids begin; empty: there is one.

    Raises:
      ValueError: see `Mixture`.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        asking: Asking,
        *,
        seed: int,
        weights: Mapping[str, float] = MappingProxyType({}),
    ):
        files: dict[str, list[Problem]] = {name: [] for name in weights}
        for problem in problems if weights else ():
            files[problem.id.partition(":")[0]].append(problem)
        self._order = Mixture(files, weights, seed) if weights else shuffled(problems, seed)
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
