"""Keys of a folder's `config.json`, refused by file and key where their values can't be right."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Keys:
    """A JSON object of a file. Every method raises ValueError, which names the file and the key.

    Attributes:
      file: that the values come from.
      values: JSON values by key; null is as good as missing.
    """

    file: Path
    values: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.file}: {key} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as a float."""
        value = self._given(key, default)
        # Python reads NaN, Infinity and integers of any length as JSON; no float holds the longest.
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
        if not 0 < number <= sys.float_info.max:
            raise ValueError(f"{self.file}: {key} is {value!r}; expected a positive number")
        return float(number)

    def flag(self, key: str) -> bool:
        """True or false; false where it is missing."""
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise ValueError(f"{self.file}: {key} is {value!r}; expected true or false")
        return bool(value)

    def section(self, key: str) -> Keys:
        """An object with keys of its own; without any where it is missing."""
        value = self.values.get(key)
        if not isinstance(value, dict | None):
            raise ValueError(
                f"{self.file}: {key} is {value!r}; expected an object with keys of its own"
            )
        return Keys(self.file, value or {})

    def listed(self, key: str) -> list[Any]:
        """A list; empty where it is missing."""
        value = self.values.get(key)
        if not isinstance(value, list | None):
            raise ValueError(f"{self.file}: {key} is {value!r}; expected a list")
        return value or []

    def require(self, expected: Mapping[str, Any]) -> None:
        """Each of these keys is missing or has this value."""
        for key, ours in expected.items():
            value = self.values.get(key)
            if value is not None and value != ours:
                raise ValueError(f"{self.file}: {key} is {value!r}; only {ours!r} is supported")

    def __or__(self, other: Keys) -> Keys:
        """The keys of both; where both have one, the other's value."""
        return Keys(self.file, {**self.values, **other.values})

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value
