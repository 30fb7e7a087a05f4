"""The names that expressions are written with, and how numbers are."""

from __future__ import annotations

import re
from fractions import Fraction

TRIGONOMETRIC = ["sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh"]
FUNCTIONS = frozenset(
    [
        *TRIGONOMETRIC,
        *("arcsin", "arccos", "arctan", "ln", "log", "exp", "abs", "floor", "ceil"),
        *("max", "min", "gcd", "lcm", "binom"),
    ]
)
SEVERAL = frozenset(("max", "min", "gcd", "lcm"))
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
GREEK = frozenset(
    (
        *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"),
        *("vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "varrho", "sigma", "tau"),
        *("upsilon", "phi", "varphi", "chi", "psi", "omega", "ell"),
        *("Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega"),
    )
)
# What only math-verify reads.
LEFT_TO_SYMPY = frozenset(
    (
        *(r"\int", r"\iint", r"\oint", r"\sum", r"\prod", r"\lim", r"\begin", r"\det"),
        *(r"\partial", r"\nabla"),
    )
)
# What stands for itself without a backslash, too.
PLAIN_NAMES = (FUNCTIONS | GREEK | ALIASES.keys() | {"sqrt", "pi"}) - {"binom", "ell"}

_NUMBER = re.compile(
    r"(?:(?P<whole>[0-9]+)(?:\.(?P<places>[0-9]*))?|\.(?P<only>[0-9]+))"
    r"(?:\\overline\s*\{(?P<repeating>[0-9]+)\}|[eE](?P<exponent>[+-]?[0-9]{1,4})(?![0-9A-Za-z.]))?"
)
_LONGEST_NUMBER = 2000


def numeral(text: str, at: int) -> tuple[Fraction, int] | None:
    r"""The number that is written at this place, and where it ends; None if there is none to be read.

    >>> numeral(r"x+0.1\overline{6}", 2)
    (Fraction(1, 6), 17)
    """
    match = _NUMBER.match(text, at)
    if match is None or match.end() - match.start() > _LONGEST_NUMBER:
        return None
    places = match["places"] or match["only"] or ""
    value = Fraction(int((match["whole"] or "") + places), 10 ** len(places))
    if (again := match["repeating"]) is not None:
        if match["places"] is None and match["only"] is None:
            return None  # a bar over an integer is a label
        value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(places))
    if match["exponent"] is not None:
        value *= Fraction(10) ** int(match["exponent"])
    end = match.end()
    if text[end : end + 1].isdigit() or text.startswith(".", end):
        return None
    return value, end
