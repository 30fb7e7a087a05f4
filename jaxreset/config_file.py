"""Reads a config: one YAML file, and `key=value` overrides such as `sampling.temperature=0.7`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from jaxreset.errors import ConfigError

if TYPE_CHECKING:  # the schema imports JAX, which takes seconds: what is read before does without
    from jaxreset.config import Config

DUMPED = "# Written by jaxreset: every key, those left to their defaults too."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies `key=value` overrides, checks and resolves it.

    Args:
      path: a YAML file.
      overrides: `section.key=value`, the value in YAML.

    Raises:
      ConfigError: anything wrong with either; one line per problem.
    """
    return parse_config(read_values(path, overrides))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load_config` reads, before it is checked against the schema; raises `ConfigError`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected sections and keys, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return values


def run_path(folder: str) -> Path:
    """The folder that `run.dir` names."""
    return Path(folder).expanduser().absolute()


def run_dir(values: dict[str, Any]) -> Path | None:
    """The run folder that unchecked values name; None: the schema's, or something that it refuses."""
    run = values.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    return run_path(folder) if isinstance(folder, str) else None


def parse_config(values: dict[str, Any]) -> Config:
    """Checks and resolves a config given as nested dictionaries; raises `ConfigError`."""
    from pydantic import ValidationError

    from jaxreset.config import Config

    try:
        return Config.model_validate(values).resolved()
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def dump_config(config: Config) -> str:
    """The config as YAML, below a line that says who wrote it."""
    return f"{DUMPED}\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}"


def saved_values(path: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says, as nested dictionaries of JSON's types.

    An older version may have written it: keys that it didn't know have their defaults.

    Raises:
      ConfigError: it can't be read, isn't a run's, or has keys that this version doesn't know.
    """
    from pydantic import ValidationError

    from jaxreset.config import Config

    try:
        text = path.read_text()
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} can't be read: {error}; bring it back from a backup, or name another run.dir"
        ) from error
    if not text.startswith(DUMPED) or not isinstance(values, dict):
        raise ConfigError(f"{path} isn't a run's config; name another run.dir")
    values = _as_then(values)
    try:
        return Config.model_validate(values).resolved().model_dump(mode="json")
    except ValidationError as error:
        unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
    if unknown:
        keys = ", ".join(".".join(map(str, loc)) for loc in unknown)
        raise ConfigError(
            f"{path} is a newer version's: this one doesn't know {keys}; update jaxreset, or name "
            "another run.dir"
        )
    # What was allowed then and isn't now is to be compared all the same.
    return _over(Config().resolved().model_dump(mode="json"), values)


def _as_then(values: dict[str, Any]) -> dict[str, Any]:
    """With what an older version did where it had no key for it, and the default is another now."""
    task, model = values.get("task"), values.get("model")
    warm = values.get("warm_start")
    if isinstance(warm, dict) and "optimizer" not in warm:
        values = values | {"warm_start": warm | {"optimizer": "muon"}}
    if not isinstance(task, dict) or not isinstance(model, dict):
        return values
    if "chat" in task or model.get("path") is None:  # a policy of ours has no chat template
        return values
    raw = {"chat": "raw"} | ({"delimiter": "</thought>"} if task.get("name") == "math" else {})
    return values | {"task": raw | task}


def _over(defaults: Any, values: Any) -> Any:
    """`values`, with the defaults of the keys that they lack."""
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    return defaults | {key: _over(defaults.get(key), value) for key, value in values.items()}


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as train.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as text
            value = float(value)
        except ValueError:
            value = text if value == text.strip() else value
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    values[last] = value


def _explain(error: Any) -> str:
    """One problem in one line: field, value, expectation."""
    from jaxreset.config import Config

    # A union adds the names of its types, which aren't keys.
    parts = [p for p in error["loc"] if isinstance(p, int) or str(p).isidentifier()]
    field = ".".join(str(p) for p in parts if p not in ("float", "tuple", "str", "bool"))
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:  # a name of the user's own leads to no other section
            found = section.model_fields.get(part)
            section = section if found is None else _section_in(found.annotation) or section
        known = list(section.model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {error['input']!r}"


def _section_in(annotation: Any) -> Any:
    """The section that a field holds, by names of the user's own perhaps; None: it holds none."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
