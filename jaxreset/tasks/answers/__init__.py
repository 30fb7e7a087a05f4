r"""Final answers of mathematical text: where they stand, and when two of them are the same.

`same_answer` reads both into the same few shapes (`shapes`) and compares those; what is rational is
compared exactly, the rest to hundreds of digits at several points. Only what our parser leaves out
(integrals, sums, limits) goes to math-verify. Its time is then unbounded: call it on model output
only inside `jaxreset.tasks.workers`.

A wrong answer that is taken for right is worse than the reverse, for a policy learns to write it.
Where math-verify 0.9 errs, and what happens here instead:

| written | math-verify | here |
|---|---|---|
| `1 2`, `2\ 1/2` | joins digits over a space: 12, 21/2 | two numbers are no number; an integer and a proper fraction are a mixed number; groups of three (`12 345`, `1\,234`) are one number |
| `ABC`, `no` | a product, so `BCA`, `on` | words, by the rule in `letters`; `xy` is `yx` |
| `X`, `x` | the same | two variables |
| `10^{-20}`, `\frac{1}{2006!}` | equal to all that is small | exact, or relative to its size |
| `0.3333334` | rounded to six places: 1/3 | a decimal of six places and digits or more is what rounds to it; fewer, or one for a decimal, are exact |
| `5 thousand`, `3 \text{ tenths}` | the last words are dropped as units | factors; `squared` is a power; other words that change a number make it text |
| `5 km`, `5 m` | both 5 | 5 without a unit equals both, but they aren't each other; units convert |
| `1011_2` | 1011 | digits in a base, equal to these digits in this base alone |
| `x \le 2`, `(-\infty,2]` | equal if the gold is the relation | equal both ways; so are all of `2 \ge x`, `1 < x \le 3`, unions, `\ne` |
| `x^2 = 4` | equals 4 | a relation equals its right side only if its left one is a name: `x`, `f(x)`, `AB` |
| `\{1,2\}`, `(1,2)` | equal | a set or a list has no order, a point has; `1,2` is each of them in its order |
| `\sqrt[3]{-8}` | complex | −2 |

Known to be judged wrong although they are right, on purpose or for want of a reading: `\log` and `\ln`
of the same (`\log` has base 10); `5!!`; `1/2x` is x/2, and `1/xy` only text; numbers in words
(`five`); `1 hour and 30 minutes` for `90 minutes`; `11_2` for 3 and `1011` for `1011_2` (a conversion
is not answered by repeating the question); solutions for their equation (`x = \pm 2` for `x^2 = 4`);
identities that hold for integers alone (`\sin(n\pi)` and 0); numbers beyond 39,000 digits.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import NamedTuple

from jaxreset.tasks.answers.boxes import after_hashes, final_answer, last_boxed
from jaxreset.tasks.answers.comparing import same
from jaxreset.tasks.answers.reading import plain_parts, read
from jaxreset.tasks.answers.shapes import Unread, Words
from jaxreset.tasks.answers.text import clean, squash
from jaxreset.tasks.answers.values import TooLargeError

__all__ = [
    "PlainNumber",
    "after_hashes",
    "answers_equal",
    "final_answer",
    "is_gradable",
    "last_boxed",
    "plain_number",
    "prepare_verifier",
    "same_answer",
]

_BARE_NUMBER = re.compile(r"-?[0-9]{1,200}(?:\.[0-9]{1,200})?")
# What data sets write where there is no answer to compare with.
_NO_ANSWERS = frozenset(
    """proof|see proof|proof required|proof omitted|proved|not found|notfound|not_found|nan|null|n/a
    |not available|not provided|not given|no answer|unknown|see solution|tbd""".replace(
        "\n    ", ""
    ).split("|")
)


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


def plain_number(text: str) -> PlainNumber | None:
    r"""`text` as one exact number, or None for anything else: fractions, lists, prose.

    Understood: a sign, a currency, grouping commas (`1,080`, `1{,}080`, `10,\!000`), groups of three
    behind spaces, decimals, a trailing period, a percent sign, and a unit (`\text{ cm}`, `dollars`,
    degrees), which is dropped. Words that change the value ("million") are no units.

    >>> plain_number(r"\$1,080.50").value
    Decimal('1080.50')
    """
    found = plain_parts(text)
    return None if found is None else PlainNumber(Decimal(found[0]), found[1])


def is_gradable(gold: str) -> bool:
    """Whether a gold answer says anything that an answer could equal: `proof` and `NaN` don't.

    >>> is_gradable("not found"), is_gradable("Tuesday")
    (False, True)
    """
    text = clean(gold)
    if not re.search(r"[^\W_]|\\", text):  # no letter, no digit, no command
        return False
    return text != "None" and text.casefold().strip("()[]{} .?!") not in _NO_ANSWERS


def answers_equal(answer: str, gold: str) -> bool:
    r"""Whether two final answers are the same; it never matters which of them is the gold one.

    Numbers are compared exactly: `18.00` is `18`, `0.33` is not `0.333`. A percent sign may be left
    out or written as hundredths: `50%` is both `50` and `0.5`. Units may be left out. The same text
    is the same answer. The module's docstring says what else is, and what isn't.
    """
    if _BARE_NUMBER.fullmatch(answer) and _BARE_NUMBER.fullmatch(gold):
        return Decimal(answer) == Decimal(gold)
    squashed, squashed_gold = squash(clean(answer)), squash(clean(gold))
    if not squashed or not squashed_gold:
        return False
    if squashed == squashed_gold:
        return True
    one, other = read(answer), read(gold)
    sympy_reads = any(isinstance(side, Unread) and side.mathematics for side in (one, other))
    try:
        if not sympy_reads:
            return same(one, other)
    except TooLargeError:
        pass
    if isinstance(one, Words) or isinstance(other, Words):
        return False
    from jaxreset.tasks.answers.sympy_opinion import same_by_sympy

    return same_by_sympy(clean(answer), clean(gold))


def same_answer(response: str, gold: str) -> bool:
    r"""Whether the final answer of a response is `gold`.

    The response's answer is its last `\boxed{…}` (all of them, if one sentence lists several), else
    what follows its last `####`; a response with neither is wrong. May take unbounded time on hostile
    text: see the module's docstring.

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
    answers_equal(r"\int_0^1 x dx", r"\frac{\sqrt{1}}{2}")
