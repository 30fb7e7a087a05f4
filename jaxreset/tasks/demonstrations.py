"""Demonstrations: answers that a policy learns to give, from a file, a task's problems, or the task itself.

A record of a file is one of

- `prompt` and `completion`, texts, or messages of a chat: the prompt is what the user says;
- `question` (or `problem`) and `completion`: the prompt is the question as the task asks it;
- `messages` of a chat, of which the last one, the assistant's, is learnt.

A prompt is asked as it is in training, by `Asking`: in the chat template with the system's text and the
examples, or as raw text. An answer ends with one end-of-sequence token: the one by which the template ends
the assistant's turn, or the tokenizer's. Only the answer's tokens, that one among them, are learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxreset.models.encoding import continuation_tokens, prompt_tokens
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem
from jaxreset.tasks.fields import brief, text_of
from jaxreset.tasks.files import open_rows

RECORD = "'prompt' and 'completion', 'question' and 'completion', or 'messages'"

logger = logging.getLogger(__name__)


class Demonstration(NamedTuple):
    """Token ids `[p]` int32 of a prompt and `[c]` of the answer to it, and where it comes from."""

    prompt: np.ndarray
    answer: np.ndarray
    place: str

    def fits(self, prompt: int, answer: int) -> bool:
        """Whether they have at most so many tokens."""
        return len(self.prompt) <= prompt and len(self.answer) <= answer


class Answers:
    """Token ids of answers, for one tokenizer.

    Args:
        asking: puts the prompts together.
        eos_ids: token ids that end a response when it is sampled; where there are none, answers just end.
    """

    def __init__(self, asking: Asking, eos_ids: Sequence[int]):
        self.asking, self._eos_ids = asking, frozenset(eos_ids)
        own = asking.tokenizer.eos_token_id
        self._default = [own] if own in self._eos_ids else sorted(self._eos_ids)[:1]
        self._ends = {
            in_template: self._end(asking.ending(in_template=in_template))
            for in_template in {False, asking.has_template}
        }

    def tokens(self, text: str, *, in_template: bool) -> np.ndarray:
        """Token ids `[t]` int32 of an answer, with one end-of-sequence token as the last.

        Raises:
            ValueError: there is nothing in it, or more behind an end-of-sequence token.
        """
        tokenizer = self.asking.tokenizer
        ids = [int(token) for token in continuation_tokens(tokenizer, text)]
        first = next((n for n, token in enumerate(ids) if token in self._eos_ids), len(ids))
        behind = [token for token in ids[first:] if token not in self._eos_ids]
        if behind and tokenizer.decode(behind).strip():
            raise ValueError(
                f"the answer {brief(text)} goes on behind the end-of-sequence token "
                f"{tokenizer.convert_ids_to_tokens(ids[first])!r}, where a response ends; leave it out"
            )
        if not first:
            raise ValueError(f"the answer {brief(text)} has no tokens to learn; expected some")
        return np.asarray([*ids[:first], *self._ends[in_template]], np.int32)

    def _end(self, behind: str) -> list[int]:
        """What answers end with: of what a template writes behind one, all up to the end of sequence."""
        ids = self.asking.tokenizer.encode(behind, add_special_tokens=False) if behind else []
        last = next((n for n, token in enumerate(ids) if token in self._eos_ids), None)
        return self._default if last is None else ids[: last + 1]


def read_demonstrations(path: str | Path, answers: Answers) -> list[Demonstration]:
    """All demonstrations of a `.jsonl`, `.json` or `.parquet` file, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything wrong inside, naming file, line (or row) and field; or nothing in it.
    """
    found, texts = list[tuple[np.ndarray, str]](), list[str]()
    for _, place, record in open_rows(path)[1]:
        try:
            text, completion = _read(record, answers.asking)
            answer = answers.tokens(completion, in_template=answers.asking.in_template)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
        found.append((answer, f"{path}, {place}"))
        texts.append(text)
    if not found:
        raise ValueError(f"{path}: empty; expected at least one record with {RECORD}")
    prompts = prompt_tokens(answers.asking.tokenizer, texts)
    for prompt, (_, place) in zip(prompts, found, strict=True):
        if not len(prompt):
            raise ValueError(f"{place}: the prompt has no tokens; expected something to answer")
    return [Demonstration(p, *of) for p, of in zip(prompts, found, strict=True)]


def solved_problems(problems: Iterable[Problem], answers: Answers) -> list[Demonstration]:
    """Demonstrations of the problems that have a solution, see `Task.demonstrate_solution`."""
    rng = np.random.default_rng(0)  # no chance is in these
    shown = [(p.id, found) for p in problems if (found := _solved(p, answers, rng)) is not None]
    prompts = prompt_tokens(answers.asking.tokenizer, [text for _, (text, _) in shown])
    return [Demonstration(p, a, id_) for p, (id_, (_, a)) in zip(prompts, shown, strict=True)]


def solved(problem: Problem, answers: Answers, rng: np.random.Generator) -> Demonstration:
    """A solution as the task demonstrates it.

    Raises:
        ValueError: it demonstrates none.
    """
    if (found := _solved(problem, answers, rng)) is None:
        raise ValueError(
            f"the task {answers.asking.task.name!r} demonstrates no solution of problem {problem.id!r}; "
            "expected a prompt and an answer"
        )
    text, answer = found
    return Demonstration(prompt_tokens(answers.asking.tokenizer, [text])[0], answer, problem.id)


def _solved(
    problem: Problem, answers: Answers, rng: np.random.Generator
) -> tuple[str, np.ndarray] | None:
    """The prompt's text, and the answer. What isn't the task's `prompt` is asked as the user's message."""
    asking = answers.asking
    if (shown := asking.task.demonstrate_solution(problem, rng)) is None:
        return None
    asked, answer = shown
    if asked == asking.task.prompt(problem):
        text = asking.text(problem)
    elif isinstance(asked, str):
        text = asking.chat([("user", asked)])
    else:
        text = asking.chat([(message["role"], message["content"]) for message in asked])
    return text, answers.tokens(answer, in_template=asking.in_template)


def localized(
    problem: Problem, answers: Answers, rng: np.random.Generator, *, inline: bool
) -> Demonstration:
    """A question where an attempt went wrong, and its answer, as the task demonstrates them.

    Raises:
        ValueError: it stands behind the attempt, and attempts behind prompts in a chat template.
    """
    asking, task = answers.asking, answers.asking.task
    if inline and asking.in_template:
        raise ValueError(
            "reset.localizer.mode=inline: what the task demonstrates of it is raw text, and prompts are "
            "chats; set task.chat=raw, another mode, or warm_start.steps=0"
        )
    asked, answer = task.demonstrate_localization(problem, rng, inline=inline)  # type: ignore[attr-defined]
    prompt = (
        prompt_tokens(asking.tokenizer, [asked])[0] if inline else asking.question_tokens(asked)
    )
    in_template = asking.has_template and not inline
    return Demonstration(prompt, answers.tokens(answer, in_template=in_template), problem.id)


def fitting(
    found: Sequence[Demonstration], *, prompt: int, answer: int, source: str
) -> list[Demonstration]:
    """Those that training could ask and the policy could say; a warning counts the others.

    Args:
        prompt, answer: most tokens of each.
        source: where they come from.

    Raises:
        ValueError: none is left; with the numbers.
    """
    kept = [one for one in found if one.fits(prompt, answer)]
    if not kept:
        shortest = min(found, key=lambda one: len(one.prompt) + len(one.answer))
        raise ValueError(
            f"{source}: none of {len(found)} demonstrations fits sampling.max_prompt_tokens={prompt} and "
            f"sampling.max_response_tokens={answer}; the shortest, {shortest.place}, has "
            f"{len(shortest.prompt)} tokens of prompt and {len(shortest.answer)} of answer; raise the "
            "limits"
        )
    if len(kept) < len(found):
        first = next(one for one in found if not one.fits(prompt, answer))
        logger.warning(
            "%s: %d of %d demonstrations are left out, for they are longer than "
            "sampling.max_prompt_tokens=%d or sampling.max_response_tokens=%d; the first, %s, has %d "
            "tokens of prompt and %d of answer",
            source,
            len(found) - len(kept),
            len(found),
            prompt,
            answer,
            first.place,
            len(first.prompt),
            len(first.answer),
        )
    return kept


class Shuffled:
    """Demonstrations in passes, each in an order of its own."""

    def __init__(self, found: Sequence[Demonstration], *, seed: int):
        source: Any = found
        self._order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    def batch(self, number: int, size: int) -> list[Demonstration]:
        """The `number`-th batch of `size`, from 0."""
        return [self._order[number * size + place] for place in range(size)]


def _read(record: Mapping[str, Any], asking: Asking) -> tuple[str, str]:
    """The whole prompt of a record, and the answer to it."""
    asked = [key for key in ("prompt", "question", "problem", "messages") if key in record]
    if "messages" in asked:
        if "completion" in record:
            raise ValueError(f"fields 'messages' and 'completion'; expected {RECORD}")
        turns = _turns(record, "messages")
        if len(turns) < 2 or turns[-1][0] != "assistant":
            raise ValueError(
                f"field 'messages' ends with the message of {turns[-1][0]!r}; expected the assistant's, "
                "behind at least one other"
            )
        return asking.chat(turns[:-1]), turns[-1][1]
    if len(asked) != 1 or "completion" not in record:
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(f"fields found: {fields}; expected {RECORD}")
    completion = _completion(record)
    if asked[0] != "prompt":
        question = text_of(record, asked[0], "the problem's text")
        return asking.text(Problem("", question, "")), completion
    if isinstance(record["prompt"], list):
        turns = _turns(record, "prompt")
        if turns[-1][0] == "assistant":
            raise ValueError(
                "field 'prompt' ends with the assistant's message; expected the user's"
            )
        return asking.chat(turns), completion
    return asking.chat([("user", text_of(record, "prompt", "text, or messages"))]), completion


def _completion(record: Mapping[str, Any]) -> str:
    if not isinstance(record["completion"], list):
        return text_of(record, "completion", "text, or one message of the assistant")
    turns = _turns(record, "completion")
    if [role for role, _ in turns] != ["assistant"]:
        raise ValueError(
            f"field 'completion' holds messages of {', '.join(role for role, _ in turns)}; expected one of "
            "the assistant"
        )
    return turns[0][1]


def _turns(record: Mapping[str, Any], field: str) -> list[tuple[str, str]]:
    """(role, content) of the messages in a field."""
    expected = "messages, each with a text as 'role' and one as 'content'"
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {field!r} is {brief(messages)}; expected {expected}")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"field {field!r}, message {number} is {brief(message)}; expected {expected}"
            )
        try:
            turns.append(
                (text_of(message, "role", "a text"), text_of(message, "content", "a text"))
            )
        except ValueError as error:
            raise ValueError(f"field {field!r}, message {number}: {error}") from error
    return turns
