"""Weighing a few given answers to a question against one another: nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxreset.losses import token_logps
from jaxreset.models.packing import one_group_each
from jaxreset.models.policy import Policy
from jaxreset.models.precision import computing_decoder
from jaxreset.parallel import fetch
from jaxreset.parallel.compiling import Compile, SideBySide


class Weigher:
    """Log-probabilities of the same answers after any questions.

    Args:
      answers: token ids of each.
      batch: questions in one call.
      question_limit: longest question in tokens.
    """

    def __init__(self, answers: Sequence[np.ndarray], *, batch: int, question_limit: int):
        self._shape = batch, question_limit
        self._answers = np.zeros((len(answers), max(map(len, answers))), np.int32)
        self._lengths = np.asarray([len(tokens) for tokens in answers], np.int32)
        for row, tokens in zip(self._answers, answers, strict=True):
            row[: len(tokens)] = tokens

    def compile(self, policy: Policy, compiled: Compile | None = None) -> None:
        """Compiles all that a call needs; see `Sampler.compile`."""
        if compiled is None:
            with SideBySide() as compiled:
                return self.compile(policy, compiled)
        compiled(score_answers, *self._arguments(policy, []), graph=policy.graph)

    def __call__(self, policy: Policy, questions: Sequence[np.ndarray]) -> np.ndarray:
        """`[len(questions), answers]` float32, summed over an answer's tokens."""
        scores = score_answers(*self._arguments(policy, questions), graph=policy.graph)
        return fetch(scores)[: len(questions)]

    def _arguments(self, policy: Policy, questions: Sequence[np.ndarray]) -> tuple[Any, ...]:
        tokens = np.zeros(self._shape, np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for n, question in enumerate(questions):
            tokens[n, : len(question)] = question
            lengths[n] = len(question)
        return policy.params, tokens, lengths, self._answers, self._lengths


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
    model = computing_decoder(graph, params)
    last = jnp.take_along_axis(questions, lengths[:, None] - 1, axis=1)  # [N, 1]
    answers = jnp.broadcast_to(answers, (len(questions), *answers.shape))
    first = jnp.broadcast_to(last[:, None], (*answers.shape[:2], 1))
    rows = jnp.concatenate([first, answers[..., :-1]], axis=-1)
    packing = one_group_each(lengths - 1, questions, rows)
    hidden = model.suffix_hidden(questions, rows, packing)
    logps = token_logps(hidden, model.head, answers)
    spelt = jnp.arange(answers.shape[-1]) < answer_lengths[:, None]
    return jnp.where(spelt, logps, 0).sum(axis=-1)
