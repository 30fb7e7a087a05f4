"""Problems of several files in turns: whose turn it is follows from the number of the prompt alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any
from zlib import crc32

import grain
import numpy as np

from jaxreset.tasks.base import Problem

LONGEST_ROUND = 100_000  # prompts after which the turns repeat


def shuffled(problems: Sequence[Problem], seed: int) -> Any:
    """An endless sequence of the problems, each pass in an order of its own."""
    source: Any = problems
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


class Mixture:
    """An endless sequence of problems of several files, each shuffled by itself, in turns by weight.

    `grain.MapDataset.mix` would round the weights to hundredths of the smallest one. Here they are exact:
    among the first n problems each file has its share of n to within one. A small file is repeated, and
    reshuffled each time, as often as its turns come.

    Args:
        problems: of each file, by its name.
        weights: of each file, by its name.
        seed: of the shuffles.

    Raises:
        ValueError: a file without problems, or weights whose ratio takes too large numbers.
    """

    def __init__(
        self, problems: Mapping[str, Sequence[Problem]], weights: Mapping[str, float], seed: int
    ):
        for name in weights:
            if not problems.get(name):
                raise ValueError(f"data.path.{name}: no problem is left of it; leave it out")
        # By weight and name, so that the order in which a config names them doesn't matter.
        names = sorted(weights, key=lambda name: (-weights[name], name))
        self._orders = [shuffled(problems[n], (seed + crc32(n.encode())) % 2**32) for n in names]
        self._shares = np.array(whole_numbers({name: weights[name] for name in names}))
        self._files_in_turn = alternation(self._shares.tolist())

    def __getitem__(self, number: int) -> Problem:
        rounds, place = divmod(number, len(self._files_in_turn))
        file, turn = self._files_in_turn[place].tolist()
        return self._orders[file][rounds * int(self._shares[file]) + turn]


def whole_numbers(weights: Mapping[str, float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights.

    >>> whole_numbers({"easy": 0.7, "hard": 0.3})
    [7, 3]

    Raises:
        ValueError: their sum is too large.
    """
    exact = [Fraction(str(weight)) for weight in weights.values()]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    if sum(whole) > LONGEST_ROUND:
        given = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise ValueError(
            f"data.path: weights of {given} are {' : '.join(map(str, whole))} in whole numbers; expected "
            f"a ratio of smaller ones, which add up to at most {LONGEST_ROUND:,}, such as 3 : 1"
        )
    return whole


def alternation(shares: Sequence[int]) -> np.ndarray:
    """Whose turn it is, and which of its turns, `[sum of shares, 2]`, after which all begins anew.

    Turn t of a file with a share s of S is due in [t S / s, (t + 1) S / s); of those that are due, the one
    that ends first is taken. So every share is met to within one (earliest deadline first on one machine).
    """
    total, done = sum(shares), [0] * len(shares)
    taken = np.zeros((total, 2), np.int32)
    for place in range(total):
        due = [f for f, s in enumerate(shares) if done[f] < s and done[f] * total // s <= place]
        file = min(due, key=lambda f: (-(-(done[f] + 1) * total // shares[f]), f))
        taken[place] = file, done[file]
        done[file] += 1
    return taken
