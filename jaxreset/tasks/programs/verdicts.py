"""What of a response is its program, and whether what a program gives is what was expected."""

from __future__ import annotations

import ast
import json
from decimal import Decimal

_LANGUAGES = ("", "python", "python3", "py")


def last_program(response: str) -> str | None:
    """The last block of code between fences; None: there is none.

    A block of another language, or one that isn't closed, is no program.

    >>> last_program("So:\\n```python\\nprint(1)\\n```\\n")
    'print(1)\\n'
    """
    program, block, language = None, list[str](), None
    for line in response.split("\n"):
        text = line.strip()
        if language is None:
            if text.startswith("```"):
                language, block = text[3:].strip().lower(), []
        elif text != "```":
            block.append(f"{line}\n")
        else:
            if language in _LANGUAGES:
                program = "".join(block)
            language = None
    return program


def is_program(text: str) -> bool:
    """Whether all of a text is Python.

    >>> is_program("n = int(input())"), is_program("Read a number first."), is_program(" ")
    (True, False, False)
    """
    try:
        return bool(ast.parse(text.strip()).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def same_output(output: bytes, expected: str) -> bool:
    """Whether a program prints what was expected.

    Line by line, white space around lines left out; a line of numbers may write them otherwise.

    >>> same_output(b"1.50 2\\n", "1.5  2.0")
    True
    """
    written = output.decode(errors="replace").strip().split("\n")
    wanted = expected.strip().split("\n")
    return len(written) == len(wanted) and all(map(_same_line, written, wanted))


def _same_line(written: str, wanted: str) -> bool:
    written, wanted = written.strip(), wanted.strip()
    if written == wanted:
        return True
    try:
        return [Decimal(n) for n in written.split()] == [Decimal(n) for n in wanted.split()]
    except ArithmeticError:  # no number
        return False


def same_value(output: bytes, expected: str) -> bool:
    """Whether a function returns what was expected, both in JSON, where a tuple is a list.

    >>> same_value(b"[1, 2.0]", "[1,2]")
    True
    """
    try:
        return bool(json.loads(output) == json.loads(expected))
    except (ValueError, RecursionError):
        return False
