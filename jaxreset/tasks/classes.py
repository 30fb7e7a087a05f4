"""Tasks by name: ours, and classes from outside, which get what they lack from `base.Task`."""

from __future__ import annotations

import copy
from typing import Any

from jaxreset import extensions
from jaxreset.tasks.base import Task

# Loaded when asked for: the verifier of `math` takes its time to import.
TASKS = {
    "chain": "jaxreset.tasks.chain:ChainTask",
    "math": "jaxreset.tasks.math:MathTask",
    "sums": "jaxreset.tasks.sums:SumsTask",
    "code": "jaxreset.tasks.code:CodeTask",
    "choice": "jaxreset.tasks.choice:ChoiceTask",
    "boolean": "jaxreset.tasks.boolean:BooleanTask",
    "gym": "jaxreset.tasks.gym:GymTask",
}
EXPECTED = "a class with prompt(problem) and score(items), such as one derived from jaxreset.Task"


def find_task(name: str) -> type[Task]:
    """The class of a task by its name among `TASKS`, or by its import path.

    Raises:
      ValueError: there is none, or it is no task.
    """
    found = extensions.find(name, TASKS, "task")
    found = extensions.load(found) if isinstance(found, str) else found
    return type(complete_object(found)) if extensions.handed_over(name) else complete(found)


def complete(found: Any) -> type[Task]:
    """A class as a task: what `Task` has and it lacks is added.

    Raises:
      ValueError: it is no class, or has no `prompt` or `score` of its own.
    """
    if not isinstance(found, type):
        raise ValueError(f"{found!r:.80} is no class; expected {EXPECTED}")
    for method, expected in (("prompt", "prompt(problem)"), ("score", "score(items)")):
        own = getattr(found, method, None)
        if own is None or own is getattr(Task, method):
            raise ValueError(f"{extensions.path_of(found)} has no {expected}; expected {EXPECTED}")
        extensions.check_call(own, f"{expected} as a method", count=2)
    if issubclass(found, Task):
        return found
    return type(found.__name__, (found, Task), {"__module__": found.__module__})


def complete_object(task: Any) -> Task:
    """The same for an object.

    Raises:
      ValueError: it is no task.
    """
    if isinstance(task, type):
        raise ValueError(f"{task!r:.80} is a class; hand over an object of it, {task.__name__}(…)")
    whole = complete(type(task))
    if isinstance(task, Task):
        return task
    task = copy.copy(task)
    try:
        task.__class__ = whole
    except TypeError as error:
        raise ValueError(f"{type(task).__name__}: derive it from jaxreset.Task ({error})") from None
    return task


def tells_wrong_steps(task: type[Task]) -> bool:
    """Whether it knows the first wrong step of a failed response."""
    return task.first_wrong_step is not Task.first_wrong_step


def makes_problems(task: type[Task] | Task) -> bool:
    """Whether it has problems of its own, and needs no file."""
    return hasattr(task, "problems")


def demonstrates(task: type[Task]) -> bool:
    """Whether it makes demonstrations itself, in place of the problems' solutions."""
    return task.demonstrate_solution is not Task.demonstrate_solution
