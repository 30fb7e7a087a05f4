r"""Multiple choice: options A, B, C and so on, the letter of the right one in `\boxed{}`.

A record is understood by its field names:

- `question`, `choices` as `{label: [...], text: [...]}`, `answerKey` (CommonsenseQA);
- `question`, `options`, `answer` as a letter, `answer_index`, or both (MMLU-Pro);
- `Question`, `Correct Answer`, `Incorrect Answer 1` to `3` (GPQA): the order of the options comes from
  a hash of the question and each of them, the same in every run;
- `question`, `choices`, `answer` as an index from 0 (MMLU);
- `question`, `options`, `answer` as a letter or the option's own text. Options may be `{A: ..., B: ...}`.

Options are lettered anew in their order, whatever labels a record gives them. `solution`,
`Explanation` or `cot_content` is the reference solution.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from jaxreset.tasks.base import Problem
from jaxreset.tasks.boxed import BoxedTask, unwrapped
from jaxreset.tasks.fields import UngradableError, brief, text_of, written_out

_MOST = len(ascii_uppercase)
_OPTIONS = f"a list of 2 to {_MOST} texts, or {{label: [...], text: [...]}}"
_CORRECT = "Correct Answer"
_INCORRECT = re.compile(r"Incorrect Answer [0-9]+")
_SOLUTIONS = ("solution", "Explanation", "cot_content")
# A letter alone, in brackets perhaps; and one with something behind it, which is the option's text.
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:]{0,2}")
_LETTER_AND_TEXT = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:]{1,2}\s*(.*)", re.DOTALL)


class _Options(NamedTuple):
    """The options of a record: the field they are in, what it calls each, and their texts."""

    field: str
    labels: list[str]
    texts: list[str]


class ChoiceTask(BoxedTask):
    r"""A `BoxedTask` whose answer is a letter; an option's own text is taken for its letter."""

    name = "choice"
    templates = ("solve_choice.txt", "solve_choice_chat.txt")

    def read_record(self, record: Mapping[str, Any]) -> Problem:
        """A record as a problem, see the module's docstring; its question ends in the options.

        Raises:
            UngradableError: no option is the right one, or two of them are the same.
            ValueError: anything else wrong with it; names the field and what was expected.
        """
        if _CORRECT in record:
            question, texts, right = _read_correct(record)
        else:
            question = text_of(record, "question", "the question's text")
            options = _read_options(record)
            texts, right = options.texts, _read_answer(record, options)
        if texts.count(texts[right]) > 1:
            raise UngradableError(
                f"the right option, {brief(texts[right])}, is there more than once; expected it once"
            )
        listed = "\n".join(
            f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)
        )
        asked, letter = f"{question.rstrip()}\n\n{listed}", ascii_uppercase[right]
        return Problem("", asked, letter, _solution(record), extra={"options": tuple(texts)})

    def meaning(self, problem: Problem, answer: str) -> str | None:
        """The letter of the option that `answer` names, by letter or text."""
        chosen = choose(answer, problem.extra["options"])
        return None if chosen is None else ascii_uppercase[chosen]


def choose(answer: str, options: Sequence[str]) -> int | None:
    """Which option the contents of a box name, by letter or text; None for no one option.

    A capital letter is an option's letter. What is written otherwise is first taken for an option's
    text. A letter with the text of another option behind it names neither.

    >>> [choose(a, ["red", "blue"]) for a in ("B", "(b)", "B. blue", "Blue ", "B. red", "C")]
    [1, 1, 1, 1, None, None]
    """
    alone = _LETTER.fullmatch(answer)
    if alone and alone[1].isupper() and (index := _index(alone[1], options)) is not None:
        return index
    plain = [_plain(unwrapped(option)) for option in options]
    if same := plain.count(_plain(answer)):
        return plain.index(_plain(answer)) if same == 1 else None
    if alone:
        return _index(alone[1], options)
    if (found := _LETTER_AND_TEXT.fullmatch(answer)) is None:
        return None
    index, said = _index(found[1], options), _plain(unwrapped(found[2]))
    other = _LETTER.fullmatch(said) is not None or said in plain
    return index if index is not None and (not other or plain[index] == said) else None


def _index(letter: str, options: Sequence[str]) -> int | None:
    index = ascii_uppercase.index(letter.upper())
    return index if index < len(options) else None


def _plain(text: str) -> str:
    """A text as it is compared: in any case, with any white space."""
    return " ".join(text.split()).casefold()


