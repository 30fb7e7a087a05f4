r"""Which letters are a product of variables, and which are a word.

LaTeX writes both the same way, so it is decided by the letters:

- a single letter is a variable; so is one with a subscript;
- two to four lower-case letters without a vowel but `a`, and with `a` only beside `b, c, d, x, y, z`,
  are a product: `xy`, `abc`, `mn`, `rst`. Hence `xy` is `yx`;
- any other run of letters that stands alone is a word: `no`, `on`, `cat`, `Tuesday`, `ABC` (a label,
  whose order counts). Words are equal if their letters are, in any case;
- in an expression, beside digits, powers or commands, up to three letters are a product (`2AB`, `xe^x`),
  if no space makes a word of them (`5 no`).
"""

from __future__ import annotations

import re

_PRODUCT = re.compile(r"[b-df-hj-np-tv-z]{2,4}|[abcdxyz]{2,4}")
# Written like a product, and a word.
_WORDS = frozenset(
    (
        *("add", "bad", "by", "cab", "cry", "dad", "day", "dry", "fly", "gym", "my", "pm"),
        *("shy", "sky", "sly", "spy", "try", "why", "myth", "hymn", "lynx"),
    )
)
_IN_EXPRESSION = re.compile(r"[a-np-zA-NP-Z]{1,3}")


def is_product(run: str) -> bool:
    """Whether a run of letters that stands alone is a product of variables.

    >>> [is_product(run) for run in ("yx", "no", "ABC", "abc", "x")]
    [True, False, False, True, True]
    """
    return len(run) == 1 or (_PRODUCT.fullmatch(run) is not None and run not in _WORDS)


def may_be_product(run: str) -> bool:
    """The same for a run inside an expression, where more is allowed."""
    return is_product(run) or _IN_EXPRESSION.fullmatch(run) is not None
