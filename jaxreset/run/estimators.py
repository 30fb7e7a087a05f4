"""What several responses to each problem say: pass@k, the majority's answer, and how sure a mean is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A mean of values between 0 and 1, with its 95% interval."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray, *, most: int = 1) -> Estimate:
    """The mean over problems, with the interval that has the problems for independent, not the responses.

    The interval is Wilson's, for as many trials as would give a share of this size the variance that the
    values have: at least one a problem, which is all that there is where each has one response. In
    simulations it covers the truth more often than a percentile bootstrap over problems, which has no width
    at all where every value is the same.

    Args:
      values: [N] each between 0 and 1; responses to one problem go into one value.
      most: independent trials that a value may be worth at most.
    """
    n, mean = len(values), float(np.mean(values))
    trials = float(n)
    if n > 1 and 0 < mean < 1:
        spread = float(np.var(values, ddof=1))
        trials = min(n * max(mean * (1 - mean) / max(spread, 1e-12), 1.0), n * most)
    middle, shrink = mean + Z**2 / (2 * trials), 1 + Z**2 / trials
    width = Z * math.sqrt(mean * (1 - mean) / trials + Z**2 / (4 * trials**2))
    low, high = (middle - width) / shrink, (middle + width) / shrink
    return Estimate(mean, max(low, 0.0) if mean else 0.0, min(high, 1.0) if mean < 1 else 1.0)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, and `most`.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return [*(2**i for i in range((most - 1).bit_length())), most]


def pass_at_k(solved: np.ndarray, k: int) -> np.ndarray:
    """Each problem's chance that some of `k` responses solve it, without bias (arXiv 2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k): of all choices of k among n responses, the share with one of c right ones.
    In integers up to the last division, so nothing is lost where n is large.

    Args:
      solved: [N, n] bool.
      k: at most n.

    Returns:
      [N] float64.

    >>> pass_at_k(np.array([[True, False, False]]), 2).round(4)
    array([0.6667])
    """
    n = solved.shape[1]
    every = math.comb(n, k)
    counts, place = np.unique(solved.sum(1), return_inverse=True)
    return np.array([(every - math.comb(n - int(c), k)) / every for c in counts])[place]


def majority(answers: Sequence[str | None], solved: Sequence[bool]) -> float:
    """The chance that the most frequent answer to a problem is right; 0 where there is no answer.

    Tied answers are equally likely to be chosen. An answer that was judged both right and wrong, such as
    where a deadline fired, is right by the share of its responses that were.

    Args:
      answers: of each response; None: it has none, and isn't counted.
      solved: whether each was judged right.

    >>> majority(["6", "7", "6", "7", None], [True, False, True, False, False])
    0.5
    """
    votes = defaultdict[str, list[bool]](list)
    for answer, right in zip(answers, solved, strict=True):
        if answer is not None:
            votes[answer].append(bool(right))
    most = max(map(len, votes.values()), default=0)
    leading = [sum(v) / len(v) for v in votes.values() if len(v) == most]
    return sum(leading) / len(leading) if leading else 0.0
