"""Asking the policy which step of a failed rollout went wrong first."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxreset.models.encoding import continuation_tokens
from jaxreset.models.policy import Policy
from jaxreset.parallel.compiling import Compile
from jaxreset.resets.rules import Failure
from jaxreset.sampling.dealing import together
from jaxreset.sampling.rounds import Snapshot, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.sampling.truncation import truncate
from jaxreset.sampling.weighing import Weigher
from jaxreset.tasks.asking import Asking


class PolicyLocalizer:
    """Generates answers to localisation questions, a batch at a time.

    Args:
      sampler: for one row a question; its stop rules bound the answer.
      asking: puts the questions.
      batch: questions in one call of the sampler.
      question_limit: longest question in tokens; a longer one is not asked and gets an empty answer,
        which parses as step 1.
      inline: the question goes on from the failed rollout, whose keys and values are read from its
        round; else it is a prompt of its own, with problem and steps in it.
      temperature, top_p, top_k: of the answers.
    """

    def __init__(
        self,
        sampler: Sampler,
        asking: Asking,
        *,
        batch: int,
        question_limit: int,
        inline: bool = False,
        temperature: float,
        top_p: float,
        top_k: int = 0,
    ):
        self.sampler = sampler
        self.batch = batch
        self.question_limit = question_limit
        self.inline = inline
        self._draw: dict[str, Any] = {"rows": 1, "temperature": temperature, "top_p": top_p}
        if top_k:
            self._draw["top_k"] = top_k
        self._encode = asking.inline_question if inline else asking.question

    def compile(self, policy: Policy, compiled: Compile | None = None) -> None:
        """Compiles all that a call needs; see `Sampler.compile`."""
        self.sampler.compile(policy, compiled)

    def __call__(
        self, policy: Policy, failures: Sequence[Failure], ends: Sequence[Snapshot]
    ) -> tuple[list[str], int]:
        """The answer about each failure, and the number of tokens drawn in all."""
        questions = [self._encode(f.problem, f.steps) for f in failures]
        answers, drawn = [""] * len(failures), 0
        calls, s = None, self.sampler
        if self.inline:
            calls = together(ends, self.batch, shards=s.shards, shard=s.shard)
        for members in _batches(questions, self.question_limit, self.batch, apart=calls):
            names = [failures[i].seed for i in members]
            stream = Stream(*names[0][:3])
            asked, rows = [questions[i] for i in members], [name[4] for name in names]
            if self.inline:
                points = [ends[i] for i in members]
                round_ = self.sampler.resume(
                    policy, points, questions=asked, stream=stream, first_rows=rows, **self._draw
                )
            else:
                ids = [name[3] for name in names]
                round_ = self.sampler.sample(
                    policy, asked, stream=stream, ids=ids, first_rows=rows, **self._draw
                )
            drawn += int(round_.lengths.sum())
            for n, i in enumerate(members):
                answers[i] = policy.decode(round_.suffix(n, 0))
        return answers, drawn


class ScoringLocalizer:
    """Weighs `\\boxed{n}` for every step n in one forward pass: nothing is generated or can fail to parse.

    Args:
      asking: puts the questions; its tokenizer spells the answers.
      most_steps: most steps that a response may have.
      batch, question_limit: as of `PolicyLocalizer`.
      temperature: of the choice among the steps, by the probabilities of their answers; 0: the likeliest.
      top_p, top_k: of that choice; 1 and 0 keep all steps.
    """

    def __init__(
        self,
        asking: Asking,
        *,
        most_steps: int,
        batch: int,
        question_limit: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
    ):
        self.batch, self.question_limit = batch, question_limit
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._encode = asking.question
        boxes = map(_boxed, range(1, most_steps + 1))
        answers = [continuation_tokens(asking.tokenizer, box) for box in boxes]
        self._weigher = Weigher(answers, batch=batch, question_limit=question_limit)

    def compile(self, policy: Policy, compiled: Compile | None = None) -> None:
        """Compiles all that a call needs; see `Sampler.compile`."""
        self._weigher.compile(policy, compiled)

    def __call__(
        self, policy: Policy, failures: Sequence[Failure], ends: Sequence[Snapshot]
    ) -> tuple[list[str], int]:
        """The answer about each failure; no token is drawn."""
        questions = [self._encode(f.problem, f.steps) for f in failures]
        answers = [""] * len(failures)
        for members in _batches(questions, self.question_limit, self.batch):
            scores = self._weigher(policy, [questions[i] for i in members])
            for logps, i in zip(scores, members, strict=True):
                logps = np.asarray(logps[: len(failures[i].steps)], np.float64)
                if self.temperature > 0:
                    logps = truncate(logps / self.temperature, self.top_p, self.top_k)
                    logps = logps + failures[i].rng().gumbel(size=logps.size)
                answers[i] = _boxed(int(logps.argmax()) + 1)
        return answers, 0


Localizer = PolicyLocalizer | ScoringLocalizer


def _boxed(step: int) -> str:
    return f"\\boxed{{{step}}}"


def _batches(
    questions: Sequence[np.ndarray],
    limit: int,
    size: int,
    *,
    apart: Sequence[Hashable] | None = None,
) -> Iterator[list[int]]:
    """Indices of the questions within the limit, at most `size` at a time and of one value of `apart`."""
    apart = [0] * len(questions) if apart is None else apart
    for value in dict.fromkeys(apart):
        short = [i for i, q in enumerate(questions) if apart[i] == value and len(q) <= limit]
        for first in range(0, len(short), size):
            yield short[first : first + size]
