"""Asking the policy which step of a failed rollout went wrong first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxreset.losses import token_logps
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

    def compile(self, policy: Policy) -> None:
        """Compiles all that a call needs."""
        self.sampler.compile(policy)

    def __call__(
        self,
        policy: Policy,
        questions: Sequence[str],
        *,
        steps: Sequence[int],
        stream: Stream,
        ids: Sequence[int],
        first_rows: Sequence[int],
    ) -> tuple[list[str], int]:
        """The answer to each question, and the number of tokens drawn in all."""
        encoded = [encode_question(policy.tokenizer, q) for q in questions]
        answers, drawn = [""] * len(questions), 0
        for members in _batches(encoded, self.prompt_limit, self.batch):
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


class ScoringLocalizer:
    """Weighs `\\boxed{n}` for every step n in one forward pass: nothing is generated or can fail to parse.

    Args:
      tokenizer: spells the answers.
      most_steps: most steps that a response may have.
      batch, prompt_limit: as of `PolicyLocalizer`.
      temperature: of the choice among the steps, by the probabilities of their answers; 0: the likeliest.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        most_steps: int,
        batch: int,
        prompt_limit: int,
        temperature: float,
    ):
        self.batch = batch
        self.prompt_limit = prompt_limit
        self.temperature = temperature
        texts = [_boxed(n) for n in range(1, most_steps + 1)]
        spelt = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._answers = np.zeros((most_steps, max(map(len, spelt))), np.int32)
        self._lengths = np.asarray([len(tokens) for tokens in spelt], np.int32)
        for row, tokens in zip(self._answers, spelt, strict=True):
            row[: len(tokens)] = tokens

    def compile(self, policy: Policy) -> None:
        """Compiles all that a call needs."""
        self._score(policy, [])

    def __call__(
        self,
        policy: Policy,
        questions: Sequence[str],
        *,
        steps: Sequence[int],
        stream: Stream,
        ids: Sequence[int],
        first_rows: Sequence[int],
    ) -> tuple[list[str], int]:
        """The answer to each question; no token is drawn."""
        encoded = [encode_question(policy.tokenizer, q) for q in questions]
        answers = [""] * len(questions)
        for members in _batches(encoded, self.prompt_limit, self.batch):
            scores = self._score(policy, [encoded[i] for i in members])
            for logps, i in zip(scores, members, strict=False):
                logps = np.asarray(logps[: steps[i]], np.float64)
                if self.temperature > 0:
                    noise = np.random.default_rng((*stream, ids[i], first_rows[i])).gumbel(
                        size=logps.size
                    )
                    logps = logps / self.temperature + noise
                answers[i] = _boxed(int(logps.argmax()) + 1)
        return answers, 0

    def _score(self, policy: Policy, questions: Sequence[np.ndarray]) -> np.ndarray:
        """`[batch, most_steps]` log-probabilities of the answers."""
        tokens = np.zeros((self.batch, self.prompt_limit), np.int32)
        lengths = np.ones(self.batch, np.int32)
        for n, question in enumerate(questions):
            tokens[n, : len(question)] = question
            lengths[n] = len(question)
        scores = score_answers(
            policy.params, tokens, lengths, self._answers, self._lengths, graph=policy.graph
        )
        return np.asarray(scores)


@partial(jax.jit, static_argnames="graph")
def score_answers(
    params: nnx.State,
    questions: jax.Array,
    lengths: jax.Array,
    answers: jax.Array,
    answer_lengths: jax.Array,
    *,
    graph: nnx.GraphDef,
) -> jax.Array:
    """Log-probability of each answer after each question, which runs through the network once.

    Args:
      questions: `[N, P]` right-padded.  lengths: `[N]`, at least 1.
      answers: `[C, S]` right-padded.  answer_lengths: `[C]`.

    Returns:
      `[N, C]`, summed over the answer's tokens.
    """
    model = nnx.merge(graph, params)
    last = jnp.take_along_axis(questions, lengths[:, None] - 1, axis=1)  # [N, 1]
    answers = jnp.broadcast_to(answers, (len(questions), *answers.shape))
    first = jnp.broadcast_to(last[:, None], (*answers.shape[:2], 1))
    rows = jnp.concatenate([first, answers[..., :-1]], axis=-1)
    hidden = model.suffix_hidden(questions, lengths - 1, rows)
    logps = token_logps(hidden, model.head, answers)
    spelt = jnp.arange(answers.shape[-1]) < answer_lengths[:, None]
    return jnp.where(spelt, logps, 0).sum(axis=-1)


def _boxed(step: int) -> str:
    return f"\\boxed{{{step}}}"


def _batches(encoded: Sequence[np.ndarray], limit: int, size: int) -> Iterator[list[int]]:
    """Indices of the questions within the limit, `size` at a time."""
    short = [i for i, tokens in enumerate(encoded) if len(tokens) <= limit]
    for first in range(0, len(short), size):
        yield short[first : first + size]
