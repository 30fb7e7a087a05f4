r"""From the text of an answer to its shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from jaxreset.tasks.answers import values
from jaxreset.tasks.answers.comparing import same
from jaxreset.tasks.answers.expressions import LeftToSympyError, NotUnderstoodError, parse
from jaxreset.tasks.answers.letters import is_product
from jaxreset.tasks.answers.shapes import (
    Based,
    Interval,
    Items,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Shape,
    Union,
    Unread,
    Words,
    as_interval,
    infinite,
)
from jaxreset.tasks.answers.text import clean, enclosed, join_comma_groups, split, squash, tokens
from jaxreset.tasks.answers.units import Tail, multiply, read_money, read_tail

_LONGEST_LIST = 100
_LONGEST_TEXT = 2000

_NAMED_BASES = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_BASED = re.compile(
    r"([0-9][0-9A-F]*|[A-F][0-9A-F]+)\s*_\s*(?:\{\s*\(?\s*([0-9]{1,2}|[a-z]+)\s*\)?\s*\}|([0-9]))"
)
_SIGNS = frozenset(("=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx"))
_SEPARATORS = frozenset((",", ";", "and", "or", "AND", "OR"))
_SETS = {r"\mathbb{R}": "real", "all real numbers": "real", "all reals": "real"}
_BELONGS = re.compile(r"(\\?[A-Za-z]+)\s*\\in(?![a-z])\s*(.+)")
_BUILDER = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:]\s*(.+)\\\}")
_MATRIX = re.compile(r"\\begin\{([pbvB]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_INFINITY = re.compile(r"([-+]?)\s*(?:\\infty|infinity|inf)", re.IGNORECASE)
_DECIMAL = re.compile(
    r"[-+]?\s*[0-9]*\.([0-9]+)(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*(-?[0-9]+)\s*\}?)?"
)
_NAME = re.compile(
    r"\\?[A-Za-z]'?(?:_\{?[0-9A-Za-z]+\}?)?|\\[a-z]+(?:_\{?[0-9A-Za-z]+\}?)?"  # x, x_1, \theta
    r"|[A-Za-z]\s*(?:\^\s*\{-1\})?\s*\([^()=]*\)"  # f(x)
    r"|(?:m\s*)?\\(?:angle|triangle|overline)\s*\{?\s*[A-Z]+\s*\}?|\|?[A-Z]{2,}\|?"  # AB
    r"|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)"  # (x, y)
    r"|[A-Za-z]{3,}(?: [A-Za-z]+){0,3}"  # total cost
)
_RATE = re.compile(r"/\s*[A-Za-z]{3}")  # $5/hour, and not 5/m
_AND_A_HALF = re.compile(r"(?<=[0-9]) and (?:a|one|1) half")
_TIME = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_WORDS = re.compile(r"[A-Za-z\u00c0-\u024f][A-Za-z\u00c0-\u024f0-9 .,'’()/&-]*")
_LABELS = re.compile(r"[A-Z](?: [A-Z])+|[A-Z](?:\s?-\s?[A-Z]){2,}")  # A B C, A-B-C: an order
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)|([A-Z])\s*[.:]")


@lru_cache(maxsize=4096)
def read(text: str) -> Shape:
    """The shape of an answer as it was written."""
    text = _AND_A_HALF.sub(" 1/2", clean(text))
    if len(text) > _LONGEST_TEXT:
        return Unread(text, mathematics=False)
    try:
        return _read(text)
    except LeftToSympyError:
        return Unread(text, mathematics=True)
    except NotUnderstoodError:
        return Unread(text, mathematics=False)


def _read(text: str) -> Shape:
    if not text:
        raise NotUnderstoodError("nothing")
    if choice := _CHOICE.fullmatch(text):
        text = choice[1] or choice[2]
    if _alone(text):
        return Words(_folded(text))
    if text in _SETS:
        return Interval(infinite(-1), infinite(1), False, False)
    if (based := _BASED.fullmatch(text)) is not None:
        return _based(text, based)
    if (matrix := _MATRIX.fullmatch(text)) is not None:
        rows = matrix[2].split(r"\\")
        return Matrix(
            tuple(tuple(read(cell) for cell in row.split("&")) for row in rows if row.strip())
        )
    for reader in (
        _builder,
        _membership,
        _list,
        _relation,
        _union,
        _bracketed,
        _plus_minus,
        _ratio,
    ):
        if (shape := reader(text)) is not None:
            return shape
    return _quantity(text)


# Readers: a shape, or None for what is none of theirs


def _builder(text: str) -> Shape | None:
    match = _BUILDER.fullmatch(text)
    return None if match is None else _read(match[2].strip())


def _membership(text: str) -> Shape | None:
    match = _BELONGS.fullmatch(text)
    if match is None:
        return None
    shape = _read(match[2])
    return as_interval(shape) or shape


def _list(text: str) -> Shape | None:
    joined = join_comma_groups(text)
    parts, cuts = split(joined, _SEPARATORS)
    if not cuts:
        if joined == text:
            return None
        shape = _read(joined)
        if isinstance(shape, Quantity) and shape.unit is None and ",0" not in text:
            return shape._replace(otherwise=_items(text.split(","), [","]))
        return shape
    return _items(parts, cuts)


def _items(parts: list[str], cuts: Sequence[str]) -> Shape:
    kind = next((cut.lower() for cut in cuts if cut.isalpha()), ",")
    parts = [part for part in parts if part]  # "1, 2, and 3" has an empty one
    if not 0 < len(parts) <= _LONGEST_LIST:
        raise NotUnderstoodError(parts)
    items: list[Shape] = []
    name = None
    for part in parts:
        shape = read(part)
        if isinstance(shape, Relation) and shape.name is not None and shape.signs == ("=",):
            name = shape.name if not items else name
        if isinstance(shape, Items) and shape.kind == "pm":
            items += shape.items
        else:
            items.append(shape)
    if len(items) == 1:
        return items[0]
    # x = 1, 2 and x = 1 or x = 2 are both 1, 2.
    first, *others = items
    if name is not None and isinstance(first, Relation):
        bare = [x.sides[-1] if isinstance(x, Relation) and x.name == name else x for x in others]
        if not any(isinstance(x, Relation) for x in bare):
            items = [first.sides[-1], *bare]
    return Items(tuple(items), kind)


def _relation(text: str) -> Shape | None:
    parts, cuts = split(text, _SIGNS)
    if not cuts:
        return None
    if len(parts) == 2 and not parts[0] and cuts == [r"\approx"]:
        return _read(parts[1])
    if not all(parts):
        raise NotUnderstoodError(text)
    name = None
    if _NAME.fullmatch(parts[0]) and cuts[0] in ("=", r"\approx"):
        name = squash(parts[0])
    elif re.fullmatch(r"\\?[A-Za-z]", parts[-1]) and cuts == ["="]:
        name, parts = parts[-1], parts[::-1]  # 5 = x
    sides = [_side(part, named=at == 0 and name is not None) for at, part in enumerate(parts)]
    if all(cut in ("=", r"\approx") for cut in cuts):
        # What is approximated is the answer; what is named, or computed in steps, is its last side.
        while len(cuts) > 0 and cuts[-1] == r"\approx" and not (name and len(cuts) == 1):
            sides.pop(), cuts.pop()
        cuts = ["="] * len(cuts)
        known = sides[1:] if name is not None else sides
        if len(known) > 1 and all(same(a, known[-1]) for a in known[:-1]):
            sides, cuts = ([*sides[:1], known[-1]], ["="]) if name else ([known[-1]], [])
        if not cuts:
            return sides[0]
        if len(cuts) > 1:
            raise NotUnderstoodError(text)
    return Relation(tuple(sides), tuple(cuts), name)


def _side(text: str, *, named: bool) -> Shape:
    shape = read(text)
    if named and isinstance(shape, Unread):
        return Words(squash(text))
    if isinstance(shape, Unread):
        raise LeftToSympyError(text) if shape.mathematics else NotUnderstoodError(text)
    return shape


def _union(text: str) -> Shape | None:
    parts, cuts = split(text, frozenset((r"\cup", "U")))
    if not cuts or not all(parts):
        return None
    shapes = [read(part) for part in parts]
    found: list[Shape] = []
    for shape in shapes:
        interval = as_interval(shape)
        if isinstance(shape, Items) and shape.kind == "{":
            found += [Interval(item, item, True, True) for item in shape.items]
        elif interval is not None:
            found.append(interval)
        else:
            raise NotUnderstoodError(text)
    return Union(tuple(found))


def _bracketed(text: str) -> Shape | None:
    if (brackets := enclosed(text)) is None:
        return None
    opening, inside, closing = brackets
    if opening == "{" and closing == "}":
        return _read(inside)
    if opening == r"\{" and closing == r"\}":
        if not inside:
            return Items((), "{")
        shape = _items(*split(inside, _SEPARATORS))
        listed = shape.items if isinstance(shape, Items) and shape.kind not in "({" else (shape,)
        return Items(_distinct(listed), "{")
    if opening not in "([" or closing not in ")]":
        return None
    parts, cuts = split(inside, frozenset((",", ";")))
    if not cuts:
        return _read(inside) if (opening, closing) == ("(", ")") else None
    if not all(parts) or len(parts) > _LONGEST_LIST:
        raise NotUnderstoodError(text)
    items = tuple(read(part) for part in parts)
    if len(items) == 2 and (opening, closing) != ("(", ")"):
        return Interval(*items, opening == "[", closing == "]")
    return Items(items, "(") if opening == "(" or closing == "]" else None


def _plus_minus(text: str) -> Shape | None:
    if r"\pm" not in text and r"\mp" not in text:
        return None
    signs = [(token.start, token.end) for token in tokens(text) if token.text == r"\pm"]
    if len(signs) != 1 or r"\mp" in text:
        raise NotUnderstoodError(text)
    start, end = signs[0]
    both = [_read(f"{text[:start]}{sign} {text[end:].strip()}".strip()) for sign in "+-"]
    return Items(tuple(both), "pm")


def _ratio(text: str) -> Shape | None:
    parts, cuts = split(text, frozenset((":",)))
    if not cuts:
        return None
    if _TIME.fullmatch(text):
        raise NotUnderstoodError(text)
    return Ratio(tuple(parse(part) for part in parts))


def _quantity(text: str) -> Shape:
    if (infinity := _INFINITY.fullmatch(text)) is not None:
        return infinite(-1 if infinity[1] == "-" else 1)
    body, money = read_money(text)
    places = None
    percent, unit = False, money
    tail_start, tail = _find_tail(body)
    if tail is not None:
        body, percent, unit = body[:tail_start].rstrip(), tail.percent, multiply(money, tail.unit)
        if unit is None and money is not None:
            raise NotUnderstoodError(text)
    if (decimal := _DECIMAL.fullmatch(body)) is not None:
        places = len(decimal[1]) - int(decimal[2] or 0) + (2 if percent else 0)
    node = parse(body)
    if tail is not None and tail.power != 1:
        node = ("^", node, ("number", Fraction(tail.power)))
    if tail is not None and tail.factor != 1:
        node, places = ("*", node, ("number", tail.factor)), None
    return Quantity(node, percent, unit, places, _as_product(text) if tail is not None else None)


def _as_product(text: str) -> Quantity | None:
    """A number with a unit read as a product: 2 m may be two times m."""
    try:
        node = parse(text)
    except NotUnderstoodError:
        return None
    return Quantity(node) if values.variables(node) else None


def _find_tail(text: str) -> tuple[int, Tail | None]:
    """Where the unit begins that ends `text`, and what it says; (0, None) without one."""
    if text[-1:].isdigit() and "^" not in text and "/" not in text:
        return 0, None
    found = [token for token in tokens(text) if token.depth == 0]
    trigonometric = any(token.text in (r"\sin", r"\cos", r"\tan", "sin", "cos") for token in found)
    for token in found:
        body = text[: token.start].rstrip()
        begins = token.text[0].isalpha() or token.text in "°%Ω$¢€£¥₹₩₽₱^"
        if not body or not (begins or _RATE.match(text, token.start)):
            continue
        if token.text == "°" and trigonometric:
            continue
        attached = body == text[: token.start]
        before = body[-1]
        if not (before.isalnum() or before in ")}|.!]"):
            continue
        if not any(c.isdigit() or c == "\\" for c in body) and (attached or len(token.text) < 2):
            continue
        tail = read_tail(text[token.start :], attached=attached)
        if tail is not None:
            return token.start, tail
    return 0, None


def _based(text: str, match: re.Match[str]) -> Shape:
    written = match[2] or match[3]
    base = _NAMED_BASES.index(written) + 2 if written in _NAMED_BASES else 0
    base = base or (int(written) if written.isdigit() else 0)
    digits = match[1].lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        raise NotUnderstoodError(text)
    if base == 10:
        return Quantity(parse(digits))
    return Based(digits, base)


def _alone(text: str) -> bool:
    """Whether this is words: letters that are no product, no number's name, and no unit's number."""
    if _LABELS.fullmatch(text):
        return True
    if not _WORDS.fullmatch(text):
        return False
    runs = re.findall(r"[A-Za-z\u00c0-\u024f]+", text)
    if any(character.isdigit() or character in ",()/&-" for character in text):
        return False
    lone = {"and", "or", "pi", "sqrt", "infinity", "inf", "infty"}
    return not all(is_product(run) for run in runs) and not lone & {run.lower() for run in runs}


def _folded(text: str) -> str:
    return " ".join(text.casefold().strip(" .,'").split())


def _distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    kept: list[Any] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


_PLAIN = re.compile(
    r"[-+]?\s*(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
)
_LONGEST_NUMBER = 200


def plain_parts(text: str) -> tuple[str, bool] | None:
    """The digits of a text that is one plain number, and whether it is a percentage, or None."""
    text = clean(text)
    if len(text) > _LONGEST_NUMBER:
        return None
    body, _ = read_money(text)
    start, tail = _find_tail(body)
    if tail is not None:
        if tail.factor != 1 or tail.power != 1:
            return None
        body = body[:start].rstrip()
    if not _PLAIN.fullmatch(body):
        return None
    return body.replace(",", "").replace(" ", ""), tail is not None and tail.percent