def _read_correct(record: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Question, options and the right one's index, of a record that names right and wrong answers."""
    question = text_of(record, "Question", "the question's text")
    right = text_of(record, _CORRECT, "the right answer's text").strip()
    fields = sorted(field for field in record if _INCORRECT.fullmatch(field))
    if not 1 <= len(fields) < _MOST:
        raise ValueError(
            f"{len(fields)} fields 'Incorrect Answer 1' and so on; expected 1 to {_MOST - 1}"
        )
    wrong = [text_of(record, field, "a wrong answer's text").strip() for field in fields]
    # The right answer's place must not tell that it is right.
    texts = sorted([right, *wrong], key=lambda text: _hash(f"{question}\0{text}"))
    return question, texts, texts.index(right)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read_options(record: Mapping[str, Any]) -> _Options:
    field = "options" if record.get("options") is not None else "choices"
    given = record.get(field)
    if given is None:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(
            f"missing field 'options' or 'choices'; expected {_OPTIONS}; fields found: {found}"
        )
    labels: Any = None
    if isinstance(given, Mapping):
        apart = {"label", "text"} <= given.keys()
        labels, given = (
            (given["label"], given["text"]) if apart else (list(given), list(given.values()))
        )
    lists = [given] if labels is None else [given, labels]
    if not all(isinstance(one, list | tuple) for one in lists):
        raise ValueError(f"field {field!r} is {brief(record[field])}; expected {_OPTIONS}")
    if not 2 <= len(given) <= _MOST:
        raise ValueError(f"field {field!r} has {len(given)} options; expected {_OPTIONS}")
    texts = _texts(field, given)
    labels = list(ascii_uppercase[: len(texts)]) if labels is None else _texts(field, labels)
    if len(labels) != len(texts):
        raise ValueError(
            f"field {field!r} has {len(labels)} labels for {len(texts)} options; expected one each"
        )
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(
            f"field {field!r} has the label {twice[0]!r} more than once; expected one for each option"
        )
    return _Options(field, labels, texts)


def _texts(field: str, values: Sequence[Any]) -> list[str]:
    named = ((f"{field}[{number}]", value) for number, value in enumerate(values))
    return [text_of({name: value}, name, "an option's text").strip() for name, value in named]


def _read_answer(record: Mapping[str, Any], options: _Options) -> int:
    """The index of the right option."""
    found = {
        field: read(record[field], options)
        for field, read in (
            ("answerKey", _by_label),
            ("answer_index", _by_index),
            ("answer", _by_any),
        )
        if record.get(field) is not None
    }
    if not found:
        raise ValueError("missing field 'answer', 'answer_index' or 'answerKey'; expected one")
    indexes = set(found.values())
    if len(indexes) > 1:
        said = ", ".join(f"{field!r} is {brief(record[field])}" for field in found)
        raise ValueError(f"{said}: different options; expected them to agree")
    return indexes.pop()


def _by_label(value: Any, options: _Options) -> int:
    expected = f"a label of field {options.field!r}: {', '.join(options.labels)}"
    if value == "":
        raise UngradableError(f"field 'answerKey' is empty; expected {expected}")
    label = text_of({"answerKey": value}, "answerKey", expected).strip()
    if label not in options.labels:
        raise ValueError(f"field 'answerKey' is {brief(value)}; expected {expected}")
    return options.labels.index(label)


def _by_index(value: Any, options: _Options, field: str = "answer_index") -> int:
    written, count = written_out(value), len(options.texts)
    if not (written and written.isdecimal() and int(written) < count):
        raise ValueError(
            f"field {field!r} is {brief(value)}; expected a whole number from 0 to {count - 1}"
        )
    return int(written)


def _by_any(value: Any, options: _Options) -> int:
    """By letter or text; a number is an index among `choices`, and a text among `options`."""
    if options.field == "choices" and written_out(value) is not None:
        return _by_index(value, options, "answer")
    expected = f"one of {', '.join(options.labels)}, or an option's text"
    text = text_of({"answer": value}, "answer", expected).strip()
    labels = [i for i, label in enumerate(options.labels) if label == text]
    exactly = [i for i, option in enumerate(options.texts) if option == text]
    same = exactly or [
        i for i, option in enumerate(options.texts) if _plain(option) == _plain(text)
    ]
    if not labels and not same:
        raise ValueError(f"field 'answer' is {brief(value)}; expected {expected}")
    named = set(labels) | set(same)
    if len(named) > 1:
        raise ValueError(
            f"field 'answer' is {brief(value)}, which names options "
            f"{', '.join(options.labels[i] for i in sorted(named))}; expected one; give answer_index"
        )
    return named.pop()


def _solution(record: Mapping[str, Any]) -> str:
    texts = (record.get(field) for field in _SOLUTIONS)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")
