r"""What expressions are worth: exactly where they are rational, else to hundreds of digits.

Two expressions are the same if they agree at points of all kinds (fractions and integers, of both
signs) wherever both are defined. Without the imaginary unit only real values count, so that
`\sqrt{1/n}` is `1/\sqrt{n}`; odd roots of negative numbers are negative.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from jaxreset.tasks.answers.expressions import TRIGONOMETRIC, Node

# Exact up to here (39,000 digits); beyond, numbers are rounded and never found equal.
_EXACT_BITS = 2**17
# Two precisions: what is zero shrinks from the one to the other, what is small doesn't.
_COARSE_BITS, _FINE_BITS = 200, 800
# Of numbers in irrational expressions: beyond, agreement to any affordable precision proves nothing.
_LARGEST_SPAN = 8000
_LONGEST_POWER = 4000  # bits
_NEEDED_POINTS = 3

Value = Any  # Fraction, mpmath.mpf or mpmath.mpc


class UndefinedError(Exception):
    """No (real) value here: a division by zero, the square root of a negative number."""


class TooLargeError(Exception):
    """A tower of powers whose very logarithm can't be written down."""


def variables(node: Node) -> frozenset[str]:
    """The names of the variables in a tree."""
    if node[0] == "variable":
        return frozenset((node[1],))
    return frozenset().union(*(variables(part) for part in node[1:] if isinstance(part, tuple)))


def exact(node: Node) -> Fraction | None:
    """The value of a constant expression, if it is rational and computed as such."""
    try:
        value = _Evaluation(_COARSE_BITS, {}).of(node)
    except (UndefinedError, TooLargeError, RecursionError):
        return None
    return value if isinstance(value, Fraction) else None


def exact_at(node: Node, name: str, value: Fraction) -> Fraction | None:
    """The same with a value for the one variable."""
    try:
        result = _Evaluation(_COARSE_BITS, {name: value}).of(node)
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
            evaluation = _Evaluation(_FINE_BITS, point)
            pairs.append((evaluation.of(one), evaluation.of(other)))
        except (UndefinedError, TooLargeError, RecursionError):
            continue
    if len(pairs) < _NEEDED_POINTS or not any(a and b for a, b in pairs):
        return 0
    with _bits(_FINE_BITS):
        if not all(isinstance(side, Fraction) for pair in pairs for side in pair):
            pairs = [(_float(left), _float(right)) for left, right in pairs]
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
        value = _Evaluation(_COARSE_BITS, {}).of(node)
        if isinstance(value, Fraction):
            rest = value.denominator
            for prime in (2, 5):
                while rest % prime == 0:
                    rest //= prime
            if rest == 1:
                return False
        with _bits(_COARSE_BITS):
            return bool(abs(_float(value) - _float(written)) <= _float(Fraction(1, 2 * 10**places)))
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
            math.inf * node[1] if infinite else _float(_Evaluation(_COARSE_BITS, {}).of(node))
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
    coarse = _Evaluation(_COARSE_BITS, point, imaginary)
    a, b = coarse.of(one), coarse.of(other)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    if coarse.rounded or coarse.span > _LARGEST_SPAN:
        return False
    if coarse.span <= 60:  # nothing can have cancelled: what differs here does
        with _bits(_COARSE_BITS):
            size = max(1, abs(_float(a)), abs(_float(b)))
            if abs(_float(a) - _float(b)) > size * _float(Fraction(1, 2**40)):
                return False
    # However small a number is that was written down, it must show.
    bits = _FINE_BITS + 4 * coarse.span
    fine = _Evaluation(bits, point, imaginary)
    c, d = fine.of(one), fine.of(other)
    with _bits(bits):
        gap = max(
            abs(_float(a) - _float(b)),
            max(abs(_float(a)), abs(_float(b))) * _float(Fraction(1, 2**_COARSE_BITS)),
        )
        gap = gap or _float(Fraction(1, 2**_COARSE_BITS))
        shrunk = abs(_float(c) - _float(d)) <= gap * _float(Fraction(1, 2 ** (_FINE_BITS - 300)))
    return bool(shrunk)


def _is_complex(node: Node) -> bool:
    return node == ("constant", "i") or any(
        _is_complex(part) for part in node[1:] if isinstance(part, tuple)
    )


def _float(value: Value) -> Value:
    """As an mpmath number of the precision that is set."""
    import mpmath

    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _bits(count: int) -> Any:
    import mpmath

    return mpmath.workprec(count)


