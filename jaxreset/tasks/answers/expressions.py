r"""LaTeX and plain expressions as trees: `parse("2\sqrt{x}")` is a `Node`, evaluated by `values`.

Only what has one reading is read. Two numbers side by side, an improper fraction behind an integer,
`1/xy`, `\sqrt10` and the like raise `NotUnderstoodError`: such answers are compared as text.
A node is a tuple of an operation and its arguments:

    ("number", Fraction)   ("variable", name)   ("constant", "pi" | "e" | "i")   ("infinity", ±1)
    ("+", a, b)  ("-", a)  ("*", a, b)  ("/", a, b)  ("^", a, b)  ("!", a)  ("degrees", a)
    (function, a, …): one of `lexicon.FUNCTIONS`
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from jaxreset.tasks.answers.letters import is_product, may_be_product
from jaxreset.tasks.answers.lexicon import (
    ALIASES,
    FUNCTIONS,
    GREEK,
    LEFT_TO_SYMPY,
    PLAIN_NAMES,
    SEVERAL,
    numeral,
)

Node = tuple[Any, ...]

_COMMAND = re.compile(r"\\[A-Za-z]+")
_NAME = re.compile(r"\\?([A-Za-z]+)")
_LETTERS = re.compile(r"[A-Za-z]+|[\u0370-\u03ff]")
_SUBSCRIPT = re.compile(r"\s*_\s*(?:\{\s*([0-9A-Za-z]+)\s*\}|([0-9A-Za-z]))")
_DEEPEST = 60


class NotUnderstoodError(Exception):
    """Text that isn't an expression, or that can be read in several ways."""


class LeftToSympyError(NotUnderstoodError):
    """An integral, a sum, a matrix: mathematics that this parser leaves to math-verify."""


def parse(text: str) -> Node:
    r"""The tree of a cleaned expression.

    Raises:
        NotUnderstoodError: for anything but one expression with one reading.

    >>> parse("1 1/4")
    ('number', Fraction(5, 4))
    """
    parser = _Parser(text)
    try:
        node = parser.sum()
    except RecursionError as error:
        raise NotUnderstoodError("too deep") from error
    if not parser.at_end():
        raise parser.fail()
    return node


