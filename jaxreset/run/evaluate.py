"""Held-out problems: responses drawn from the bare prompt, whatever training resets to, and measured.

Each set has a stream of random numbers of its own, named by the training step and a phase that no
training step uses: an evaluation changes nothing of the training around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxreset.models.policy import Policy
from jaxreset.run.estimators import estimate, majority, pass_at_k, powers_of_two
from jaxreset.sampling.rounds import Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.base import Problem, ScoreItems
from jaxreset.tasks.pipeline import Prompt
from jaxreset.tasks.rollouts import CUT, holds_marker
from jaxreset.tasks.scoring import Record, judge, score_together, verdicts

logger = logging.getLogger(__name__)

PHASE = 2**16  # of the random streams, apart from those of training; that of the first set
SECTION = "eval/"  # what the names of metrics begin with


class Responses(NamedTuple):
    """Responses to N problems, K to each.

    Attributes:
      problems: [N].
      texts: [N][K].
      rewards: [N, K] float64.
      solved: [N, K] bool.
      tokens: [N, K] how many there are.
      cut: [N, K] bool, whether a limit ended it.
      answered: [N, K] bool, whether the answer marker is there.
      errors: how many the verifier failed on; their reward is 0.
    """

    problems: list[Problem]
    texts: list[list[str]]
    rewards: np.ndarray
    solved: np.ndarray
    tokens: np.ndarray
    cut: np.ndarray
    answered: np.ndarray
    errors: int


class SetResponses(NamedTuple):
    """What a held-out set was answered with: sampled, and greedily with one response to each problem."""

    name: str
    sampled: Responses
    greedy: Responses


def respond(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    score: ScoreItems,
    decode: Callable[[np.ndarray], str],
    *,
    marker: str,
    batch: int,
    samples: int = 1,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    stream: Stream,
    failed_below: float = 0.5,
    interrupt: Callable[[], None] = lambda: None,
    keep_errors: Callable[[Sequence[Record]], None] = lambda errors: None,
) -> Responses:
    """Draws and verifies `samples` responses to each prompt, `batch` at once; temperature 0 is greedy.

    Each is a group of its own, so that one compiled program draws any number of them. Its random numbers
    are named by the prompt's number and by which of its responses it is: the first doesn't depend on how
    many there are.

    Args:
      marker: the task's answer marker.
      failed_below: a problem is solved where its reward isn't under it.
      interrupt: called before each batch; may raise.
      keep_errors: given records of the responses that the verifier failed on.

    Raises:
      RunError: those are all.
    """
    wanted = [(prompt, row) for prompt in prompts for row in range(samples)]
    items, tokens, reasons = [], [], []
    for first in range(0, len(wanted), batch):
        interrupt()
        members = wanted[first : first + batch]
        round_ = sampler.sample(
            policy,
            [p.tokens for p, _ in members],
            rows=1,
            stream=stream,
            ids=[p.number for p, _ in members],
            first_rows=[row for _, row in members],
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        items += [(p.problem, decode(round_.response(n, 0))) for n, (p, _) in enumerate(members)]
        tokens += [int(length) for length in round_.lengths[:, 0]]
        reasons += [int(reason) for reason in round_.reasons[:, 0]]
    scores = score_together(score, items)
    judged = [verdicts(items, scores)]
    shape = len(prompts), samples
    texts = np.array([text for _, text in items], object).reshape(shape)
    return Responses(
        problems=[p.problem for p in prompts],
        texts=texts.tolist(),
        rewards=scores.rewards.reshape(shape),
        solved=(scores.rewards >= failed_below).reshape(shape),
        tokens=np.array(tokens).reshape(shape),
        cut=np.isin(reasons, CUT).reshape(shape),
        answered=np.array([holds_marker(text, marker) for _, text in items]).reshape(shape),
        errors=judge(judged, step=stream.step, evaluation=True, keep=keep_errors),
    )


def measure(of: SetResponses, answer: Callable[[Problem, str], str | None]) -> dict[str, float]:
    """The metrics of a set, their names without a prefix.

    `accuracy` is the mean over problems of the share of their responses that solve them. `answer` gives the
    final answer of a response: see `Task.answer`.
    """
    sampled, greedy = of.sampled, of.greedy
    count = sampled.solved.shape[1]
    mean, low, high = estimate(sampled.solved.mean(1), most=count)
    metrics = {
        "accuracy": mean,
        "accuracy_low": low,
        "accuracy_high": high,
        "greedy_accuracy": float(greedy.solved.mean()),
        "problems": float(len(sampled.problems)),
        "verifier_errors": float(sampled.errors + greedy.errors),
    }
    for prefix, some in (("", sampled), ("greedy_", greedy)):
        metrics[f"{prefix}response_tokens"] = float(some.tokens.mean())
        metrics[f"{prefix}cut"] = float(some.cut.mean())
        metrics[f"{prefix}answered"] = float(some.answered.mean())
    if count == 1:
        return metrics
    metrics[f"avg@{count}"] = mean
    several = {
        f"pass@{k}": (pass_at_k(sampled.solved, k), count // k) for k in powers_of_two(count)
    }
    several[f"majority@{count}"] = _majorities(of, answer), 1
    for name, (values, most) in several.items():
        metrics |= zip(
            (name, f"{name}_low", f"{name}_high"), estimate(values, most=most), strict=True
        )
    return metrics


def _majorities(of: SetResponses, answer: Callable[[Problem, str], str | None]) -> np.ndarray:
    """Each problem's chance [N] that its most frequent answer is right; says where `answer` fails."""
    failures: list[str] = []

    def read(problem: Problem, text: str) -> str | None:
        try:
            found = answer(problem, text)
            if not isinstance(found, str | None):
                raise TypeError(f"it returned {found!r:.100}: expected a text, or None")
        # A task from outside may raise anything; that one response has no vote is in the warning.
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            return None
        return found

    values = [
        majority([read(problem, text) for text in texts], solved)
        for problem, texts, solved in zip(
            of.sampled.problems, of.sampled.texts, of.sampled.solved, strict=True
        )
    ]
    if failures:
        logger.warning(
            "%s: the task's answer(problem, response) failed on %d of %d responses, which don't vote. "
            "The first: %s",
            of.name, len(failures), of.sampled.solved.size, failures[0],
        )  # fmt: skip
    return np.array(values)


def named(sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of all sets in one: the first set's as `eval/accuracy`, others' as `eval/NAME/accuracy`."""
    return {
        f"{SECTION}{'' if n == 0 else f'{name}/'}{key}": value
        for n, (name, metrics) in enumerate(sets.items())
        for key, value in metrics.items()
    }


def by_set(metrics: Mapping[str, float], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """The reverse of `named`, for sets of these names.

    >>> by_set({"eval/accuracy": 0.5, "eval/hard/accuracy": 0.1, "step": 3}, ["all", "hard"])
    {'all': {'accuracy': 0.5}, 'hard': {'accuracy': 0.1}}
    """
    first, *others = names
    found = {name: dict[str, float]() for name in (first, *others)}
    for key, value in metrics.items():
        if key.startswith(SECTION):
            name, _, last = key.removeprefix(SECTION).rpartition("/")
            found[name or first][last] = value
    return found
