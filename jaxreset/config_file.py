"""Reads a config: one YAML file, and `key=value` overrides such as `sampling.temperature=0.7`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jaxreset.config import Config
from jaxreset.errors import ConfigError

DUMPED = "# Written by jaxreset: every key, those left to their defaults too."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies `key=value` overrides, checks and resolves it.

    Args:
      path: a YAML file.
      overrides: `section.key=value`, the value in YAML.

    Raises:
      ConfigError: anything wrong with either; one line per problem.
    """
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
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Checks and resolves a config given as nested dictionaries; raises `ConfigError`."""
    try:
        return Config.model_validate(values).resolved()
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def dump_config(config: Config) -> str:
    """The config as YAML, below a line that says who wrote it."""
    return f"{DUMPED}\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}"


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
    # A union adds the names of its types, which aren't keys.
    parts = [p for p in error["loc"] if isinstance(p, int) or str(p).isidentifier()]
    field = ".".join(str(p) for p in parts if p not in ("float", "tuple", "str", "bool"))
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {error['input']!r}"
