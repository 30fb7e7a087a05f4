"""Responses of an evaluation on disk: one line a problem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxreset.disk import writing
from jaxreset.errors import ConfigError
from jaxreset.json_text import dumps
from jaxreset.parallel.processes import is_leader
from jaxreset.run.evaluate import SetResponses


@contextmanager
def saving_responses(file: Path | None) -> Iterator[Callable[[SetResponses], None]]:
    """Inside, what is given is written; the file is there once all of it is. None: nothing is written.

    It is opened at once, so that an evaluation of hours doesn't end with a folder that can't be written.

    Raises:
      ConfigError: something has that name.
      RunError: it can't be written.
    """
    if file is None or not is_leader():
        yield lambda responses: None
        return
    if os.path.lexists(file):
        raise ConfigError(f"--save {file}: it exists already; choose another name")
    partial = file.with_name(f"{file.name}.partial")
    try:
        with writing(file, "the responses"):
            file.parent.mkdir(parents=True, exist_ok=True)
            out = partial.open("w", encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(
            f"--save {file}: {file.parent} is no folder; choose another name"
        ) from error
    try:
        with out:

            def save(responses: SetResponses) -> None:
                with writing(file, "the responses"):
                    out.writelines(f"{dumps(line)}\n" for line in _lines(responses))
                    out.flush()

            yield save
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _lines(of: SetResponses) -> Iterator[dict[str, Any]]:
    for n, problem in enumerate(of.sampled.problems):
        yield {
            "set": of.name,
            "problem": problem.id,
            "question": problem.question,
            "answer": problem.answer,
            "responses": of.sampled.texts[n],
            "rewards": of.sampled.rewards[n].tolist(),
            "greedy_response": of.greedy.texts[n][0],
            "greedy_reward": float(of.greedy.rewards[n, 0]),
        }
