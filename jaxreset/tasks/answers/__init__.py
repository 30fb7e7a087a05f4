r"""Final answers of mathematical text: where they stand, and when two of them are the same.

`same_answer` reads both into the same few shapes (`shapes`) and compares those; what is rational is
compared exactly, the rest to hundreds of digits at several points. Only what our parser leaves out
(integrals, sums, limits) goes to math-verify. Its time is then unbounded: call it on model output
only inside `jaxreset.tasks.workers`.

A wrong answer that is taken for right is worse than the reverse, for a policy learns to write it. Where
math-verify errs, what happens here instead, and which right answers are judged wrong: docs/answers.md.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import NamedTuple

from jaxreset.tasks.answers.boxes import after_hashes, final_answer, last_boxed, unboxed
from jaxreset.tasks.answers.comparing import same
from jaxreset.tasks.answers.evaluation import TooLargeError
from jaxreset.tasks.answers.reading import plain_parts, read
from jaxreset.tasks.answers.shapes import Unread, Words
from jaxreset.tasks.answers.text import clean, squash

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
    "unboxed",
]

_BARE_NUMBER = re.compile(r"-?[0-9]{1,200}(?:\.[0-9]{1,200})?")
# What data sets write where there is no answer to compare with.
_NO_ANSWERS = frozenset(
    (
        *("proof", "see proof", "proof required", "proof omitted", "proved", "see solution"),
        *("not found", "notfound", "not_found", "not available", "not provided", "not given"),
        *("no answer", "unknown", "nan", "null", "n/a", "tbd"),
    )
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
    try:
        one, other = read(answer), read(gold)
        if not any(isinstance(side, Unread) and side.mathematics for side in (one, other)):
            return same(one, other)
    except RecursionError:
        return False
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