class _Evaluation:
    """Values of trees at one point and precision.

    Attributes:
        span: the largest binary exponent of a number met so far.
        rounded: whether an exact number was too long, so that agreement proves nothing.
    """

    def __init__(self, bits: int, point: Mapping[str, Fraction], imaginary: bool = False):
        self.bits = bits
        self.point = point
        self.imaginary = imaginary
        self.span = 0
        self.rounded = False

    def of(self, node: Node) -> Value:
        """The value of a tree.

        Raises:
            UndefinedError: where it has none.
            TooLargeError: where it can't be computed.
        """
        with _bits(self.bits):
            return self._of(node)

    def _of(self, node: Node) -> Value:
        kind = node[0]
        if kind == "number":
            return self._noted(node[1])
        if kind == "variable":
            return self.point[node[1]]
        if kind == "constant":
            return self._noted(self._constant(node[1]))
        if kind == "infinity":
            raise UndefinedError
        arguments = [self._of(part) for part in node[1:]]
        try:
            return self._noted(self._apply(kind, arguments))
        except (ArithmeticError, ValueError, TypeError) as error:
            raise UndefinedError from error

    def _noted(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            size = max(value.numerator.bit_length(), value.denominator.bit_length())
            if size > _EXACT_BITS:
                self.rounded = True
                return _float(value)
            self.span = max(self.span, size)
            return value
        import mpmath

        if not mpmath.isfinite(value):
            raise UndefinedError
        if isinstance(value, mpmath.mpc) and not self.imaginary:
            raise UndefinedError
        if value:
            self.span = max(self.span, min(abs(int(mpmath.mag(value))), _EXACT_BITS))
        return value

    def _constant(self, name: str) -> Value:
        import mpmath

        return {"pi": +mpmath.mp.pi, "e": +mpmath.mp.e, "i": mpmath.mpc(0, 1)}[name]

    def _apply(self, kind: str, arguments: list[Value]) -> Value:
        a = arguments[0]
        b = arguments[1] if len(arguments) > 1 else None
        if kind == "-":
            return -a
        if kind in ("+", "*", "/"):
            if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
                a, b = _float(a), _float(b)
            return a + b if kind == "+" else a * b if kind == "*" else a / b
        if kind == "^":
            return self._power(a, b)
        if kind == "!":
            return self._factorial(a)
        if kind in ("max", "min"):
            return (max if kind == "max" else min)(arguments, key=_float)
        if kind in ("gcd", "lcm"):
            function = math.gcd if kind == "gcd" else math.lcm
            return Fraction(function(*map(_integer, arguments)))
        if kind == "binom":
            over, under = _integer(a), _integer(b)
            if not 0 <= under <= over or over > 10_000:
                raise UndefinedError
            return Fraction(math.comb(over, under))
        if kind == "abs":
            return abs(a)
        if kind in ("floor", "ceil"):
            return _rounded(kind, a)
        return self._function(kind, a)

    def _function(self, kind: str, a: Value) -> Value:
        import mpmath

        x = _float(a)
        if x and abs(int(mpmath.mag(x))) > 4000:
            raise TooLargeError
        if kind == "degrees":
            return x * mpmath.mp.pi / 180
        if kind in TRIGONOMETRIC:
            return getattr(mpmath, kind)(x)
        if kind in ("arcsin", "arccos", "arctan"):
            return getattr(mpmath, "a" + kind[3:])(x)
        if kind == "exp":
            return self._power(+mpmath.mp.e, a)
        if kind in ("ln", "log"):
            if not x or (not self.imaginary and x < 0):
                raise UndefinedError
            return mpmath.log(x) if kind == "ln" else mpmath.log10(x)
        raise UndefinedError

    def _factorial(self, a: Value) -> Value:
        import mpmath

        count = _integer(a)
        if count < 0:
            raise UndefinedError
        if count * max(count.bit_length(), 1) <= _EXACT_BITS:
            return Fraction(math.factorial(count))
        if count.bit_length() > _LONGEST_POWER:
            raise TooLargeError
        self.rounded = True
        return mpmath.factorial(count)

    def _power(self, a: Value, b: Value) -> Value:
        import mpmath

        if not a:
            if isinstance(b, mpmath.mpc) or b <= 0:
                raise UndefinedError
            return a
        if isinstance(b, Fraction) and b.denominator == 1:
            power = b.numerator
            if isinstance(a, Fraction):
                size = max(a.numerator.bit_length(), a.denominator.bit_length()) - 1
                if abs(a) == 1 or size * abs(power) <= _EXACT_BITS:
                    return a**power
                self.rounded = True
            if power.bit_length() > _LONGEST_POWER:
                raise TooLargeError
            return _float(a) ** power
        if isinstance(b, Fraction) and isinstance(a, Fraction) and (a > 0 or not self.imaginary):
            if a < 0:
                if b.denominator % 2 == 0:
                    raise UndefinedError
                return self._power(-a, b) * (-1) ** b.numerator
            root = _exact_root(a, b.denominator)
            if root is not None:
                return self._power(root, Fraction(b.numerator))
        x, y = _float(a), _float(b)
        if isinstance(b, Fraction) and not self.imaginary and x < 0:
            if b.denominator % 2 == 0:
                raise UndefinedError
            return (-x) ** y * (-1) ** b.numerator
        if not self.imaginary and x < 0:
            raise UndefinedError
        if mpmath.mag(y) + mpmath.mag(abs(mpmath.log(x)) + 1) > 60:
            raise TooLargeError
        return x**y


def _integer(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise UndefinedError
    return value.numerator


def _rounded(kind: str, value: Value) -> Fraction:
    import mpmath

    if isinstance(value, Fraction):
        return Fraction(math.floor(value) if kind == "floor" else math.ceil(value))
    if isinstance(value, mpmath.mpc) or mpmath.mag(value) > 4000:
        raise UndefinedError
    return Fraction(int(getattr(mpmath, kind)(value)))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The root of a positive number if it is rational and small."""
    if degree > 64 or max(value.numerator, value.denominator).bit_length() > 4000:
        return None
    parts = []
    for number in (value.numerator, value.denominator):
        low, high = 1, 1 << (number.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
        if low**degree != number:
            return None
        parts.append(low)
    return Fraction(*parts)
