r"""One text for answers that are surely the same, so that they can be counted."""

from __future__ import annotations

import re
from fractions import Fraction

from jaxreset.tasks.answers.text import clean, join_comma_groups, squash

LONGEST = 500  # characters that are looked at; longer answers stay as they are

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_FRACTION = re.compile(
    r"([-+]?)(?:([0-9]+)/([0-9]+)|\\frac\{([0-9]+)\}\{([0-9]+)\}|\\frac([0-9])([0-9]))"
)


def normal_form(answer: str) -> str:
    r"""The answer in a writing of its own: rational numbers as fractions, other mathematics in plain LaTeX.

    Answers with one normal form are the same to `answers_equal`; the reverse doesn't hold, such as for
    `\sqrt{8}` and `2\sqrt{2}`, or `5` and `x = 5`. Takes no time to speak of, whatever the text.

    >>> normal_form(r"\dfrac{1}{2}"), normal_form("$0.50$"), normal_form("1,080")
    ('1/2', '1/2', '1080')
    """
    if len(answer) > LONGEST:
        return answer
    text = squash(clean(answer))
    plain = join_comma_groups(text)
    if _NUMBER.fullmatch(plain):
        return str(Fraction(plain))
    if (found := _FRACTION.fullmatch(plain)) is not None:
        over, under = (int(part) for part in found.groups()[1:] if part is not None)
        if under:
            return str(Fraction(-over if found[1] == "-" else over, under))
    return text
