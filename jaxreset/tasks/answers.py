r"""Final answers of mathematical text: where they stand, and when two of them are the same.

`same_answer` decides plain numbers exactly (`decimal`) and leaves everything else to math-verify,
which may take unbounded time on hostile input: call it on model output only inside
`jaxreset.tasks.workers`.
"""

from __future__ import annotations

import logging
import os
import re
from decimal import Decimal
from typing import NamedTuple

# The opening of a box, an escaped character (\{ is printed, \\ breaks the line), a grouping brace.
_BOX_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
# MATH writes \boxed 2 in a few solutions.
_BARE_BOX = re.compile(r"\\boxed\s+([^\s${}\\]+)")

_TEXT = r"\\(?:text|textrm|textbf|mathrm|mbox)"
_UNIT = rf"""
    {_TEXT}\{{ (?P<text>[A-Za-z\s./-]+) \}} (?:\^\{{?[23]\}}?)?  # \text{{ cm}}^2
  | (?P<words>[A-Za-z]{{3,}}(?:\s+[A-Za-z]{{3,}}){{0,2}})        # dollars, miles per hour
  | (?P<degrees>\^\\circ|\^\{{\\circ\}}|°)
"""
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\s*\$?\s*(?P<inner_sign>[-+]?)\s*
    (?P<digits>[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)
    \s*\$?\s*(?:(?P<percent>%|percent)|{_UNIT})?\s*\.?
    """,
    re.VERBOSE,
)
_LONGEST_NUMBER = 200

# Words after a number that change its value, or make it something else than a number.
_NOT_UNITS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|percent|and|or|to|by"
    r"|i|e|pi|mod|sqrt|sin|cos|tan|log|exp)\b",
    re.IGNORECASE,
)

_SAME_GLYPH = (
    ("\u2212", "-"),
    ("{,}", ","),
    (r"\!", ""),
    (r"\$", "$"),
    (r"\%", "%"),
    ("~", " "),
    (r"\ ", " "),
    (r"\;", " "),
    (r"\:", " "),
)
_THIN_SPACE_GROUP = re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")
_MATH_MODE = re.compile(
    r"\$(?P<dollars>(?:[^$\\]|\\.)*)\$|\\\((?P<parens>.*)\\\)|\\\[(?P<brackets>.*)\\\]", re.DOTALL
)
_BRACKET_SIZES = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_FRACTION_SIZES = re.compile(r"\\[dt]frac(?![A-Za-z])")


class PlainNumber(NamedTuple):
    """A number as written: `value` without the percent sign, and whether there was one."""

    value: Decimal
    percent: bool

    @property
    def amount(self) -> Decimal:
        """The value with a percent sign taken as a hundredth, exactly."""
        if not self.percent:
            return self.value
        sign, digits, exponent = self.value.as_tuple()
        assert isinstance(exponent, int)  # never infinite or NaN: built from digits
        return Decimal((sign, digits, exponent - 2))


def last_boxed(text: str) -> str | None:
    r"""Contents of the last complete `\boxed{…}` (or `\fbox{…}`) in `text`, or None.

    Braces nest; escaped ones don't count; a box that is never closed is passed over. Linear in the
    length of `text`.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    open_braces: list[tuple[bool, int]] = []  # (is a box, where its contents begin)
    begin, end = -1, -1
    for token in _BOX_TOKEN.finditer(text):
        if token["box"] or token[0] == "{":
            open_braces.append((bool(token["box"]), token.end()))
        elif token[0] == "}" and open_braces:
            is_box, opened = open_braces.pop()
            if is_box and opened > begin:
                begin, end = opened, token.start()
    bare = [match[1] for match in _BARE_BOX.finditer(text, max(end, 0))]
    if bare:
        return bare[-1].rstrip(".,;")
    return text[begin:end].strip() if begin >= 0 else None


def after_hashes(text: str) -> str | None:
    """The line after the last `####` of `text` (GSM8K's mark of the final answer), or None.

    >>> after_hashes("48 + 24 = 72 #### 72")
    '72'
    """
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None


def final_answer(text: str) -> str | None:
    r"""The answer that `text` states: its last `\boxed{…}`, else what follows its last `####`."""
    boxed = last_boxed(text)
    return after_hashes(text) if boxed is None else boxed


def plain_number(text: str) -> PlainNumber | None:
    r"""`text` as one exact number, or None for anything else: fractions, lists, prose.

    Understood: a sign, `$`, grouping commas (`1,080`, `1{,}080`, `10,\!000`), decimals, a trailing
    period, a percent sign, and a unit (`\text{ cm}`, `dollars`, degrees), which is dropped. Words
    that change the value ("million") are no units.

    >>> plain_number(r"\$1,080.50").value
    Decimal('1080.50')
    """
    text = _plain_glyphs(text)
    if len(text) > _LONGEST_NUMBER:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    if _NOT_UNITS.search(match["text"] or match["words"] or ""):
        return None
    sign = "-" if "-" in (match["sign"], match["inner_sign"]) else ""
    return PlainNumber(Decimal(sign + match["digits"].replace(",", "")), bool(match["percent"]))


def answers_equal(answer: str, gold: str) -> bool:
    r"""Whether two final answers are the same.

    Plain numbers are compared exactly: `18.00` is `18`, `0.33` is not `0.333`. A percent sign may
    be left out or written as hundredths: `50%` is both `50` and `0.5`. The same text is the same
    answer. What is left is parsed and compared by math-verify 0.9 (`\frac{36}{2}`, sets, intervals,
    matrices, expressions), without its time-outs, which need signals: the caller bounds the time.
    """
    number, gold_number = plain_number(answer), plain_number(gold)
    if number is not None and gold_number is not None:
        if number.value == gold_number.value:
            return True
        return number.percent != gold_number.percent and number.amount == gold_number.amount
    squashed = _squash(answer)
    if not squashed:
        return False
    return squashed == _squash(gold) or _equal_by_math_verify(answer, gold)


def same_answer(response: str, gold: str) -> bool:
    r"""Whether the final answer of a response is `gold`.

    The response's answer is its last `\boxed{…}`, else what follows its last `####`; a response
    with neither is wrong. May take unbounded time on hostile text: see the module's docstring.

    >>> same_answer(r"18 - 3 = 15, so \boxed{15}", "15")
    True
    """
    answer = final_answer(response)
    return answer is not None and answers_equal(answer, gold)


def prepare_verifier() -> None:
    """Loads math-verify and its tables, so that no deadline has to cover it.

    For a process that does nothing else: it tells sympy, through the environment, to do without
    GMP, which aborts the process where Python's integers raise.
    """
    os.environ |= {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}
    _equal_by_math_verify(r"\frac{1}{2}", "(1, 2)")


def _plain_glyphs(text: str) -> str:
    """`text` with spacing commands, escapes and enclosing math mode removed."""
    text = text.strip()
    enclosed = _MATH_MODE.fullmatch(text.removesuffix("."))
    if enclosed is not None:
        text = next(group for group in enclosed.groups() if group is not None)
    text = _THIN_SPACE_GROUP.sub("", text)
    for written, plain in _SAME_GLYPH:
        text = text.replace(written, plain)
    return text.replace(r"\,", " ").strip()


def _squash(text: str) -> str:
    """`text` without spaces, math mode and the sizes of brackets and fractions."""
    text = _FRACTION_SIZES.sub(r"\\frac", _BRACKET_SIZES.sub("", _plain_glyphs(text)))
    return "".join(text.replace("$", "").split()).removesuffix(".")


def _equal_by_math_verify(answer: str, gold: str) -> bool:
    # Imported late: loading sympy takes a second that only workers need to spend.
    from math_verify import LatexExtractionConfig, parse, verify

    # It warns once that its time-outs are off, which is how it is meant here.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed_gold, parsed_answer = (
        parse(rf"\boxed{{{text.replace('$', '')}}}", extraction_config=latex, parsing_timeout=None)
        for text in (gold, answer)
    )
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None))
