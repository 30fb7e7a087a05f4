"""Prompt templates: text files, shipped in `prompts/` or given by the user.

`{problem}`, `{steps}`, `{count}` and `{delimiter}` in them are replaced, in one pass; every other brace
stands for itself, so LaTeX needs no escaping.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path


@functools.cache
def shipped(name: str) -> str:
    """The text of a template of ours."""
    return (resources.files("jaxreset.tasks") / "prompts" / name).read_text(encoding="utf-8")


def template(argument: str, path: str | Path | None, ours: str, fields: Sequence[str]) -> str:
    """The text of a user's template, or of `ours`; checked for its placeholders.

    Raises:
        FileNotFoundError: it isn't there.
        ValueError: it isn't text, or lacks placeholders; both name `argument`.
    """
    if path is None:
        return shipped(ours)
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{argument}: no such file: {path}")
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {path} is not UTF-8 text: {error}") from error
    missing = [f"{{{field}}}" for field in fields if f"{{{field}}}" not in text]
    if missing:
        raise ValueError(
            f"{argument}: {path} lacks {', '.join(missing)}; put each where its text belongs"
        )
    return text


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with each `{name}` of `values` replaced; braces in the values stay as they are."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], text)
