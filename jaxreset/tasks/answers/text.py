r"""One spelling for what is written in many: characters, LaTeX commands, markdown, spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉]")
_ROOT = re.compile(r"([√∛∜])\s*(?:([0-9]+(?:\.[0-9]+)?|[A-Za-zπ])|(?=[({]))")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

# A dash that is longer than a minus sign between two numbers: from the one to the other.
_RANGE = re.compile(r"(?<=[0-9])\s*[\u2013\u2014]\s*(?=[0-9])")

_GLYPHS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u3000\t\n\r", " "),
        **dict.fromkeys("\u2009\u202f\u200a\u2006", r"\,"),
        **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060\u00ad", ""),
        **dict.fromkeys("×✕✖⨯", r"\times "),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **dict.fromkeys("≤⩽≦", r"\le "),
        **dict.fromkeys("≥⩾≧", r"\ge "),
        **dict.fromkeys("“”„″", '"'),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("∅⌀", r"\emptyset "),
        **dict.fromkeys("º˚", "°"),
        **dict.fromkeys("⁄∕", "/"),
        "÷": "/",
        "∞": r"\infty ",
        "π": r"\pi ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "∈": r"\in ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "ℝ": r"\mathbb{R}",
        "∠": r"\angle ",
        "⟨": "(",
        "⟩": ")",
    }
)

_MATH_MODE = re.compile(
    r"\$\$(?P<display>[^$]*)\$\$|\$(?P<dollars>(?:[^$\\]|\\.)*)\$"
    r"|\\\((?P<parens>.*)\\\)|\\\[(?P<brackets>.*)\\\]",
    re.DOTALL,
)
_MARKED = re.compile(r"(\*\*\*|\*\*|__|```|``|`|\"|\*|')(?P<inner>.+)\1")
# The delimiters of math mode inside a text; `\\(` is a line break and a parenthesis.
_INLINE_MODE = re.compile(r"(?<!\\)\\[()\[\]]")
_DOLLAR = re.compile(r"(?<!\\)\$")

# Commands that change how something looks and not what it is; then those that are written out.
_LOOKS = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|scriptstyle|limits"
    r"|nolimits|rm|bf|it)(?![A-Za-z])\.?|\\!"
)
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|hspace\{[^{}]*\})(?![A-Za-z])")
_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|texttt|textnormal|mathrm|mathbf|mathit|mathsf|boldsymbol"
    r"|mbox|operatorname\*?|boxed|fbox|emph|mathbb(?!\{[A-Z]\}))\s*\{([^{}]*)\}"
)
_SAME_COMMAND = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|not\s*=)|(?<=\s)!=(?=\s)"), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:simeq|approxeq)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\prime(?![A-Za-z])"), "'"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:langle)(?![A-Za-z])"), "("),
    (re.compile(r"\\(?:rangle)(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:div)(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])"), "£"),
    (re.compile(r"\\(?:euro|texteuro)(?![A-Za-z])"), "€"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\&"), "&"),
    (re.compile(r"\\#"), "#"),
)

# Three digits behind a thin space or a comma in braces, and what SI writes: 12 345 678.
_THIN_GROUP = re.compile(r"(?<=[0-9])(?:\\[,;]|\\!|\{,\}(?:\\!)?|,\\!)(?=[0-9]{3}(?![0-9]))")
_SPACED_GROUP = re.compile(
    r"(?<![0-9.,/^_] )(?<![0-9.,/^_{])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])(?!\s*[/{]|\s[0-9])"
)
_COMMA_GROUP = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_DIGITS_AND_COMMAS = re.compile(r"(?<![0-9.])[0-9][0-9,]*[0-9]")

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)
_OPENING = frozenset(("(", "[", "{", r"\{", r"\lfloor", r"\lceil"))
_CLOSING = frozenset((")", "]", "}", r"\}", r"\rfloor", r"\rceil"))
# Those in which a comma separates; braces only group.
_LISTING, _LISTED = frozenset(("(", "[", r"\{")), frozenset((")", "]", r"\}"))


class Token(NamedTuple):
    """A letter run, a command or one character, and how many brackets of any kind enclose it."""

    text: str
    start: int
    end: int
    depth: int


def clean(text: str) -> str:
    r"""`text` in plain LaTeX: no math mode, fonts, sizes, markdown, or spacing commands.

    Digits that a space separates stay apart, unless they are groups of three (`12 345`, `1\,234`);
    grouping commas are left to `join_comma_groups`. A dollar sign is left only where it is money.
    """
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = _RANGE.sub(" to ", text)
    text = _ROOT.sub(lambda m: _ROOTS[m[1]] + (f"{{{m[2]}}}" if m[2] else ""), text)
    text = unicodedata.normalize("NFKC", text.translate(_GLYPHS)).strip()
    text = _unwrapped(text)
    if len(_DOLLAR.findall(text)) > 1:
        text = _DOLLAR.sub("", text)
    text = _INLINE_MODE.sub(" ", text).replace(r"\$", "$")
    text = _SPACED_GROUP.sub(lambda m: m[0].replace(" ", ""), _THIN_GROUP.sub("", text))
    text = _SPACES.sub(" ", _LOOKS.sub("", text)).replace("{,}", ",")
    previous = None
    while previous != text:
        previous, text = text, _TEXT.sub(r" \1 ", text)
    for pattern, plain in _SAME_COMMAND:
        text = pattern.sub(plain, text)
    text = " ".join(text.split())
    while text.endswith((".", ",", ";", ":")) and not text.endswith(".."):
        text = text[:-1].rstrip()
    return _unwrapped(text)


def join_comma_groups(text: str) -> str:
    """`text` without the commas of numbers in groups of three, outside of parentheses and sets.

    >>> join_comma_groups("1,234,567, (1,234), 12,34")
    '1234567, (1,234), 12,34'
    """
    if "," not in text:
        return text
    inside, depth = [0] * len(text), 0
    for token in tokens(text):
        depth += (token.text in _LISTING) - (token.text in _LISTED)
        inside[token.start] = depth
    return _DIGITS_AND_COMMAS.sub(
        lambda m: (
            m[0].replace(",", "")
            if _COMMA_GROUP.fullmatch(m[0]) and not inside[m.start()]
            else m[0]
        ),
        text,
    )


def squash(text: str) -> str:
    """Cleaned `text` without spaces, but for those between letters or numbers."""
    return re.sub(r"(?<![A-Za-z0-9.]) | (?![A-Za-z0-9.])", "", text)


def tokens(text: str) -> Iterator[Token]:
    """The tokens of a cleaned text; brackets have the depth of what stands around them."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _CLOSING:
            depth -= 1
        yield Token(token, match.start(), match.end(), depth)
        if token in _OPENING:
            depth += 1


