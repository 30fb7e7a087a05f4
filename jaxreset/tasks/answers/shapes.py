"""What an answer is: a number with a unit, a list, a point, a set, an interval, a relation, words."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreset.tasks.answers.expressions import Node
from jaxreset.tasks.answers.units import Unit


class Quantity(NamedTuple):
    """An expression, what it is measured in, and what its way of writing says."""

    node: Node
    percent: bool = False
    unit: Unit | None = None
    places: int | None = None  # decimals, where it is one decimal number
    otherwise: Any = None  # another reading: of `100,200` as two numbers, of `2 m` as a product

    @property
    def is_plain(self) -> bool:
        """Whether it is a finite expression and nothing else."""
        return not self.percent and self.unit is None and self.node[0] != "infinity"


class Based(NamedTuple):
    """Digits in a base: 1011_2. They equal the same digits in the same base, and no value."""

    digits: str
    base: int


class Words(NamedTuple):
    """Text, without case and punctuation around it."""

    text: str


class Items(NamedTuple):
    """Several answers. `kind`: "," "and" "or" for lists, "{" for sets, "(" "[" for what is ordered."""

    items: tuple[Any, ...]
    kind: str


class Interval(NamedTuple):
    """A stretch of the real line."""

    low: Any
    high: Any
    low_closed: bool
    high_closed: bool


class Union(NamedTuple):
    """Intervals and sets, joined."""

    parts: tuple[Any, ...]


class Relation(NamedTuple):
    """Sides and what stands between them: `1 < x \\le 2` has three sides."""

    sides: tuple[Any, ...]
    signs: tuple[str, ...]
    name: str | None = None  # of what the first side names: x, f(x), AB


class Ratio(NamedTuple):
    """3:4, or 1:2:3."""

    parts: tuple[Node, ...]


class Matrix(NamedTuple):
    """Rows of answers."""

    rows: tuple[tuple[Any, ...], ...]


class Unread(NamedTuple):
    """What is none of these; `mathematics` where math-verify may understand it."""

    text: str
    mathematics: bool


Shape = Quantity | Based | Words | Items | Interval | Union | Relation | Ratio | Matrix | Unread


def infinite(sign: int) -> Quantity:
    """Infinity, or minus infinity."""
    return Quantity(("infinity", sign))


def as_interval(shape: Any) -> Interval | None:
    """A shape that is an interval, or a pair that may be meant as an open one."""
    if isinstance(shape, Interval):
        return shape
    if isinstance(shape, Items) and shape.kind == "(" and len(shape.items) == 2:
        return Interval(*shape.items, False, False)
    return None
