r"""Where the final answer of a text stands: in its last `\boxed{…}`, or behind its last `####`."""

from __future__ import annotations

import re
from typing import NamedTuple

# The opening of a box, an escaped character (\{ is printed, \\ breaks the line), a grouping brace.
_BOX_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
# MATH writes \boxed 2 in a few solutions.
_BARE_BOX = re.compile(r"\\boxed\s+([^\s${}\\]+)")

# All that may stand between two boxes that are one list. A word that isn't here ("then", "wait",
# "but", "is wrong") makes the later box a new answer, and so does the end of a sentence or a line.
_LINKS = re.compile(
    r"""(?: \s | [$,;&] | \\[()\[\],;:!\s] | \\q?quad(?![A-Za-z]) | (?<![A-Za-z])(?:
        and | or | as\s+well\s+as | also | both | either | the | other | second | third | last
        | are | is | one | root | solution | value )(?![A-Za-z])
      | \\(?:text|textrm|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}
      | [A-Za-z](?:_\{?[0-9A-Za-z]\}?)? \s*=  # the name of the next one: x_2 =
    )*""",
    re.VERBOSE | re.IGNORECASE,
)
_LINE_GOES_ON = re.compile(r"(,|;|\b(?:and|or))[ \t$]*\n\s*")


class _Box(NamedTuple):
    """Where a box begins, and where its contents do and end."""

    start: int
    begin: int
    end: int


def last_boxed(text: str) -> str | None:
    r"""Contents of the last complete `\boxed{…}` (or `\fbox{…}`) in `text`, or None.

    Braces nest; escaped ones don't count; a box that is never closed is passed over. Linear in the
    length of `text`.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    return _last(text, _boxes(text))


def all_boxed(text: str) -> str | None:
    r"""As `last_boxed`, but boxes that one sentence lists are one answer, joined by commas.

    They are a list if nothing stands between them but commas, `and`, `or`, names (`y =`) and a few
    words of that kind; a correction (`\boxed{1}, no, \boxed{2}`) is its last box. A box that is
    merely said again counts once.

    >>> all_boxed(r"$x = \boxed{1}$ or $x = \boxed{2}$.")
    '1, 2'
    """
    boxes = _boxes(text)
    listed = boxes[-1:]
    for box in reversed(boxes[:-1]):
        between = _LINE_GOES_ON.sub(r"\1 ", text[box.end + 1 : listed[0].start])
        if len(between) > 80 or "\n" in between or not _LINKS.fullmatch(between):
            break
        listed.insert(0, box)
    contents = list(dict.fromkeys(text[box.begin : box.end].strip() for box in listed))
    return ", ".join(contents) if len(contents) > 1 else _last(text, boxes)


def after_hashes(text: str) -> str | None:
    """The line after the last `####` of `text` (GSM8K's mark of the final answer), or None.

    >>> after_hashes("48 + 24 = 72 #### 72")
    '72'
    """
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None


def final_answer(text: str) -> str | None:
    r"""The answer that `text` states: its last `\boxed{…}`, else what follows its last `####`.

    Several boxes of one sentence are one answer: see `all_boxed`.
    """
    boxed = all_boxed(text)
    return after_hashes(text) if boxed is None else boxed


def unboxed(text: str) -> str:
    r"""`text` without its boxes: what they hold stays, and what is opened and never closed too.

    >>> unboxed(r"so \boxed{\frac{1}{2}}, \boxed 3")
    'so \\frac{1}{2}, 3'
    """
    open_braces, cuts = list[bool](), list[tuple[int, int]]()
    for token in _BOX_TOKEN.finditer(text):
        if token["box"] or token[0] == "{":
            open_braces.append(bool(token["box"]))
        if token["box"] or (token[0] == "}" and open_braces and open_braces.pop()):
            cuts.append(token.span())
    starts = [0, *(end for _, end in cuts)]
    stops = [*(start for start, _ in cuts), len(text)]
    kept = "".join(text[a:b] for a, b in zip(starts, stops, strict=True))
    return _BARE_BOX.sub(r"\1", kept)


def _boxes(text: str) -> list[_Box]:
    """The complete boxes of `text` in their order; of nested ones the innermost."""
    if r"\boxed" not in text and r"\fbox" not in text:
        return []
    open_braces: list[re.Match[str] | None] = []  # those of boxes; None for the others
    boxes: list[_Box] = []
    for token in _BOX_TOKEN.finditer(text):
        written = token[0]
        if written == "{":
            open_braces.append(None)
        elif written == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None and not (boxes and boxes[-1].begin > box.end()):
                boxes.append(_Box(box.start(), box.end(), token.start()))
        elif token["box"]:
            open_braces.append(token)
    return boxes


def _last(text: str, boxes: list[_Box]) -> str | None:
    end = boxes[-1].end if boxes else 0
    bare = [match[1] for match in _BARE_BOX.finditer(text, end)]
    if bare:
        return bare[-1].rstrip(".,;")
    return text[boxes[-1].begin : boxes[-1].end].strip() if boxes else None
