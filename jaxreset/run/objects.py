"""Objects that are handed over in place of what a config names: they get their names there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxreset import extensions
from jaxreset.config import Config
from jaxreset.config_file import parse_config
from jaxreset.config_names import CALLBACK
from jaxreset.errors import ConfigError
from jaxreset.tasks.classes import complete_object, find_task
from jaxreset.tasks.rewards import OWN


def with_objects(
    config: Config,
    *,
    task: Any = None,
    reward: Any = None,
    rule: Any = None,
    objective: Any = None,
    advantage: Any = None,
    form: Any = None,
    callbacks: Iterable[Any] | None = None,
) -> Config:
    """The config with objects that are handed over, each named by its import path; see `Experiment`.

    Raises:
      ConfigError: one of them isn't what it should be.
    """
    values, hand = config.model_dump(), extensions.hand_over
    given = dict[tuple[str, ...], Any]()
    if task is not None:
        if config.task.failed_below == find_task(config.task.name).failed_below:
            values["task"]["failed_below"] = None  # it was the other task's own
        given["task", "name"] = _hand_over_task(task, values["task"])
    if isinstance(reward, Mapping):
        pairs = {n: r if isinstance(r, tuple) else (r, 1.0) for n, r in reward.items()}
        given["task", "reward"] = {
            name: {"function": function if function == OWN else hand(function), "weight": weight}
            for name, (function, weight) in pairs.items()
        }
    elif reward is not None:
        given["task", "reward"] = hand(reward)
    others: list[tuple[tuple[str, ...], Any]] = [
        (("objective",), objective),
        (("reset", "rule"), rule),
        (("loss", "advantage"), advantage),
        (("loss", "form"), form),
    ]
    for path, thing in others:
        if thing is not None:
            given[path] = thing if isinstance(thing, str) else hand(thing)
    if callbacks is not None:
        if isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
            raise ConfigError(f"callbacks={callbacks!r:.80}: expected a list, each {CALLBACK}")
        given["run", "callbacks"] = tuple(c if isinstance(c, str) else hand(c) for c in callbacks)
    if not given:
        return config
    for path, value in given.items():
        section = values
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
    return parse_config(values)


def _hand_over_task(task: Any, section: dict[str, Any]) -> str:
    """The name of a task; a data class is named by its class, and its fields are the options."""
    if isinstance(task, str):
        return task
    try:
        complete_object(task)
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error
    section["options"] = {}
    if dataclasses.is_dataclass(task) and not isinstance(task, type):
        fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.init}
        plain = all(isinstance(v, str | int | float | bool | None) for v in fields.values())
        if plain and extensions.importable(type(task)):
            section["options"] = fields
            return extensions.path_of(type(task))
    return extensions.hand_over(task)
