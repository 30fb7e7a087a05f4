"""What tasks share whose prompts are template files, see `templates`: math, choices, generated puzzles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from jaxreset.tasks.base import Problem, Task
from jaxreset.tasks.localization import ask_for_step
from jaxreset.tasks.templates import fill, spoken, template

_SOLVE_FIELDS = ("problem",)
_LOCALIZE_FIELDS = ("problem", "steps", "count")
_INLINE_FIELDS = ("count",)


class TemplatedTask(Task):
    """A `Task` that puts a problem into a template, and asks for the first wrong step in another.

    Attributes:
        templates: the shipped files, raw text and a user's message.

    Args:
        solve_prompt: a text with `{problem}` in it, or a file with one, to use instead of both.
        localize_prompt: the same instead of `localize.txt`; must contain `{problem}`, `{steps}` and
            `{count}`.
        inline_prompt: the same instead of `localize_inline.txt`; must contain `{count}`.

    Raises:
        FileNotFoundError: naming a template that isn't there.
        ValueError: naming a template and the placeholders it lacks.
    """

    templates: ClassVar[tuple[str, str]]

    def __init__(
        self,
        *,
        solve_prompt: str | Path | None = None,
        localize_prompt: str | Path | None = None,
        inline_prompt: str | Path | None = None,
    ):
        self._raw, self._chat = (
            template("solve_prompt", solve_prompt, ours, _SOLVE_FIELDS) for ours in self.templates
        )
        self._localize = template(
            "localize_prompt", localize_prompt, "localize.txt", _LOCALIZE_FIELDS
        )
        self._inline = template(
            "inline_prompt", inline_prompt, "localize_inline.txt", _INLINE_FIELDS
        )

    def prompt(self, problem: Problem) -> str:
        """The text that the policy continues, one step at a time."""
        return self._filled(self._raw, problem)

    def message(self, problem: Problem) -> str:
        """The user's message that the policy answers, where there is a chat template."""
        return self._filled(self._chat, problem)

    def _filled(self, text: str, problem: Problem) -> str:
        return fill(text, {"problem": problem.question, "delimiter": spoken(self.delimiter)})

    def localization(self, problem: Problem, steps: Sequence[str]) -> str:
        r"""The question which of `steps` is the first wrong one, to be answered by one `\boxed{N}`.

        Args:
            problem: the problem; its answer is not shown.
            steps: the failed response's steps, with or without the delimiter that ends them; at
                least one.

        Raises:
            ValueError: without a step.
        """
        return ask_for_step(self._localize, problem, steps, self.delimiter)

    def inline_localization(self, problem: Problem, steps: Sequence[str]) -> str:
        """The same question behind the failed response, which shows problem and steps already."""
        return fill(self._inline, {"count": str(len(steps)), "delimiter": spoken(self.delimiter)})
