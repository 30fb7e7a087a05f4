r"""What stands beside a number: a unit, which is dropped, or a word that changes it, which is not.

A number without a unit is compared with one that has a unit by their values, for a gold answer often
leaves the unit to the question. Where both have one, the units must agree, or convert (`5 km` is
`5000 m` and never `5 m`).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from jaxreset.tasks.answers.letters import is_product

_F = Fraction


class Unit(NamedTuple):
    """A product of powers of base units, times a scale: km/h is (1000 / 3600, m: 1, s: -1)."""

    scale: Fraction
    powers: tuple[tuple[str, int], ...]


class Tail(NamedTuple):
    """What follows a number: factors, a power (`squared`), a percent sign, a unit."""

    factor: Fraction = _F(1)
    power: int = 1
    percent: bool = False
    unit: Unit | None = None


# Single capitals are no units, but for L: 5 K may be five thousand, and 5 A a choice.
def _table() -> dict[str, tuple[Fraction, str]]:
    rows: dict[str, tuple[str, int | Fraction]] = {
        "m meter metre": ("m", 1),
        "km kilometer kilometre": ("m", 1000),
        "μm micrometer micrometre": ("m", _F(1, 10**6)),
        "nm nanometer nanometre": ("m", _F(1, 10**9)),
        "dm decimeter decimetre": ("m", _F(1, 10)),
        "cm centimeter centimetre": ("m", _F(1, 100)),
        "mm millimeter millimetre": ("m", _F(1, 1000)),
        "in inch inches": ("in", 1),
        "ft foot feet": ("in", 12),
        "yd yard": ("in", 36),
        "mi mile": ("in", 63360),
        "g gram gramme gm": ("g", 1),
        "kg kilogram kilo": ("g", 1000),
        "mg milligram": ("g", _F(1, 1000)),
        "tonne ton": ("ton", 1),
        "oz ounce": ("oz", 1),
        "lb lbs pound": ("oz", 16),
        "s sec secs second": ("s", 1),
        "ms millisecond": ("s", _F(1, 1000)),
        "min mins minute": ("s", 60),
        "h hr hrs hour": ("s", 3600),
        "day": ("s", 86400),
        "week": ("s", 604800),
        "month": ("month", 1),
        "yr yrs year": ("month", 12),
        "l L liter litre": ("l", 1),
        "ml mL milliliter millilitre": ("l", _F(1, 1000)),
        "cl cL centiliter centilitre": ("l", _F(1, 100)),
        "cup": ("cup", 1),
        "pint": ("cup", 2),
        "quart": ("cup", 4),
        "gal gallon": ("cup", 16),
        "$ usd USD dollar buck": ("dollar", 1),
        "¢ cent": ("dollar", _F(1, 100)),
        "€ eur EUR euro": ("euro", 1),
        "£ gbp GBP": ("pound sterling", 1),
        "¥ jpy JPY yen yuan": ("yen", 1),
        "₹ Rs rs INR rupee": ("rupee", 1),
        "₩ KRW won": ("won", 1),
        "₽ RUB ruble rouble": ("ruble", 1),
        "₱ peso": ("peso", 1),
        "CHF franc": ("franc", 1),
        "° deg degree": ("degree", 1),
        "°C celsius": ("celsius", 1),
        "°F fahrenheit": ("fahrenheit", 1),
        "rad radian": ("radian", 1),
        "newton": ("newton", 1),
        "joule": ("joule", 1),
        "kJ": ("joule", 1000),
        "watt": ("watt", 1),
        "kW": ("watt", 1000),
        "volt": ("volt", 1),
        "ampere amp": ("ampere", 1),
        "kelvin": ("kelvin", 1),
        "Ω ohm": ("ohm", 1),
        "kWh": ("joule", 3_600_000),
        "Hz hertz": ("hertz", 1),
        "Pa pascal": ("pascal", 1),
        "mol mole": ("mole", 1),
        "unit": ("unit", 1),
        "people person": ("person", 1),
        "men man": ("man", 1),
        "women woman": ("woman", 1),
        "children child": ("child", 1),
    }
    return {
        name: (_F(scale), base) for names, (base, scale) in rows.items() for name in names.split()
    }


_UNITS = _table()
_COMPOUND = {"mph": "mile / hour", "kmh": "km / hour", "kph": "km / hour", "kmph": "km / hour"}
_COMPOUND |= {"sqft": "square ft", "cc": "cubic cm", "fps": "ft / second"}
# Short ones that may follow a digit without a space; 5m and 5ab are products.
_ATTACHED = frozenset(
    (
        *("cm", "mm", "km", "kg", "mg", "ml", "mL", "cl", "cL", "kJ", "kW", "Hz", "ft", "lb"),
        *("oz", "lbs", "mph", "kph"),
    )
)

_FACTORS = {
    "hundred": _F(100),
    "thousand": _F(1000),
    "million": _F(10**6),
    "billion": _F(10**9),
    "trillion": _F(10**12),
    "dozen": _F(12),
    "half": _F(1, 2),
    "halve": _F(1, 2),
    "third": _F(1, 3),
    "quarter": _F(1, 4),
    "fourth": _F(1, 4),
    "fifth": _F(1, 5),
    "sixth": _F(1, 6),
    "seventh": _F(1, 7),
    "eighth": _F(1, 8),
    "ninth": _F(1, 9),
    "tenth": _F(1, 10),
    "hundredth": _F(1, 100),
    "thousandth": _F(1, 1000),
    "millionth": _F(1, 10**6),
}
_POWERS = {"squared": 2, "cubed": 3}
_PERCENT = frozenset(("%", "percent", "percents", "percentage", "pct"))

# Other words that make something else of a number. What isn't here is a noun: `5 clips` is 5.
_NOT_UNITS = re.compile(
    r"""(?: (?:zillion | lakh | crore | score | gross | grand | myriad | googol | bn | mn
    | zero | one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
    | (?:thir|four|fif|six|seven|eigh|nine)teen | (?:twen|thir|for|fif|six|seven|eigh|nine)ty
    | double | twice | thrice | triple | quadruple | time | halved | doubled | tripled | factorial
    | plus | minus | negative | positive | over | under | above | below | divided | divide
    | multiplied | multiply | product | sum | difference | quotient | ratio | proportion
    | inverse | reciprocal | opposite | root | power | exponent | remainder | modulo | mod | choose
    | base | binary | octal | hexadecimal | hex | than | least | most | less | more | fewer
    | not | no | non | never | except | without | approximately | about | around | nearly | almost
    | and | or | but | xor | if | when | where | either | neither | nor | to | through | between
    | from | until | by | of | with | for | is | are | was | equal | wait | actually | instead
    | infinity | infinite | pi | sqrt | sin | cos | tan | sec | csc | cot | log | ln | exp | max
    | min | gcd | lcm | am | pm | noon | midnight | bc | ad | permille | basis | point | ppm | squared
    | cubed | th | st | nd | rd)s?
    | [a-z]*(?:illion|illionth|[a-z]fold|tuple)s? | [a-z-]*(?:teenth|tieth|elfth|eventh)s?)""",
    re.VERBOSE | re.IGNORECASE,
)
_DELIMITED = re.compile(
    r"[A-Za-z]+(?:-[A-Za-z]+)*|°\s?[CF](?![A-Za-z])|μm|[°%Ω$¢€£¥₹₩₽₱/.*-]|\\cdot|\s+"
)
_POWER = re.compile(r"\s*\^\s*(?:\{\s*(-?[1-9])\s*\}|([1-9]))")
_ORDINAL = re.compile(r"\s*(?:\^\s*)?\{?\s*(?:th|st|nd|rd)\s*\}?")

_MONEY = re.compile(
    r"\s*(?:(?:USD?|AU?|CA?|NZ|HK|S)?\s*(?P<dollar>\$)|(?P<sign>[€£¥₹₩₽₱])"
    r"|(?P<code>USD|EUR|GBP|INR|JPY|CHF|Rs\.?)(?![A-Za-z]))\s*"
)


def read_money(text: str) -> tuple[str, Unit | None]:
    """`text` without the currency in front of it (behind its sign), and that currency.

    >>> read_money("-US$5")[0]
    '-5'
    """
    sign = text[:1] if text[:1] in ("-", "+") else ""
    match = _MONEY.match(text, len(sign))
    if match is None or not (rest := text[match.end() :]):
        return text, None
    if sign and rest[0] in "+-":
        return text, None
    name = "$" if match["dollar"] else (match["sign"] or match["code"]).rstrip(".")
    return sign + rest, _named(name)


def read_tail(text: str, *, attached: bool) -> Tail | None:
    r"""What `text`, which follows a number, says of it; None where it is no tail at all.

    Args:
        text: cleaned, not empty.
        attached: whether nothing separates it from the number, as in `5cm`.

    >>> read_tail("million dollars", attached=False).factor
    Fraction(1000000, 1)
    """
    if _ORDINAL.fullmatch(text):
        return Tail() if attached else None
    factor, power, percent = _F(1), 1, False
    words = _words(text)
    if not words or (attached and not _may_attach(words[0][0])):
        return None
    at = 0
    while at < len(words) and words[at][1] == 1 and (by := _factor(words[at][0])) is not None:
        factor, at = factor * by, at + 1
    if at == 0 and words[0][1] == 1 and words[0][0] in _POWERS:
        power, at = _POWERS[words[0][0]], 1
    if at < len(words) and words[at][0] in _PERCENT:
        percent, at = True, at + 1
    if at == len(words):
        return Tail(factor, power, percent)
    unit = None if percent else _unit(words[at:])
    return None if unit is None else Tail(factor, power, percent, unit)


def multiply(one: Unit | None, other: Unit | None) -> Unit | None:
    """The unit of a price such as `$5 per hour`; None where both are there and no rate is meant."""
    if one is None or other is None:
        return one or other
    if any(power > 0 for _, power in other.powers):
        return one if units_agree(one, other) is not None else None
    return Unit(
        one.scale * other.scale, tuple(sorted({**dict(one.powers), **dict(other.powers)}.items()))
    )


def units_agree(one: Unit | None, other: Unit | None) -> Fraction | None:
    """What turns the first one's numbers into the other's; None where the units differ."""
    if one is None or other is None or _ANY in (*one.powers, *other.powers):
        return _F(1)
    if one.powers == other.powers:
        return one.scale / other.scale
    names, others = ({base for base, _ in unit.powers} for unit in (one, other))
    if len(names | others) == 2 and "degree" in names | others and names | others <= _DEGREES:
        return _F(1)
    # Nouns, which nobody can list: 5 clips are 5 paper clips, and no 5 cups.
    nouns = not (names | others) & _BASES
    return _F(1) if nouns and (names <= others or others <= names) else None


_ANY = ("unit", 1)
_DEGREES = {"degree", "celsius", "fahrenheit"}
_BASES = {base for _, base in _UNITS.values()}


def _named(name: str) -> Unit:
    scale, base = _UNITS[name]
    return Unit(scale, ((base, 1),))


def _known(word: str) -> tuple[Fraction, str] | None:
    for name in (word, word.lower()) if len(word) > 1 else (word,):
        if name in _UNITS:
            return _UNITS[name]
        if len(name) > 3 and name.endswith("s") and (found := _UNITS.get(name[:-1])):
            return found
    return None


def _factor(word: str) -> Fraction | None:
    word = word.lower()
    return _FACTORS.get(word, _FACTORS.get(word.removesuffix("s")))


def _may_attach(word: str) -> bool:
    if word in _ATTACHED or not word[0].isalpha():
        return True
    return len(word) > 2 and not is_product(word)


def _words(text: str) -> list[tuple[str, int]] | None:
    """The words and signs of `text` with their powers; None if it holds anything else."""
    found: list[tuple[str, int]] = []
    at = 0
    while at < len(text):
        if (match := _DELIMITED.match(text, at)) is None:
            return None
        word, at = match[0].replace(" ", ""), match.end()
        power = 1
        if raised := _POWER.match(text, at):
            power, at = int(raised[1] or raised[2]), raised.end()
        if word and word not in (".", "-", "*", r"\cdot"):
            found.append((word, power))
        elif power != 1 or (word and not found):
            return None
    return found


def _unit(words: list[tuple[str, int]]) -> Unit | None:
    """The unit that words spell, or None where one of them is no unit and no noun."""
    scale, powers = _F(1), dict[str, int]()
    side, raised, last = 1, 1, ""
    for word, power in words:
        low = word.lower()
        if word == "/" or low == "per" or (low in ("an", "a") and last):
            side = -1
        elif word == "US":
            continue
        elif low in ("square", "sq", "cubic", "cu"):
            raised = 2 if low.startswith("sq") else 3
        elif low in _POWERS and last:
            powers[last] *= _POWERS[low]
        elif low == "of" and last:
            continue
        elif low in _COMPOUND:
            inner = _unit([(name, 1) for name in _COMPOUND[low].split()])
            assert inner is not None
            scale *= inner.scale
            powers |= dict(inner.powers)
            last = "compound"
        elif (known := _known(word)) is not None:
            scale *= known[0] ** (side * raised * power)
            last = known[1]
            powers[last] = powers.get(last, 0) + side * raised * power
            raised = 1
        elif _is_noun(low) and power == 1:
            last = low.removesuffix("s")
            powers[last] = side * raised
            raised = 1
        else:
            return None
    if raised != 1:
        return None
    return Unit(scale, tuple(sorted(powers.items()))) if powers else None


def _is_noun(word: str) -> bool:
    if len(word) < 3 or is_product(word):
        return False
    parts = word.split("-")
    return not any(_NOT_UNITS.fullmatch(part) or _factor(part) is not None for part in parts)