def split(text: str, separators: frozenset[str]) -> tuple[list[str], list[str]]:
    """`text` cut at the separators outside of all brackets: the parts, and the cuts."""
    parts, cuts, begin = [], [], 0
    for token in tokens(text):
        if token.depth == 0 and token.text in separators:
            parts.append(text[begin : token.start].strip())
            cuts.append(token.text)
            begin = token.end
    return [*parts, text[begin:].strip()], cuts


def enclosed(text: str) -> tuple[str, str, str] | None:
    r"""(opening, inside, closing) of a text that one pair of brackets holds, or None."""
    found = list(tokens(text))
    if len(found) < 2 or found[0].text not in _OPENING or found[-1].text not in _CLOSING:
        return None
    if any(token.depth < 1 for token in found[1:-1]) or found[-1].depth != 0:
        return None
    return found[0].text, text[found[0].end : found[-1].start].strip(), found[-1].text


def _vulgar_fraction(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"


def _unwrapped(text: str) -> str:
    """Without markdown, quotes or math mode around the whole."""
    while True:
        text = text.strip()
        bare = text[:-1] if text.endswith(".") else text
        if (mode := _MATH_MODE.fullmatch(bare)) is not None:
            text = next(group for group in mode.groups() if group is not None)
        elif (marked := _MARKED.fullmatch(bare)) is not None and marked[1] not in marked["inner"]:
            text = marked["inner"]
        else:
            return text
