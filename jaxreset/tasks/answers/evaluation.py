"""What an expression is worth at a point: exactly where it is rational, else to the digits asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from jaxreset.tasks.answers.expressions import Node
from jaxreset.tasks.answers.lexicon import TRIGONOMETRIC

# Exact up to here (39,000 digits); beyond, numbers are rounded and never found equal.
_EXACT_BITS = 2**17
_LONGEST_POWER = 4000  # bits

Value = Any  # Fraction, mpmath.mpf or mpmath.mpc


class UndefinedError(Exception):
    """No (real) value here: a division by zero, the square root of a negative number."""


class TooLargeError(Exception):
    """A tower of powers whose very logarithm can't be written down."""


def as_float(value: Value) -> Value:
    """As an mpmath number of the precision that is set."""
    import mpmath

    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def precision(bits: int) -> Any:
    """A context in which mpmath computes with so many bits."""
    import mpmath

    return mpmath.workprec(bits)


class Evaluation:
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
        with precision(self.bits):
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
                return as_float(value)
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
                a, b = as_float(a), as_float(b)
            return a + b if kind == "+" else a * b if kind == "*" else a / b
        if kind == "^":
            return self._power(a, b)
        if kind == "!":
            return self._factorial(a)
        if kind in ("max", "min"):
            return (max if kind == "max" else min)(arguments, key=as_float)
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

        x = as_float(a)
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
            return as_float(a) ** power
        if isinstance(b, Fraction) and isinstance(a, Fraction) and (a > 0 or not self.imaginary):
            if a < 0:
                if b.denominator % 2 == 0:
                    raise UndefinedError
                return self._power(-a, b) * (-1) ** b.numerator
            root = _exact_root(a, b.denominator)
            if root is not None:
                return self._power(root, Fraction(b.numerator))
        x, y = as_float(a), as_float(b)
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
