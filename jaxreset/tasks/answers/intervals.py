"""Inequalities, pairs and unions as sets of real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from jaxreset.tasks.answers import values
from jaxreset.tasks.answers.evaluation import UndefinedError
from jaxreset.tasks.answers.expressions import Node
from jaxreset.tasks.answers.shapes import (
    Interval,
    Items,
    Quantity,
    Relation,
    Union,
    as_interval,
    infinite,
)


def real_set(shape: Any) -> tuple[str | None, tuple[Interval, ...]] | None:
    """The name of the variable, if any, and the intervals of the reals that a shape describes."""
    if (interval := as_interval(shape)) is not None:
        return None, (interval,)
    if isinstance(shape, Union):
        return None, shape.parts
    if isinstance(shape, Relation):
        return _solved(shape)
    if isinstance(shape, Items) and shape.kind in ("and", "or"):
        found = [_solved(item) if isinstance(item, Relation) else None for item in shape.items]
        solved = [one for one in found if one is not None]
        if len(solved) < len(found) or len({name for name, _ in solved}) != 1:
            return None
        name = solved[0][0]
        if shape.kind == "or":
            return name, tuple(part for _, parts in solved for part in parts)
        if any(len(parts) != 1 for _, parts in solved):
            return None
        both = _intersection([parts[0] for _, parts in solved])
        return None if both is None else (name, (both,))
    return None


def _solved(relation: Relation) -> tuple[str, tuple[Interval, ...]] | None:
    """An inequality in one variable that occurs linearly, as intervals."""
    sides, signs = relation.sides, relation.signs
    if "=" in signs or not all(
        isinstance(side, Quantity) and (side.is_plain or side.node[0] == "infinity")
        for side in sides
    ):
        return None
    names = frozenset().union(*(values.variables(side.node) for side in sides))
    if len(names) != 1:
        return None
    rays = []
    for left, sign, right in zip(sides, signs, sides[1:], strict=False):
        if not values.variables(left.node) | values.variables(right.node):
            return None
        root = _root(left.node, right.node, *names)
        if root is None:
            return None
        at, rising = root
        end = Quantity(at)
        if sign == r"\ne":
            if len(signs) > 1:
                return None
            pairs = (infinite(-1), end), (end, infinite(1))
            return (*names,)[0], tuple(Interval(*ends, False, False) for ends in pairs)
        below = (sign in ("<", r"\le")) == rising
        closed = sign in (r"\le", r"\ge")
        rays.append(
            Interval(infinite(-1), end, False, closed)
            if below
            else Interval(end, infinite(1), closed, False)
        )
    both = _intersection(rays)
    return None if both is None else ((*names,)[0], (both,))


def _root(left: Node, right: Node, name: str) -> tuple[Node, bool] | None:
    """Where two sides meet, and whether left - right rises there; None unless they are linear."""
    variable = ("variable", name)
    if left == variable and name not in values.variables(right):
        return right, True
    if right == variable and name not in values.variables(left):
        return left, False
    difference = ("+", left, ("-", right))
    points = [Fraction(x, 7) for x in (0, 7, 14, -21, 24, -65)]
    heights = [values.exact_at(difference, name, x) for x in points]
    start, one = heights[:2]
    if start is None or one is None or start == one:
        return None
    slope = one - start
    if any(y != start + slope * x for x, y in zip(points, heights, strict=True)):
        return None
    return ("number", -start / slope), slope > 0


def _intersection(rays: Sequence[Interval]) -> Interval | None:
    try:
        low, low_closed = rays[0].low, rays[0].low_closed
        high, high_closed = rays[0].high, rays[0].high_closed
        for ray in rays[1:]:
            order = values.compare(ray.low.node, low.node)
            if order > 0 or (order == 0 and not ray.low_closed):
                low, low_closed = ray.low, ray.low_closed
            order = values.compare(ray.high.node, high.node)
            if order < 0 or (order == 0 and not ray.high_closed):
                high, high_closed = ray.high, ray.high_closed
        if values.compare(low.node, high.node) >= 0:
            return None
    except UndefinedError:
        return None
    return Interval(low, high, low_closed, high_closed)
