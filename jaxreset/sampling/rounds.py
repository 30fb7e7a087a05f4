"""What a sampling call returns, when its rows end, and the points in it that one can go back to."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType

import numpy as np

from jaxreset.models.decoder import Store

NO_LIMIT = 2**30  # tokens or steps
PHASES_APART = 0x9E3779B9  # odd, so that adding it meets every phase before one comes again


class StopReason(enum.IntEnum):
    """Why a row ended."""

    RUNNING = 0
    EOS = 1
    ANSWER = 2  # the end of the step that holds the answer marker
    STOP_STRING = 3
    STEPS = 4  # the most steps that a response may have
    BUDGET = 5  # too few tokens left for another step
    LENGTH = 6  # cut in the middle of a step


@dataclass(frozen=True)
class StopRules:
    """When a response ends, besides at an end-of-sequence token or a stop string.

    Attributes:
      max_response: most tokens after the prompt, kept ones counted.
      max_steps: most steps, kept ones counted.
      max_step_tokens: a step ends at so many tokens; and where fewer than this many are left at the end
        of a step, no other is begun. None: neither.
    """

    max_response: int
    max_steps: int | None = None
    max_step_tokens: int | None = None


class Shape(NamedTuple):
    """Sizes of a round: groups N, rows K, prefix slots P, suffix slots S."""

    groups: int
    rows: int
    prefix: int
    suffix: int


class Stream(NamedTuple):
    """Names the random numbers of one sampling call; equal streams draw equal tokens.

    Together with a prompt's id, the row and the position it seeds each draw on its own, so a row's
    tokens don't depend on the batch that it is drawn in. `phase` tells the calls of a step apart.
    """

    seed: int
    step: int = 0
    phase: int = 0


def apart(stream: Stream, used: Sequence[Stream]) -> Stream:
    """The stream, or where it was `used` the first that wasn't, in phases far from any that are counted.

    >>> apart(Stream(7, phase=1), [Stream(7)])
    Stream(seed=7, step=0, phase=1)
    >>> apart(Stream(7), [Stream(7)])
    Stream(seed=7, step=0, phase=2654435769)
    """
    while stream in used:
        stream = stream._replace(phase=(int(stream.phase) + PHASES_APART) % 2**32)
    return stream


class Pages(NamedTuple):
    """Keys and values of N groups of K rows, as far as they were drawn.

    Attributes:
      stores: pages of any width, A × B rows each, by their numbers.
      page: [N, K] the page of a row; -1: nothing is kept of it.
      cell: [N, K] its number on the page, a * B + b.
    """

    stores: dict[int, Store]
    page: np.ndarray
    cell: np.ndarray


class Held(NamedTuple):
    """Keys and values of a round on the device: of those `groups` that one stream drew.

    `places`: [len(groups)] where each group stands in the stores; see `sampling.places`.
    """

    groups: range
    places: np.ndarray
    prefix: Store
    pages: Pages

    def place(self, group: int) -> int:
        """Where a group of the round stands."""
        return int(self.places[group - self.groups.start])


@dataclass(eq=False)  # rounds are told apart by identity
class Round:
    """N groups of K rows each; every row continues its group's prefix.

    Attributes:
      ids: [N] the prompts' global indices, which seed the draws.
      prefixes: N int32 arrays, the prefix tokens: the prompt, and the kept part of a response.
      prompt_lengths: [N] tokens of each prefix that are prompt.
      tokens: [N, K, S] int32, right-padded; the end-of-sequence token is among them.
      lengths: [N, K] tokens drawn in each row.
      behavior_logps: [N, K, S] float32, log-softmax(logits / T) of each token: what losses use.
      sampling_logps: [N, K, S] float32, under the truncated distribution that was drawn from.
      reasons: [N, K] `StopReason`.
      version: the weights' version that drew it.
      shape: sizes of its caches; the group axis may be padded.
      lane_steps: decoding steps times lanes; what `lengths.sum()` falls short of it was idle.
      prefix_reads: decoding steps times the prefixes that were attended to.
      held: its keys and values; none: `resume` prefills.
      weights: the policy's that drew it, see `Policy.weights`; empty: unknown.
      streams: that drew it: those of the rounds that it goes back to, and its own, the last.
    """

    ids: np.ndarray
    prefixes: list[np.ndarray]
    prompt_lengths: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    behavior_logps: np.ndarray
    sampling_logps: np.ndarray
    reasons: np.ndarray
    version: int
    shape: Shape
    lane_steps: int
    prefix_reads: int
    held: tuple[Held, ...]
    weights: tuple[ReferenceType[Any], ...] = ()
    streams: tuple[Stream, ...] = ()

    def release(self) -> None:
        """Lets its keys and values go."""
        self.held = ()

    def suffix(self, group: int, row: int) -> np.ndarray:
        """The tokens that a row drew."""
        return self.tokens[group, row, : self.lengths[group, row]]

    def response(self, group: int, row: int) -> np.ndarray:
        """All tokens after the prompt: kept ones and drawn ones."""
        kept = self.prefixes[group][self.prompt_lengths[group] :]
        return np.concatenate([kept, self.suffix(group, row)])

    def prompt(self, group: int) -> np.ndarray:
        """The prompt's tokens."""
        return self.prefixes[group][: self.prompt_lengths[group]]


class Snapshot(NamedTuple):
    """A point to resume from: the first `length` tokens, prompt included, of a row of a round.

    The cache is append-only, so this is all there is to it; the round must still be held.
    """

    round: Round
    group: int
    row: int
    length: int

    @property
    def tokens(self) -> np.ndarray:
        """The `length` tokens that are kept."""
        prefix = self.round.prefixes[self.group]
        row = self.round.suffix(self.group, self.row)
        return np.concatenate([prefix, row])[: self.length]
