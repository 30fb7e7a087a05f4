"""When two shapes are the same answer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from jaxreset.tasks.answers import values
from jaxreset.tasks.answers.expressions import Node
from jaxreset.tasks.answers.intervals import real_set
from jaxreset.tasks.answers.shapes import (
    Based,
    Interval,
    Items,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Shape,
    Words,
)
from jaxreset.tasks.answers.units import units_agree

_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def same(one: Shape, other: Shape) -> bool:
    """Whether two shapes are the same answer.

    Raises:
        TooLargeError: for a number that can't be computed.
    """
    for a, b in ((one, other), (other, one)):
        if (value := _named_value(a)) is not None and not isinstance(b, Relation):
            return same(value, b)
        if isinstance(a, Quantity) and isinstance(b, Items) and isinstance(a.otherwise, Items):
            return _same_items(a.otherwise, b)
        if (product := _product(a, b)) is not None:
            return values.same_value(*product)
        if isinstance(a, Ratio) and isinstance(b, Quantity) and len(a.parts) == 2:
            return values.same_value(("/", *a.parts), b.node) and not b.percent
    if isinstance(one, Quantity) and isinstance(other, Quantity):
        return _same_quantity(one, other)
    if isinstance(one, Relation) and isinstance(other, Relation) and _same_relation(one, other):
        return True
    if isinstance(one, Interval) and isinstance(other, Interval):
        return _same_interval(one, other)
    if isinstance(one, Matrix) and isinstance(other, Matrix):
        return [len(row) for row in one.rows] == [len(row) for row in other.rows] and all(
            same(a, b)
            for row, row2 in zip(one.rows, other.rows, strict=True)
            for a, b in zip(row, row2, strict=True)
        )
    if isinstance(one, Ratio) and isinstance(other, Ratio):
        return len(one.parts) == len(other.parts) and all(
            values.same_value(("*", a, other.parts[0]), ("*", b, one.parts[0]))
            for a, b in zip(one.parts, other.parts, strict=True)
        )
    if isinstance(one, Items) and isinstance(other, Items) and _same_items(one, other):
        return True
    if isinstance(one, Based | Words) or isinstance(other, Based | Words):
        return one == other
    return _same_sets(one, other)


def _named_value(shape: Any) -> Any:
    """What a relation says that something is (5, for x = 5), or None."""
    if isinstance(shape, Relation) and shape.name is not None and shape.signs == ("=",):
        return shape.sides[-1]
    return None


def _product(one: Any, other: Any) -> tuple[Node, Node] | None:
    """A number with a unit, read as a product of variables, and the variables that it meets."""
    if not isinstance(one, Quantity) or not isinstance(one.otherwise, Quantity):
        return None
    if isinstance(other, Quantity) and other.is_plain and values.variables(other.node):
        return one.otherwise.node, other.node
    return None


def _same_quantity(one: Quantity, other: Quantity) -> bool:
    by = units_agree(one.unit, other.unit)
    percent_or_unit = (one.percent and other.unit) or (other.percent and one.unit)
    if by is None or percent_or_unit:
        return False
    if "infinity" in (one.node[0], other.node[0]):
        return one.node == other.node
    node = one.node if by == 1 else ("*", one.node, ("number", by))
    if _equal_or_rounded(node, other.node, one, other):
        return True
    hundredth = ("number", Fraction(1, 100))
    if one.percent and not other.percent:
        return _equal_or_rounded(("*", node, hundredth), other.node, one, other)
    if other.percent and not one.percent:
        return _equal_or_rounded(node, ("*", other.node, hundredth), one, other)
    return False


def _equal_or_rounded(node: Node, node2: Node, one: Quantity, other: Quantity) -> bool:
    if values.same_value(node, node2):
        return True
    for decimal, written, exact in ((one, node, node2), (other, node2, node)):
        if decimal.places is None or values.variables(exact):
            continue
        if one.places is not None and other.places is not None:
            return False  # two decimals
        number = values.exact(written)
        if number is not None and values.rounds_to(exact, number, decimal.places):
            return True
    return False


def _same_interval(one: Interval, other: Interval) -> bool:
    def ends_match(a: Any, b: Any, closed: bool, closed2: bool) -> bool:
        infinite = isinstance(a, Quantity) and a.node[0] == "infinity"
        return same(a, b) and (closed == closed2 or infinite)

    return ends_match(one.low, other.low, one.low_closed, other.low_closed) and ends_match(
        one.high, other.high, one.high_closed, other.high_closed
    )


def _same_items(one: Any, other: Any) -> bool:
    if not isinstance(one, Items) or not isinstance(other, Items):
        return False
    if len(one.items) != len(other.items):
        return False
    if (by_name := _assignments(one)) is not None and _assignments(other) is None:
        one = Items(tuple(by_name), "(")
    elif by_name is None and (by_name := _assignments(other)) is not None:
        other = Items(tuple(by_name), "(")
    if _names(one) != _names(other) and max(len(_names(one)), len(_names(other))) > 1:
        return False
    kinds = {one.kind, other.kind}
    if kinds & {"(", "["}:
        if "{" in kinds:
            return False
        return all(same(a, b) for a, b in zip(one.items, other.items, strict=True))
    if {"and", "or"} <= kinds and any(isinstance(item, Relation) for item in one.items):
        return False
    left = list(other.items)
    for item in one.items:
        match = next((at for at, b in enumerate(left) if same(item, b)), None)
        if match is None:
            return False
        del left[match]
    return True


def _names(shape: Items) -> set[str]:
    """What its items are said to be values of."""
    return {
        item.name
        for item in shape.items
        if isinstance(item, Relation) and item.name is not None and item.signs == ("=",)
    }


def _assignments(shape: Items) -> list[Any] | None:
    """The values of `x = 1, y = 2` in the order of their names, if that is what it is."""
    found = {}
    if shape.kind == "or":
        return None
    for item in shape.items:
        if not isinstance(item, Relation) or item.name is None or item.signs != ("=",):
            return None
        found[item.name] = item.sides[-1]
    return [found[name] for name in sorted(found)] if len(found) == len(shape.items) else None


def _same_relation(one: Relation, other: Relation) -> bool:
    if one.name is not None and other.name == one.name and one.signs == other.signs == ("=",):
        return same(one.sides[-1], other.sides[-1])
    if len(one.signs) != 1 or len(other.signs) != 1:
        return False
    differences = []
    for relation in (one, other):
        if not all(isinstance(side, Quantity) and side.is_plain for side in relation.sides):
            return False
        left, right = relation.sides
        differences.append(("+", left.node, ("-", right.node)))
    sign = values.proportional(*differences)
    wanted = one.signs[0] if sign > 0 else _FLIPPED.get(one.signs[0], one.signs[0])
    return sign != 0 and wanted == other.signs[0]


def _same_sets(one: Shape, other: Shape) -> bool:
    sets = []
    for shape in (one, other):
        found = real_set(shape)
        if found is None:
            return False
        sets.append(found)
    (name, parts), (name2, parts2) = sets
    if (name and name2 and name != name2) or len(parts) != len(parts2):
        return False
    left = list(parts2)
    for part in parts:
        match = next((at for at, b in enumerate(left) if _same_interval(part, b)), None)
        if match is None:
            return False
        del left[match]
    return True
