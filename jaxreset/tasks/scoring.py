"""Rewards of a round's rows, verified by all processes, each its share; what a verifier fails on.

A verifier that fails on a response costs that response its reward: it is scored 0, counted, and kept
with the error in `verifier_errors.jsonl`. One that fails on every response to several problems is
broken, and the run ends with what it said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreset.errors import ConfigError, RunError
from jaxreset.json_text import dumps
from jaxreset.parallel import gather, own_share
from jaxreset.tasks.base import Item, ScoreItems, Scores, reward_of

Record = dict[str, Any]

logger = logging.getLogger(__name__)

KEPT_BYTES = 16 * 2**20  # of `verifier_errors.jsonl`; what comes later is only counted
KEPT_CHARACTERS = 8000  # of a response there
SHOWN_CHARACTERS = 300  # of a response in a message


def score_together(score: ScoreItems, items: Sequence[Item]) -> Scores:
    """`score(items)`, the same in every process; each must call it with the same items.

    A response on which `score` raises, or to which it gives what is no reward, scores 0.

    Raises:
      RunError: it gives another number of rewards than there are items, or as `score` does.
      Exception: what `score` raised, where no response by itself is the cause.
    """
    share = own_share(len(items))
    own = score_alone(score, items[share.start : share.stop])
    mine = [
        (
            r,
            i in own.timeouts,
            i in own.errors,
            {n: float(part[i]) for n, part in own.parts.items()},
        )
        for i, r in enumerate(own.rewards.tolist())
    ]
    rewards, timed_out, failed, parts = zip(*gather(mine), strict=True) if items else ((),) * 4
    names = parts[0] if parts else ()
    return Scores(
        np.asarray(rewards, np.float64),
        tuple(i for i, fired in enumerate(timed_out) if fired),
        tuple(i for i, failure in enumerate(failed) if failure),
        tuple(gather(own.reasons)) if any(failed) else (),
        {name: np.asarray([part[name] for part in parts], np.float64) for name in names},
    )


def score_alone(score: ScoreItems, items: Sequence[Item]) -> Scores:
    """As `score_together`, in this process; where it raises for all, the responses one by one."""
    try:
        return _checked(score(items), len(items))
    except (RunError, ConfigError):
        raise
    except Exception as error:
        alone = [_score_one(score, item) for item in items]
        failed = [i for i, scores in enumerate(alone) if scores.errors]
        if not failed:
            raise error from None
        rewards = np.array([scores.rewards[0] for scores in alone], np.float64)
        timeouts = tuple(i for i, scores in enumerate(alone) if scores.timeouts)
        names = {name for scores in alone for name in scores.parts}
        nothing = np.zeros(1)
        parts = {n: np.array([s.parts.get(n, nothing)[0] for s in alone]) for n in sorted(names)}
        reasons = tuple(alone[i].reasons[0] for i in failed)
        return Scores(rewards, timeouts, tuple(failed), reasons, parts)


def _score_one(score: ScoreItems, item: Item) -> Scores:
    """A response's; where the verifier raises, that is its error."""
    try:
        return _checked(score([item]), 1)
    except (RunError, ConfigError):
        raise
    except Exception as error:
        return Scores(np.zeros(1), (), (0,), (f"{type(error).__name__}: {error}",))


def _checked(scores: Scores | Sequence[float], count: int) -> Scores:
    """With float64 rewards `[count]`; those that are none are errors. A NaN is left as it is."""
    if not isinstance(scores, Scores):
        scores = Scores(scores, ())  # type: ignore[arg-type]  # made of numbers below
    given = list(scores.rewards)
    if len(given) != count:
        raise RunError(
            f"the task gave {len(given)} rewards for {count} responses: one each is needed"
        )
    errors = dict(zip(scores.errors, scores.reasons, strict=True))
    rewards = np.zeros(count, np.float64)
    for i, value in enumerate(given):
        try:
            rewards[i] = reward_of(value)
        except (TypeError, ValueError, OverflowError) as error:
            errors[i] = f"{type(error).__name__}: {error}"
    failed = sorted(errors)
    reasons = tuple(errors[i] for i in failed)
    return Scores(rewards, scores.timeouts, tuple(failed), reasons, scores.parts)


class Verdicts(NamedTuple):
    """What a verifier made of the responses of a step, or of an evaluation.

    Attributes:
      scored: how many it was given.
      problems: ids of their problems.
      errors: records of those that it failed on.
    """

    scored: int
    problems: frozenset[str]
    errors: tuple[Record, ...]


def verdicts(items: Sequence[Item], scores: Scores) -> Verdicts:
    """The verdicts on `items`."""
    errors = [
        {"problem": items[i][0].id, "response": items[i][1][:KEPT_CHARACTERS], "error": reason}
        for i, reason in zip(scores.errors, scores.reasons, strict=True)
    ]
    return Verdicts(len(items), frozenset(problem.id for problem, _ in items), tuple(errors))


def judge(
    rounds: Iterable[Verdicts],
    *,
    step: int,
    evaluation: bool,
    keep: Callable[[Sequence[Record]], None],
) -> int:
    """Keeps and names what the verifier failed on; returns on how many responses.

    Args:
      rounds: of one step, or of one evaluation.
      step: which.
      evaluation: whether they are an evaluation's.
      keep: is given the records.

    Raises:
      RunError: it failed on every response, to at least two problems: it is broken, not they.
    """
    rounds = list(rounds)
    errors = [{"step": step, "evaluation": evaluation, **e} for r in rounds for e in r.errors]
    if not errors:
        return 0
    keep(errors)
    first, scored = errors[0], sum(r.scored for r in rounds)
    response = first["response"][:SHOWN_CHARACTERS]
    last_line = first["error"].strip().rpartition("\n")[2][:SHOWN_CHARACTERS]
    case = f"problem {first['problem']!r}, response {response!r}: {last_line}"
    if len(errors) == scored and len(frozenset().union(*(r.problems for r in rounds))) > 1:
        raise RunError(
            f"the verifier failed on all {scored} responses of "
            f"{'the evaluation at ' if evaluation else ''}step {step}, so it is the verifier that is "
            f"broken. Mend it, and start the same command again. The first: {case}"
        )
    logger.warning(
        "step %d: the verifier failed on %d of %d responses, scored 0. The first: %s",
        step, len(errors), scored, case,
    )  # fmt: skip
    return len(errors)


def keep_errors(file: Path, errors: Sequence[Record]) -> None:
    """Appends the records to the file, as far as it has room."""
    lines = [dumps(error) + "\n" for error in errors]
    size = file.stat().st_size if file.exists() else 0
    with file.open("a") as out:
        for line in lines:
            size += len(line)
            if size > KEPT_BYTES:
                return
            out.write(line)
