"""Asking the policy which step of a failed rollout went wrong first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxreset.losses import token_logps
from jaxreset.models.encoding import continuation_tokens, fill_chat, prompt_tokens
from jaxreset.models.packing import one_group_each
from jaxreset.models.policy import Policy
from jaxreset.models.precision import computing_decoder
from jaxreset.parallel import fetch
from jaxreset.parallel.compiling import compiled
from jaxreset.resets.rules import Failure
from jaxreset.sampling.rounds import Snapshot, Stream
from jaxreset.sampling.sampler import Sampler


def encode_question(
    tokenizer: Any, question: str, variables: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Token ids [t] of a question: in the chat template where the tokenizer has one, else raw text.

    `variables` are what the template is told besides, see `encoding.chat_variables`.
    """
    if getattr(tokenizer, "chat_template", None):
        question = fill_chat(tokenizer, [{"role": "user", "content": question}], variables or {})
    return prompt_tokens(tokenizer, [question])[0]


class PolicyLocalizer:
    """Generates answers to localisation questions, a batch at a time.

    Args:
      sampler: for one row a question; its stop rules bound the answer.
      batch: questions in one call of the sampler.
      question_limit: longest question in tokens; a longer one is not asked and gets an empty answer,
        which parses as step 1.
      inline: the question goes on from the failed rollout, whose keys and values are read from its
        round; else it is a prompt of its own, with problem and steps in it.
      temperature, top_p, top_k: of the answers.
      variables: of the chat template, see `encode_question`.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        batch: int,
        question_limit: int,
        inline: bool = False,
        temperature: float,
        top_p: float,
        top_k: int = 0,
        variables: Mapping[str, Any] | None = None,
    ):
        self.sampler = sampler
        self.batch = batch
        self.question_limit = question_limit
        self.inline = inline
        self._draw: dict[str, Any] = {"rows": 1, "temperature": temperature, "top_p": top_p}
        if top_k:
            self._draw["top_k"] = top_k
        self._encode: Callable[[Any, Failure], np.ndarray] = (
            _encode_inline if inline else partial(_encode_fresh, variables=variables)
        )

    def compile(self, policy: Policy) -> None:
        """Compiles all that a call needs."""
        self.sampler.compile(policy)

    def __call__(
        self, policy: Policy, failures: Sequence[Failure], ends: Sequence[Snapshot]
    ) -> tuple[list[str], int]:
        """The answer about each failure, and the number of tokens drawn in all."""
        questions = [self._encode(policy.tokenizer, failure) for failure in failures]
        answers, drawn = [""] * len(failures), 0
        calls = self._calls(ends) if self.inline else None
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

    def _calls(self, ends: Sequence[Snapshot]) -> list[Hashable]:
        """What one call resumes is of one round, and takes no more of a shard than there is room for."""
        calls, met = list[Hashable](), Counter[Hashable]()
        for end in ends:
            room = self.batch // (self.sampler.shards if end.round.held else 1)
            place = id(end.round), self.sampler.shard(end)
            calls.append((id(end.round), met[place] // room))
            met[place] += 1
        return calls


class ScoringLocalizer:
    """Weighs `\\boxed{n}` for every step n in one forward pass: nothing is generated or can fail to parse.

    Args:
      tokenizer: spells the answers.
      most_steps: most steps that a response may have.
      batch, question_limit: as of `PolicyLocalizer`.
      temperature: of the choice among the steps, by the probabilities of their answers; 0: the likeliest.
      top_p, top_k: of that choice; 1 and 0 keep all steps.
      variables: of the chat template, see `encode_question`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        most_steps: int,
        batch: int,
        question_limit: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        variables: Mapping[str, Any] | None = None,
    ):
        self.batch = batch
        self.question_limit = question_limit
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._encode = partial(_encode_fresh, variables=variables)
        spelt = [continuation_tokens(tokenizer, _boxed(n)) for n in range(1, most_steps + 1)]
        self._answers = np.zeros((most_steps, max(map(len, spelt))), np.int32)
        self._lengths = np.asarray([len(tokens) for tokens in spelt], np.int32)
        for row, tokens in zip(self._answers, spelt, strict=True):
            row[: len(tokens)] = tokens

    def compile(self, policy: Policy) -> None:
        """Compiles all that a call needs."""
        args, static = self._call(policy, [])
        compiled(score_answers, *args, **static)

    def __call__(
        self, policy: Policy, failures: Sequence[Failure], ends: Sequence[Snapshot]
    ) -> tuple[list[str], int]:
        """The answer about each failure; no token is drawn."""
        questions = [self._encode(policy.tokenizer, failure) for failure in failures]
        answers = [""] * len(failures)
        for members in _batches(questions, self.question_limit, self.batch):
            scores = self._score(policy, [questions[i] for i in members])
            for logps, i in zip(scores, members, strict=False):
                logps = np.asarray(logps[: len(failures[i].steps)], np.float64)
                if self.temperature > 0:
                    logps = truncate(logps / self.temperature, self.top_p, self.top_k)
                    logps = logps + failures[i].rng().gumbel(size=logps.size)
                answers[i] = _boxed(int(logps.argmax()) + 1)
        return answers, 0

    def _score(self, policy: Policy, questions: Sequence[np.ndarray]) -> np.ndarray:
        """`[batch, most_steps]` log-probabilities of the answers."""
        args, static = self._call(policy, questions)
        return fetch(score_answers(*args, **static))

    def _call(
        self, policy: Policy, questions: Sequence[np.ndarray]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `score_answers`."""
        tokens = np.zeros((self.batch, self.question_limit), np.int32)
        lengths = np.ones(self.batch, np.int32)
        for n, question in enumerate(questions):
            tokens[n, : len(question)] = question
            lengths[n] = len(question)
        args = policy.params, tokens, lengths, self._answers, self._lengths
        return args, {"graph": policy.graph}


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


def truncate(logps: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """A few choices' log-probabilities [n], normalised or not, -inf where top-k, then top-p cut.

    As `sampling.tokens.truncate` does it for a vocabulary: on the host, since n varies.
    """
    ordered = np.sort(logps)[::-1][: top_k or None]
    weights = np.exp(ordered - ordered[0])
    before = (np.cumsum(weights) - weights) / weights.sum()  # mass of the likelier ones
    kept = (before < top_p) | (top_p >= 1)
    kept[0] = True
    return np.where(logps >= ordered[kept][-1], logps, -np.inf)


def _boxed(step: int) -> str:
    return f"\\boxed{{{step}}}"


def _encode_fresh(
    tokenizer: Any, failure: Failure, *, variables: Mapping[str, Any] | None
) -> np.ndarray:
    question = failure.task.localization(failure.problem, failure.steps)
    return encode_question(tokenizer, question, variables)


def _encode_inline(tokenizer: Any, failure: Failure) -> np.ndarray:
    """In no chat template: the rollout that it goes on from is raw text."""
    question = failure.task.inline_localization(failure.problem, failure.steps)
    return continuation_tokens(tokenizer, question)


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
