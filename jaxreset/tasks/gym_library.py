"""The reasoning-gym library in processes of its own: one draws its problems, others score answers.

Some of its generators draw in the order of a set, which follows Python's hashes, and some from the global
generator. Where problems are drawn, both are fixed, so that a problem is the same in every process.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from jaxreset.errors import RunError
from jaxreset.tasks.base import Problem
from jaxreset.tasks.workers import ignore_interrupts, start_process

MOST = 2**22  # problems of a split
_SIZE = 10  # of a data set of the library, where it draws them all at once
_KEPT = 256  # data sets in memory
_PATIENCE = 300.0  # seconds that drawing a problem may take
_DRAWN, _RAISED = "drawn", "raised"

# Generators whose scorers run `eval` on the answer, to read a Python list.
_LISTS = frozenset(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"))
# In an answer that sympy evaluates as Python: what a formula needs none of, and a program does.
_PROGRAM = re.compile(r"""["'`_\[\]{}:;\\@]|\.\s*[^\W\d]""")


def _is_formula(answer: str, right: str) -> bool:
    return _PROGRAM.search(answer) is None


# (answer, the right one): what an answer must be where the library's scorer takes anything.
_SOUND: dict[str, Callable[[str, str], bool]] = {
    "complex_arithmetic": lambda answer, right: "nan" not in answer.casefold(),  # scores 1
    "game_of_life_halting": lambda answer, right: answer.casefold() == right.casefold(),
    "countdown": _is_formula,
    "intermediate_integration": _is_formula,
    "polynomial_multiplication": _is_formula,
    "puzzle24": _is_formula,
    "simple_integration": _is_formula,
}


class Draw(NamedTuple):
    """A problem that the library is to draw.

    Attributes:
      generator: its name.
      parameters: of its config class, without seed and size.
      seed: from which on seeds are taken, `MOST` for each attempt.
      number: of the problem, below `MOST`.
      attempt: 0, or more where the ones before won't do.
    """

    generator: str
    parameters: Mapping[str, Any]
    seed: int
    number: int
    attempt: int


class Drawer:
    """Draws problems in a process that starts at the first of them, and ends with `close` or this one."""

    def __init__(self) -> None:
        self._running: list[Any] = []  # the process and its pipe
        # Runs at the end of this process too; it must not hold a reference to self.
        weakref.finalize(self, _end, self._running)

    def draw(self, draw: Draw) -> Mapping[str, Any]:
        """The library's entry: question, answer and metadata.

        Raises:
          ValueError: the generator raised; with what it said.
          RunError: the process ended twice, or nothing was drawn within minutes.
        """
        reply = self._ask(draw) or self._ask(draw)
        outcome, detail = reply or ("ended", {})
        if outcome == _DRAWN:
            return detail
        if outcome == _RAISED:
            raise ValueError(detail)
        raise RunError(
            f"task.options.generators.{draw.generator}: the process that draws its problems {outcome}; "
            "leave the generator out, or give parameters that are easier to meet"
        )

    def close(self) -> None:
        """Ends the process; a later `draw` starts it again."""
        _end(self._running)

    def _ask(self, draw: Draw) -> tuple[str, Any] | None:
        """The process's reply; None: it has ended, perhaps by somebody else."""
        if not self._running:
            self._running += start_process(serve, {"PYTHONHASHSEED": "0"})
        pipe = self._running[1]
        try:
            pipe.send(draw)
            if pipe.poll(_PATIENCE):
                return pipe.recv()
        except (EOFError, OSError):
            self.close()
            return None
        except BaseException:
            self.close()  # it would answer this in the next call
            raise
        self.close()
        return f"took more than {_PATIENCE:g} seconds", {}


def _end(running: list[Any]) -> None:
    if running:
        process, pipe = running
        running.clear()
        process.kill()
        process.wait()
        pipe.close()


def serve(fd: int) -> None:
    """The process: draws what is asked for on the pipe `fd` until the other end closes."""
    ignore_interrupts()
    pipe = Connection(fd)
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            draw = pipe.recv()
            try:
                entry = _entry(draw)
            except Exception as error:
                said = "".join(traceback.format_exception_only(error)).strip()
                pipe.send((_RAISED, said))
            else:
                pipe.send((_DRAWN, entry))


_at_once: dict[str, bool] = {}  # whether a generator draws a whole data set at once
_datasets: dict[tuple[str, str, int], Any] = {}


def _entry(draw: Draw) -> Mapping[str, Any]:
    """Most generators draw number n from seed + n, whatever n; of the others each has a data set."""
    name, parameters, seed, number, attempt = draw
    place = number + MOST * attempt
    if _draws_at_once(name, parameters):
        return _item(_created(name, parameters, seed + place), seed + place, 0)
    return _item(_dataset(name, parameters, seed), seed, place)


def _draws_at_once(name: str, parameters: Mapping[str, Any]) -> bool:
    if name not in _at_once:
        try:
            _item(_dataset(name, parameters, 0), 0, 2**30)
            _at_once[name] = False
        except IndexError:
            _at_once[name] = True
    return _at_once[name]


def _item(dataset: Any, seed: int, place: int) -> Mapping[str, Any]:
    random.seed(seed + place)
    np.random.seed(seed + place)
    try:
        return dataset[place]
    except Exception:
        _datasets.clear()  # some are another one after they have raised
        raise


def _dataset(name: str, parameters: Mapping[str, Any], seed: int) -> Any:
    key = (name, repr(sorted(parameters.items())), seed)
    if key not in _datasets:
        if len(_datasets) >= _KEPT:
            _datasets.clear()
        _datasets[key] = _created(name, parameters, seed)
    return _datasets[key]


def _created(name: str, parameters: Mapping[str, Any], seed: int) -> Any:
    from reasoning_gym.factory import create_dataset  # takes its time to import

    random.seed(seed)
    np.random.seed(seed)
    dataset = create_dataset(name, **parameters, seed=seed, size=_SIZE)
    dataset.size = 2**62  # else some refuse what lies beyond, though they can draw it
    return dataset


def prepare_scorers(generators: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Loads the library and what these generators score with, so that no deadline has to cover it."""
    for name, parameters in generators:
        _scorer(name, parameters)


def _scorer(name: str, parameters: Mapping[str, Any]) -> Any:
    dataset = _dataset(name, parameters, 0)
    if name in _LISTS:
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval
    return dataset


def score_answer(problem: Problem, response: str) -> float:
    """The library's score of one response's answer, 0 without one. Runs in a reward worker."""
    name, parameters, entry = (problem.extra[key] for key in ("generator", "parameters", "entry"))
    answer, sound = tagged(response), _SOUND.get(name)
    if not answer or (sound and not sound(answer, problem.answer)):
        return 0.0
    scorer = _scorer(name, parameters)
    try:
        return scorer.score_answer(answer, entry)
    except MemoryError:
        raise
    except Exception:
        if problem.answer:  # raises again where the scorer is to blame, and not the answer
            scorer.score_answer(problem.answer, entry)
        return 0.0


def tagged(response: str) -> str | None:
    """What stands between the last `</answer>` and the `<answer>` before it, without outer white space.

    >>> tagged("Done.\\n<answer>\\n1 2\\n3 4\\n</answer>\\n")
    '1 2\\n3 4'
    """
    before, closing, _ = response.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if closing and opening else None
