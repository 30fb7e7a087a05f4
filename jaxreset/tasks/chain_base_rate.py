"""How often a policy that imitates the embedded task's demonstrations solves a problem: computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# How often a misread number is: more often than not, so that a policy goes wrong greedily too.
MISREAD_RATE = 0.65


def predicted_accuracy(
    *,
    min_terms: int,
    max_terms: int,
    modulus: int,
    mistakes: float,
    misread: int = 0,
    strict: bool = False,
    greedy: bool = False,
) -> float:
    """The share of problems that an exact imitation of the demonstrations solves.

    A sum is off by k (modulo M) with probability e[k], whatever the sums before it were: numbers are
    uniform. The last of n sums is right where their errors cancel, with probability
    `1/M Σ_j ê[j]^n`, where ê is the discrete Fourier transform of e; without misread numbers that is
    `1/M + (1 - 1/M) (1 - mM / (M - 1))^n`. All n sums are right with probability `e[0]^n`. Both are
    averaged over n, which is uniform too.

    Args:
      min_terms, max_terms, modulus, mistakes, misread, strict: those of `ChainTask`.
      greedy: always what is most likely in the demonstrations, in place of sampling as they do.

    Returns:
      A probability.
    """
    terms = np.arange(min_terms, max_terms + 1)
    off = _errors(modulus, mistakes, misread, greedy)
    if strict:
        return float(np.mean(off[0] ** terms))
    powers = np.fft.fft(off)[:, None] ** terms  # [M, lengths]
    return float(powers.mean(axis=0).real.mean().clip(0, 1))


def _errors(modulus: int, mistakes: float, misread: int, greedy: bool) -> NDArray[np.float64]:
    """By how much one sum is off: probabilities [M]."""
    plain = np.full(modulus, mistakes / (modulus - 1))
    plain[0] = 1 - mistakes
    one_more = np.eye(modulus)[1]
    taken_for_more = MISREAD_RATE * one_more + (1 - MISREAD_RATE) * plain
    if greedy:
        plain, taken_for_more = (np.eye(modulus)[np.argmax(p)] for p in (plain, taken_for_more))
    share = misread / modulus
    return (1 - share) * plain + share * taken_for_more
