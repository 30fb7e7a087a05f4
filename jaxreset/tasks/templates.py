"""Prompt templates: files shipped in `prompts/`, or texts and files given by the user.

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


def template(argument: str, given: str | Path | None, ours: str, fields: Sequence[str]) -> str:
    """The text of a user's template, or of `ours`; checked for its placeholders.

    `given` is the text itself where a placeholder is in it, else a file's path.

    Raises:
        FileNotFoundError: it isn't there.
        ValueError: it isn't text, or lacks placeholders; both name `argument`.
    """
    if given is None:
        return shipped(ours)
    placeholders = [f"{{{field}}}" for field in fields]
    if any(placeholder in str(given) for placeholder in placeholders):
        text, named = str(given), "the text"
    else:
        text, named = _read(argument, Path(given)), str(given)
    missing = [placeholder for placeholder in placeholders if placeholder not in text]
    if missing:
        raise ValueError(
            f"{argument}: {named} lacks {', '.join(missing)}; put each where its text belongs"
        )
    return text


def _read(argument: str, file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: no such file: {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {file} is not UTF-8 text: {error}") from error


def spoken(delimiter: str) -> str:
    """How a prompt names what ends a step."""
    return {"\n": "a line break", "\n\n": "a blank line"}.get(delimiter, delimiter)


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with each `{name}` of `values` replaced; braces in the values stay as they are."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], text)
