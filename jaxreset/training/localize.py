"""Asking the policy which step of a failed rollout went wrong first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxreset.models.policy import Policy
from jaxreset.sampling.rounds import Stream
from jaxreset.sampling.sampler import Sampler


def encode_question(tokenizer: Any, question: str) -> np.ndarray:
    """Token ids [t] of a question: in the chat template where the tokenizer has one, else raw text."""
    if not getattr(tokenizer, "chat_template", None):
        return np.asarray(tokenizer.encode(question), np.int32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)


class PolicyLocalizer:
    """Generates answers to localisation questions, a batch at a time.

    Args:
      sampler: for one row a prompt; its stop rules bound the answer.
      batch: questions in one call of the sampler.
      prompt_limit: longest question in tokens; a longer one is not asked and gets an empty answer,
        which parses as step 1.
      temperature, top_p: of the answers.
    """

    def __init__(
        self, sampler: Sampler, *, batch: int, prompt_limit: int, temperature: float, top_p: float
    ):
        self.sampler = sampler
        self.batch = batch
        self.prompt_limit = prompt_limit
        self._draw: dict[str, Any] = {"temperature": temperature, "top_p": top_p}

    def __call__(
        self,
        policy: Policy,
        questions: Sequence[str],
        *,
        stream: Stream,
        ids: Sequence[int],
        first_rows: Sequence[int],
    ) -> tuple[list[str], int]:
        """The answer to each question, and the number of tokens drawn in all."""
        encoded = [encode_question(policy.tokenizer, q) for q in questions]
        short = [i for i, tokens in enumerate(encoded) if len(tokens) <= self.prompt_limit]
        answers, drawn = [""] * len(questions), 0
        for first in range(0, len(short), self.batch):
            members = short[first : first + self.batch]
            round_ = self.sampler.sample(
                policy,
                [encoded[i] for i in members],
                rows=1,
                stream=stream,
                ids=[ids[i] for i in members],
                first_rows=[first_rows[i] for i in members],
                **self._draw,
            )
            drawn += int(round_.lengths.sum())
            for n, i in enumerate(members):
                answers[i] = policy.decode(round_.suffix(n, 0))
        return answers, drawn
