r"""math-verify's opinion on what `expressions` doesn't parse: integrals, sums, limits, determinants.

It is believed only where a numeric evaluation says the same. May take unbounded time.
"""

from __future__ import annotations

import logging
from typing import Any

_DIGITS = 40
_POINTS = (
    ("0.71", "1.37", "2.9", "0.43"),
    ("1.83", "0.57", "3.1", "2.21"),
    ("2.3", "3.7", "0.9", "1.1"),
)


def same_by_sympy(answer: str, gold: str) -> bool:
    """Whether math-verify finds two cleaned texts equal, and evaluating them does so too."""
    # Imported late: loading sympy takes a second that only workers need to spend.
    from math_verify import verify

    # It warns once that its time-outs are off, which is how it is meant here.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [_parsed(text) for text in (gold, answer)]
    if None in parsed:
        return False
    return _agree(*parsed) and bool(verify(*parsed, timeout_seconds=None))


def _parsed(text: str) -> Any:
    """A sympy expression, with letters as they are written, or None."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    imaginary = "i" in text.replace(r"\lim", "").replace(r"\int", "").replace(r"\pi", "")
    try:
        found = latex2sympy(
            text,
            is_real=not imaginary,
            normalization_config=_as_written(),
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # its grammar raises bare ones
        return None
    return found if isinstance(found, sympy.Expr) else None


def _as_written() -> Any:
    r"""Only its reading of `\frac12`: the rest of its normalisation drops units, cases and bases."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig

    return NormalizationConfig(basic_latex=False, malformed_operators=True, boxed="none")


def _agree(one: Any, other: Any) -> bool:
    """Whether two sympy expressions have the same values, relative to their size."""
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    if len(names) > len(_POINTS[0]):
        return False
    for point in _POINTS:
        at = dict(zip(names, point, strict=False))
        try:
            a, b = (side.doit().subs(at).evalf(_DIGITS) for side in (one, other))
            if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
                return False
            if abs(a - b) > 10 ** (10 - _DIGITS) * max(abs(a), abs(b)):
                return False
        except (TypeError, ValueError, AttributeError, ArithmeticError):
            return False
    return True
