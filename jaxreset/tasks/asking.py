"""How a problem is put to a policy: in the chat template of its tokenizer, or as raw text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxreset.models.encoding import continuation_tokens, fill_chat, prompt_tokens, question_tokens
from jaxreset.tasks.base import Message, Problem, Task

Chat = Literal["auto", "template", "raw"]

_ATTEMPT = "[the attempt stands here]"  # of which nothing is kept


class Asking:
    """Prompts of a task's problems, for one tokenizer.

    In a chat template: the system's text, solved examples as earlier turns, the messages that a problem
    brings along, and the task's `message`. In raw text: the same one behind the other, each example its
    task's `prompt` and its solution, and the task's `prompt` last.

    Args:
      task: asks.
      tokenizer: the policy's.
      chat: whether the template is filled in; auto: where there is one.
      system: text of the system's turn; None: what the template or the problem brings along.
      examples: (question, solution) pairs.
      variables: what the template is told besides, see `encoding.chat_variables`.

    Attributes:
      has_template: whether there is one.
      in_template: whether prompts are chats.

    Raises:
      ValueError: a template is asked for and there is none.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        *,
        chat: Chat = "auto",
        system: str | None = None,
        examples: Sequence[tuple[str, str]] = (),
        variables: Mapping[str, Any] | None = None,
    ):
        there = bool(getattr(tokenizer, "chat_template", None))
        if chat == "template" and not there:
            raise ValueError(
                "task.chat=template: the policy's tokenizer has no chat template; set task.chat=raw, or "
                "use an instruct model"
            )
        self.has_template, self.in_template = there, there and chat != "raw"
        self.task, self.tokenizer = task, tokenizer
        self._system, self._variables = system, variables or {}
        self._examples = [(Problem("example", asked, ""), solved) for asked, solved in examples]

    def text(self, problem: Problem) -> str:
        """The whole prompt, special tokens spelt out.

        Raises:
          ValueError: the template refuses it, or the task gives messages where there is no template.
        """
        if self.in_template:
            return self._filled(self._messages(problem))
        return self._raw_before(problem.context) + self._raw(problem)

    def chat(self, turns: Sequence[tuple[str, str]]) -> str:
        """The whole prompt of messages that don't come from a problem, (role, content) each: system and
        examples stand before them as before a problem.

        Raises:
          ValueError: the template refuses them, or there is none to tell answers in them from questions.
        """
        *before, (_, asked) = turns
        if self.in_template:
            return self._filled(self._before(before) + _messages(turns[-1:]))
        if any(role == "assistant" for role, _ in before):
            raise ValueError(
                "a chat of several turns, and there is no template to put it in; set task.chat=template "
                "with an instruct model"
            )
        return self._raw_before(before) + asked

    def ending(self, *, in_template: bool) -> str:
        """What the template writes behind an answer that is the last message, such as the end of the turn;
        nothing in raw text."""
        if not in_template:
            return ""
        turns = [*self._before(()), *_messages([("user", "?"), ("assistant", _ATTEMPT)])]
        return self._filled(turns, answered=True).rpartition(_ATTEMPT)[2]

    def tokens(self, problems: Sequence[Problem]) -> list[np.ndarray]:
        """Token ids `[t]` int32 of each prompt; see `text`."""
        return prompt_tokens(self.tokenizer, [self.text(problem) for problem in problems])

    def question(self, problem: Problem, steps: Sequence[str]) -> np.ndarray:
        """Token ids `[t]` of the question where an attempt went wrong: a chat where there is a template,
        whatever the problems are asked in (arXiv 2605.25507, appendix D)."""
        return self.question_tokens(self.task.localization(problem, steps))

    def question_tokens(self, asked: str) -> np.ndarray:
        """Token ids `[t]` of such a question as a text."""
        return question_tokens(self.tokenizer, asked, self._variables)

    def inline_question(self, problem: Problem, steps: Sequence[str]) -> np.ndarray:
        """The same, to be put behind the attempt itself: in a chat, the user's next turn."""
        asked = self.task.inline_localization(problem, steps)
        if self.in_template:
            turns = [("assistant", _ATTEMPT), ("user", asked)]
            asked = self._filled(self._messages(problem) + _messages(turns)).rpartition(_ATTEMPT)[2]
        return continuation_tokens(self.tokenizer, asked)

    def _messages(self, problem: Problem) -> list[Message]:
        return self._before(problem.context) + self._asked(problem)

    def _before(self, context: Sequence[tuple[str, str]]) -> list[Message]:
        """The system's message, the examples and the rest of the context."""
        context = [turn for turn in context if self._system is None or turn[0] != "system"]
        first = [turn for turn in context if turn[0] == "system"]
        turns = first if self._system is None else [("system", self._system)]
        messages = _messages(turns)
        for example, solution in self._examples:
            messages += self._asked(example)
            messages += _messages([("assistant", solution)])
        return messages + _messages([turn for turn in context if turn[0] != "system"])

    def _asked(self, problem: Problem) -> list[Message]:
        asked = self.task.message(problem)
        return _messages([("user", asked)]) if isinstance(asked, str) else list(asked)

    def _raw_before(self, context: Sequence[tuple[str, str]]) -> str:
        """The same in raw text."""
        parts = [] if self._system is None else [f"{self._system}\n\n"]
        for example, solution in self._examples:
            parts.append(f"{self._raw(example)}{solution}\n\n")
        return "".join([*parts, *(f"{content}\n\n" for _, content in context)])

    def _raw(self, problem: Problem) -> str:
        asked = self.task.prompt(problem)
        if not isinstance(asked, str):
            raise ValueError(
                f"problem {problem.id}: the task gives chat messages, and there is no template to put them "
                "in; set task.chat=template with an instruct model, or let the task's prompt give text"
            )
        return asked

    def _filled(self, messages: Sequence[Message], *, answered: bool = False) -> str:
        try:
            return fill_chat(self.tokenizer, messages, self._variables, answered=answered)
        except Exception as error:  # a template is a program, and raises what it likes
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses messages of {roles}: {error}; leave task.system "
                "or task.examples out, or set task.chat=raw"
            ) from error


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]
