"""What a user brings from outside: found by its import path, and checked for how it may be called.

    reset.rule: my_rules:before_last        `package.module:name`, importable where the command runs

An object that is handed over in a notebook has such a path too, which names it in the run's config.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

EXPECTED = "expected package.module:name, such as my_rules:before_last"


_handed_over: dict[str, Any] = {}


def hand_over(thing: Any) -> str:
    """The path by which an object is found from now on, in this process at least.

    One that can't be imported gets the path that it would have; those without a name of their own, such as
    lambdas, are numbered.
    """
    path = path_of(thing)
    named = hasattr(thing, "__qualname__") and "<" not in path
    if named and importable(thing):
        _handed_over.pop(path, None)
        return path
    if not named:
        numbered = (f"{path}#{n}" for n in itertools.count(1))
        path = next(p for p in numbered if _handed_over.get(p, thing) is thing)
    _handed_over[path] = thing
    return path


def handed_over(path: str) -> bool:
    """Whether a path names an object that was handed over."""
    return path in _handed_over


def is_path(name: str) -> bool:
    """Whether a config's name leads outside, rather than to one of ours."""
    return ":" in name


def load(path: str) -> Any:
    """What an import path names.

    Raises:
      ValueError: it isn't one, its module isn't there or raises, or it has no such name; with what to do.
    """
    if path in _handed_over:
        return _handed_over[path]
    module_name, _, name = path.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise ValueError(f"{path}: a file's path; {EXPECTED}, without folder and .py")
    parts = [*module_name.split("."), *name.split(".")]
    if "<" in name or "#" in name or module_name == "__main__":
        raise ValueError(
            f"{path}: it was handed over as an object and has no name to import it by; hand it over again, "
            "or put it in a file and name that"
        )
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{path}: {EXPECTED}")
    if (here := os.getcwd()) not in sys.path:  # a command's Python doesn't look there by itself
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(_raised(path, error)) from error
        raise ValueError(
            f"{path}: no module named {error.name!r}; not in the working directory nor on Python's path. "
            "Start the command where the module lies, or install its package"
        ) from error
    except Exception as error:
        raise ValueError(_raised(path, error)) from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(found) if not n.startswith("_")]
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known[:8])}"
            raise ValueError(f"{path}: {module_name} has no {part!r}; {hint}")
        found = getattr(found, part)
    return found


def _raised(path: str, error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)
    line = f"{error.filename}, line {error.lineno}" if isinstance(error, SyntaxError) else ""
    if not line and where:
        line = f"{where[-1].filename}, line {where[-1].lineno}"
    return f"{path}: importing it raised {type(error).__name__}: {error} ({line}); mend that"


def find(name: str, ours: Mapping[str, Any], what: str) -> Any:
    """One of `ours` by its name, or what an import path leads to.

    Raises:
      ValueError: neither; `what` is what was looked for.
    """
    if name in ours:
        return ours[name]
    if is_path(name):
        return load(name)
    close = difflib.get_close_matches(name, ours, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"no {what} is called {name!r}; {hint}There are {', '.join(ours)}, or your own by import path, "
        f"{EXPECTED.removeprefix('expected ')}"
    )


def path_of(thing: Any) -> str:
    """The import path of a function, a class, or an object's class, as far as it has one."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def importable(thing: Any) -> bool:
    """Whether another process finds it by its path."""
    module, _, name = path_of(thing).partition(":")
    if module == "__main__" or "<" in name:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is thing


def parameters(function: Any, expected: str) -> list[inspect.Parameter]:
    """Of something that is to be called as `expected` says.

    Raises:
      ValueError: it can't be called.
    """
    if not callable(function):
        raise ValueError(f"{function!r:.80} is no function; expected {expected}")
    found = _signature(function)
    return [] if found is None else list(found.parameters.values())


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of compiled code, say
        return None


def check_call(
    function: Any, expected: str, *, count: int, keywords: Iterable[str] = ()
) -> Callable[..., Any]:
    """The function, if it may be called with `count` positional arguments and these keywords.

    Raises:
      ValueError: it may not; `expected` is how it should be written.
    """
    keywords = list(keywords)
    parameters(function, expected)
    if (signature := _signature(function)) is not None:
        try:
            signature.bind(*[None] * count, **dict.fromkeys(keywords))
        except TypeError as error:
            raise ValueError(
                f"{path_of(function)}{signature} can't be called so ({error}); expected {expected}"
            ) from error
    return function