class _Parser:
    """Recursive descent over the text itself: how much is one token depends on what asks for it."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.depth = 0
        self.bars = 0  # of | | around this place
        self.run_end = 0  # of the run of letters that is being multiplied out

    # Tokens

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def at_end(self) -> bool:
        self.skip()
        return self.at >= len(self.text)

    def next_is(self, *options: str) -> str | None:
        """Which of the options stands here; a command only as a whole."""
        self.skip()
        for option in options:
            if self.text.startswith(option, self.at):
                end = self.at + len(option)
                if (
                    option[0] == "\\"
                    and option[-1].isalpha()
                    and self.text[end : end + 1].isalpha()
                ):
                    continue
                return option
        return None

    def take(self, *options: str) -> str | None:
        found = self.next_is(*options)
        if found is not None:
            self.at += len(found)
        return found

    def expect(self, token: str) -> None:
        if self.take(token) is None:
            raise NotUnderstoodError(f"{self.text!r}: expected {token!r} at {self.at}")

    def fail(self) -> NotUnderstoodError:
        return NotUnderstoodError(f"{self.text!r} at {self.at}")

    # Grammar

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.fail()
        node = self.product()
        while (sign := self.take("+", "-")) is not None:
            other = self.product()
            node = ("+", node, other if sign == "+" else ("-", other))
        self.depth -= 1
        return node

    def product(self) -> Node:
        if (sign := self.take("-", "+")) is not None:
            node = self.product()
            return ("-", node) if sign == "-" else node
        node = self.power()
        integers = node[0] == "number"
        fraction = False  # whether a slash came before, so that what follows could belong under it
        while True:
            if self.take("**"):
                raise self.fail()
            if self.take("*", r"\cdot", r"\times") is not None:
                node = ("*", node, self.factor())
                fraction = False
            elif self.next_is("/"):
                self.take("/")
                under = self.factor()
                integers = integers and not fraction and under[0] == "number"
                node, fraction = ("/", node, under), True
            elif self.starts_factor():
                if fraction and not integers:
                    raise self.fail()
                node, fraction = ("*", node, self.power()), False
            else:
                return node

    def factor(self) -> Node:
        """A factor behind an operator, which may have a sign of its own."""
        if self.take("-") is not None:
            return ("-", self.power())
        return self.power()

    def starts_factor(self) -> bool:
        """Whether what stands here multiplies what came before without an operator."""
        self.skip()
        here = self.text[self.at : self.at + 1]
        if here == "|":
            return not self.bars
        if here in ("(", "["):
            return True
        if here == "\\":
            command = _COMMAND.match(self.text, self.at)
            return command is not None and command[0] not in (r"\rfloor", r"\rceil")
        return here.isalpha()

    def power(self) -> Node:
        node = self.atom()
        while self.take("!") is not None:
            if self.next_is("!"):
                raise self.fail()  # a double factorial
            node = ("!", node)
        if self.take("^", "**") is not None:
            node = ("^", node, self.exponent())
            if self.next_is("^"):
                raise self.fail()
        while self.take("°") is not None:
            node = ("degrees", node)
        if self.next_is("'", "_", ":"):
            raise self.fail()
        return node

    def exponent(self) -> Node:
        if self.next_is("{"):
            return self.group("{", "}")
        if self.take("-") is not None:
            return ("-", self.exponent())
        self.skip()
        here = self.text[self.at : self.at + 1]
        if here.isdigit():
            return ("number", self.numeral())
        if here.isalpha():
            self.at += 1
            return _letter(here)
        return self.atom()

    def group(self, opening: str, closing: str) -> Node:
        self.expect(opening)
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.expect(closing)
        return node

    def atom(self) -> Node:
        self.skip()
        here = self.text[self.at : self.at + 1]
        if here in ("(", "[", "{"):
            return self.group(here, {"(": ")", "[": "]", "{": "}"}[here])
        if here == "|":
            self.at += 1
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.expect("|")
            return ("abs", node)
        if here.isdigit() or here == ".":
            return self.number()
        if here == "\\":
            return self.command()
        return self.letters()

    def number(self) -> Node:
        value = self.numeral()
        if value.denominator != 1:
            return ("number", value)
        # An integer and a proper fraction side by side are a mixed number.
        before = self.at
        if self.next_is(r"\frac") and (proper := self.simple_fraction()) is not None:
            return ("number", value + proper)
        self.at = before
        self.skip()
        if self.at > before and self.text[self.at : self.at + 1].isdigit():
            over = self.numeral()
            self.expect("/")
            self.skip()
            under = self.numeral()
            if not 0 < over < under or over.denominator * under.denominator != 1:
                raise self.fail()
            return ("number", value + over / under)
        return ("number", value)

    def numeral(self) -> Fraction:
        found = numeral(self.text, self.at)
        if found is None:
            raise self.fail()
        value, self.at = found
        return value

    def simple_fraction(self) -> Fraction | None:
        r"""What a proper `\frac` of two integers is, else None (then the place is lost)."""
        self.expect(r"\frac")
        over, under = self.argument(), self.argument()
        if over[0] != "number" or under[0] != "number":
            return None
        if not 0 < over[1] < under[1] or over[1].denominator * under[1].denominator != 1:
            raise self.fail()
        return Fraction(over[1] / under[1])

    def argument(self) -> Node:
        """Of a command: a group, or one digit, letter or command."""
        self.skip()
        if self.next_is("{"):
            return self.group("{", "}")
        here = self.text[self.at : self.at + 1]
        if here.isdigit():
            self.at += 1
            return ("number", Fraction(int(here)))
        if here.isalpha():
            self.at += 1
            return _letter(here)
        if here == "\\":
            return self.command()
        raise self.fail()

    def command(self) -> Node:
        match = _COMMAND.match(self.text, self.at)
        if match is None:
            raise self.fail()
        name = match[0][1:]
        if match[0] in LEFT_TO_SYMPY:
            raise LeftToSympyError(self.text)
        self.at = match.end()
        if name == "frac":
            over = self.argument()
            return ("/", over, self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            over = self.argument()
            return ("binom", over, self.argument())
        if name == "sqrt":
            return self.root()
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.expect(rf"\r{name[1:]}")
            return (name[1:], node)
        return self.named(name)

    def root(self) -> Node:
        degree: Node = ("number", Fraction(2))
        if self.next_is("["):
            degree = self.group("[", "]")
        if self.next_is("("):
            inside = self.group("(", ")")
        else:
            inside = self.argument()
            if re.fullmatch("[0-9]{2}", self.text[self.at - 1 : self.at + 1]):
                raise self.fail()  # \sqrt10 is printed as the root of 1, and meant as that of 10
        return ("^", inside, ("/", ("number", Fraction(1)), degree))

    def named(self, name: str) -> Node:
        """A function, a constant or a Greek letter whose name has just been read."""
        name = ALIASES.get(name, name)
        if name == "pi":
            return ("constant", "pi")
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name in GREEK:
            return ("variable", self.subscripted("\\" + name))
        raise self.fail()

    def function(self, name: str) -> Node:
        base: Node | None = None
        raised: Node | None = None
        if name == "log" and self.take("_"):
            base = self.argument() if not self.next_is("{") else self.group("{", "}")
        if self.take("^") is not None:
            raised = self.exponent()
            if raised == ("-", ("number", Fraction(1))) and name in ("sin", "cos", "tan"):
                name, raised = "arc" + name, None
        if self.next_is("(") or (name in SEVERAL and self.next_is("{")):
            self.take("(", "{")
            arguments = [self.sum()]
            while name in SEVERAL and self.take(","):
                arguments.append(self.sum())
            self.expect(")" if self.text[self.at : self.at + 1] != "}" else "}")
        elif name == "abs":
            raise self.fail()
        else:
            arguments = [self.bare_argument()]
        node: Node = (name, *arguments)
        if base is not None:
            node = ("/", ("ln", *arguments), ("ln", base))
        if raised is not None:
            node = ("^", node, raised)
        return node

    def bare_argument(self) -> Node:
        r"""Of a function without parentheses: the factors behind it, up to another function."""
        node = self.power()
        while self.starts_factor() and not (self.function_ahead() or self.next_is("(", "|")):
            node = ("*", node, self.power())
        if self.next_is("/"):
            raise self.fail()
        return node

    def function_ahead(self) -> bool:
        match = _NAME.match(self.text, self.at)
        return self.at >= self.run_end and match is not None and match[1] in FUNCTIONS

    def letters(self) -> Node:
        """One letter; the others of its run are factors of their own."""
        match = _LETTERS.match(self.text, self.at)
        if match is None:
            raise self.fail()
        run = match[0]
        if self.at >= self.run_end:
            if run in PLAIN_NAMES:
                self.at = match.end()
                return self.named(run)
            # "5 no" is no product: a space behind a digit or a letter separates words.
            before = self.text[: self.at]
            apart = before.endswith(" ") and before.rstrip()[-1:].isalnum()
            if not (is_product if apart or run == self.text else may_be_product)(run):
                raise self.fail()
            self.run_end = match.end()
        self.at += 1
        if self.at == self.run_end and run[0] in "fghP" and self.text.startswith("(", self.at):
            raise self.fail()  # the value of a function, and not a product
        if self.at == self.run_end and (named := self.subscripted(run[0])) != run[0]:
            return ("variable", named)
        return _letter(run[0])

    def subscripted(self, name: str) -> str:
        match = _SUBSCRIPT.match(self.text, self.at)
        if match is None:
            return name
        self.at = match.end()
        return f"{name}_{match[1] or match[2]}"


def _letter(letter: str) -> Node:
    return ("constant", letter) if letter in ("e", "i") else ("variable", letter)
