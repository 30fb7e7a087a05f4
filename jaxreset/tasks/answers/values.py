r"""Whether expressions have the same value, and in which order: by their values at several points.

Two expressions are the same if they agree at points of all kinds (fractions and integers, of both
signs) wherever both are defined. Without the imaginary unit only real values count, so that
`\sqrt{1/n}` is `1/\sqrt{n}`; odd roots of negative numbers are negative.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction

from jaxreset.tasks.answers.evaluation import (
    Evaluation,
    TooLargeError,
    UndefinedError,
    as_float,
    precision,
)
from jaxreset.tasks.answers.expressions import Node

# Two precisions: what is zero shrinks from the one to the other, what is small doesn't.
_COARSE_BITS, _FINE_BITS = 200, 800
# Of numbers in irrational expressions: beyond, agreement to any affordable precision proves nothing.
_LARGEST_SPAN = 8000
_NEEDED_POINTS = 3


def variables(node: Node) -> frozenset[str]:
    """The names of the variables in a tree."""
    if node[0] == "variable":
        return frozenset((node[1],))
    return frozenset().union(*(variables(part) for part in node[1:] if isinstance(part, tuple)))


def exact(node: Node) -> Fraction | None:
    """The value of a constant expression, if it is rational and computed as such."""
    try:
        value = Evaluation(_COARSE_BITS, {}).of(node)
    except (UndefinedError, TooLargeError, RecursionError):
        return None
    return value if isinstance(value, Fraction) else None


def exact_at(node: Node, name: str, value: Fraction) -> Fraction | None:
    """The same with a value for the one variable."""
    try:
        result = Evaluation(_COARSE_BITS, {name: value}).of(node)
    except (UndefinedError, TooLargeError, RecursionError):
        return None
    return result if isinstance(result, Fraction) else None


def same_value(one: Node, other: Node) -> bool:
    """Whether two expressions are equal wherever both are defined.

    Raises:
        TooLargeError: where that can't be decided because a number is too large.
    """
    try:
        return _same_value(one, other)
    except (UndefinedError, RecursionError):
        return False


def proportional(one: Node, other: Node) -> int:
    """The sign of the constant c ≠ 0 with `one` = c · `other` everywhere; 0 if there is none."""
    names = sorted(variables(one) | variables(other))
    if not names or variables(one) != variables(other):
        return 0
    pairs = []
    for point in _points(names):
        try:
            evaluation = Evaluation(_FINE_BITS, point)
            pairs.append((evaluation.of(one), evaluation.of(other)))
        except (UndefinedError, TooLargeError, RecursionError):
            continue
    if len(pairs) < _NEEDED_POINTS or not any(a and b for a, b in pairs):
        return 0
    with precision(_FINE_BITS):
        if not all(isinstance(side, Fraction) for pair in pairs for side in pair):
            pairs = [(as_float(left), as_float(right)) for left, right in pairs]
        a, b = next((a, b) for a, b in pairs if a and b)
        for left, right in pairs:
            cross, size = left * b - right * a, max(abs(left * b), abs(right * a))
            if abs(cross) * 2**300 > size:
                return 0
    return 1 if (a > 0) == (b > 0) else -1


def rounds_to(node: Node, written: Fraction, places: int) -> bool:
    """Whether a constant expression is `written`, a decimal, when rounded to its last place.

    Six decimals and six significant digits at least, and only for what no decimal is exactly:
    0.333333 is 1/3, while 0.333 is not, and 0.1250001 is not 1/8.
    """
    if places < 6 or abs(written) * 10**places < 10**5:
        return False
    try:
        value = Evaluation(_COARSE_BITS, {}).of(node)
        if isinstance(value, Fraction):
            rest = value.denominator
            for prime in (2, 5):
                while rest % prime == 0:
                    rest //= prime
            if rest == 1:
                return False
        with precision(_COARSE_BITS):
            return bool(
                abs(as_float(value) - as_float(written)) <= as_float(Fraction(1, 2 * 10**places))
            )
    except (UndefinedError, TooLargeError, RecursionError, TypeError):
        return False


def compare(one: Node, other: Node) -> int:
    """-1, 0 or 1: the order of two real constants, infinity among them.

    Raises:
        UndefinedError: if one is no real constant.
    """
    if variables(one) or variables(other):
        raise UndefinedError
    sides = []
    for node in (one, other):
        infinite = node[0] == "infinity"
        sides.append(
            math.inf * node[1] if infinite else as_float(Evaluation(_COARSE_BITS, {}).of(node))
        )
    if same_value(one, other):
        return 0
    return -1 if sides[0] < sides[1] else 1


def _same_value(one: Node, other: Node) -> bool:
    names = sorted(variables(one) | variables(other))
    if not names:
        return _agree(one, other, {})
    agreed = 0
    for point in _points(names):
        try:
            if not _agree(one, other, point):
                return False
        except (UndefinedError, TooLargeError):
            continue
        agreed += 1
    return agreed >= _NEEDED_POINTS


def _points(names: list[str]) -> Iterator[Mapping[str, Fraction]]:
    """The same points at each call; denominators are even, so that (-1)^n has no value at them."""
    draw = random.Random(20)

    def value(signed: bool, whole: bool) -> Fraction:
        size = Fraction(draw.randint(1, 9)) if whole else Fraction(2 * draw.randint(1, 60) + 1, 16)
        return -size if signed and draw.random() < 0.5 else size

    for signed, whole in [(False, False)] * 4 + [(True, False)] * 5 + [(False, True)] * 5:
        yield {name: value(signed, whole) for name in names}


def _agree(one: Node, other: Node, point: Mapping[str, Fraction]) -> bool:
    """Whether two expressions have the same value at a point."""
    imaginary = _is_complex(one) or _is_complex(other)
    coarse = Evaluation(_COARSE_BITS, point, imaginary)
    a, b = coarse.of(one), coarse.of(other)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    if coarse.rounded or coarse.span > _LARGEST_SPAN:
        return False
    if coarse.span <= 60:  # nothing can have cancelled: what differs here does
        with precision(_COARSE_BITS):
            size = max(1, abs(as_float(a)), abs(as_float(b)))
            if abs(as_float(a) - as_float(b)) > size * as_float(Fraction(1, 2**40)):
                return False
    # However small a number is that was written down, it must show.
    bits = _FINE_BITS + 4 * coarse.span
    fine = Evaluation(bits, point, imaginary)
    c, d = fine.of(one), fine.of(other)
    with precision(bits):
        gap = max(
            abs(as_float(a) - as_float(b)),
            max(abs(as_float(a)), abs(as_float(b))) * as_float(Fraction(1, 2**_COARSE_BITS)),
        )
        gap = gap or as_float(Fraction(1, 2**_COARSE_BITS))
        shrunk = abs(as_float(c) - as_float(d)) <= gap * as_float(
            Fraction(1, 2 ** (_FINE_BITS - 300))
        )
    return bool(shrunk)


def _is_complex(node: Node) -> bool:
    return node == ("constant", "i") or any(
        _is_complex(part) for part in node[1:] if isinstance(part, tuple)
    )
