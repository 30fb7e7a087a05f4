"""Lays groups of any lengths into microbatches of few fixed shapes, which is what a jitted update takes.

A bin holds prefixes end to end in its prefix slots and their suffixes end to end in its lanes (see
`models.packing`), so one size serves groups short and long, and little of it is padding. The same
groups in the same order are packed in the same way on every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxreset.groups import Group
from jaxreset.models.packing import Packing

Leaf = Any  # of a pytree built on the host with numpy, and traced inside jit

SUFFIXES_A_LANE = 4  # more would share a lane only where most are far shorter than they may be
# Prefix slots of a bin over its lanes' slots: few for groups from prompts, more for those from resets.
PREFIX_SHARES = 1 / 8, 5 / 16


class GroupBatch(NamedTuple):
    """A microbatch of N bins for `Decoder.suffix_hidden`, and its suffixes, C to a bin.

    Attributes:
      prefix: [N, P] int32, tokens of prefixes but for the last of each.
      rows: [N, K, S] int32 inputs: of each suffix the last prefix token, then its own but for the last.
      targets: [N, K, S] int32, the suffixes' tokens, each predicted from the input in its place.
      packing: which group and suffix each of them is of.
      cells: [N, C, S] int32, where among a bin's K * S slots each token of a suffix is.
      lengths: [N, C] int32, tokens of the suffixes; 0: no suffix.
      advantages, behavior_logps: [N, C, S] float32, of each token.
      old_logps, reference_logps: the same of the trainer's policy before the step's first update and of the
        policy that training started from, where the loss needs them.
    """

    prefix: Leaf
    rows: Leaf
    targets: Leaf
    packing: Packing
    cells: Leaf
    lengths: Leaf
    advantages: Leaf
    behavior_logps: Leaf
    old_logps: Leaf | None = None
    reference_logps: Leaf | None = None

    @property
    def slots(self) -> int:
        """Tokens that it has room for."""
        return self.prefix.size + self.rows.size

    @property
    def tokens(self) -> int:
        """Tokens in it; on the host only."""
        return int((self.packing.prefix_groups > 0).sum() + (self.packing.groups > 0).sum())


class PackShape(NamedTuple):
    """Sizes of a microbatch: bins N, lanes K and prefix slots P of a bin, slots S of a lane.

    A bin holds any group of K suffixes of S tokens behind a prefix of P + 1.
    """

    bins: int
    lanes: int
    prefix: int
    slots: int


def pack_shapes(
    lanes: int, prefix: int, slots: int, *, tokens: int, shards: int = 1, multiple: int = 1
) -> list[PackShape]:
    """At most four sizes of microbatches: two widths of the prefix, each with many bins and with few.

    Args:
      lanes, slots: of a bin, see `PackShape`.
      prefix: the least prefix slots.
      tokens: most slots of a microbatch, though it has at least a bin for each shard.
      shards: that the bins are split over.
      multiple: of which the prefix slots are one, so that they can be split too.

    >>> [tuple(shape) for shape in pack_shapes(8, 100, 50, tokens=10_000)]
    [(20, 8, 100, 50), (2, 8, 100, 50), (19, 8, 125, 50), (2, 8, 125, 50)]
    >>> [tuple(shape) for shape in pack_shapes(4, 68, 56, tokens=10_000)]
    [(34, 4, 70, 56), (4, 4, 70, 56)]
    >>> [tuple(shape) for shape in pack_shapes(8, 100, 200, tokens=500)]
    [(1, 8, 100, 200)]
    """
    shapes, room = [], tokens // shards - lanes * slots
    shares = (max(prefix, int(share * lanes * slots)) for share in (0, *PREFIX_SHARES))
    least, *wanted = (-(-width // multiple) * multiple for width in shares)
    widths = list(dict.fromkeys([width for width in wanted if width <= room] or [least]))
    if len(widths) == 2 and 8 * widths[1] < 9 * widths[0]:  # almost alike: one does for both
        widths = widths[1:]
    for width in widths:
        bins = max(tokens // ((width + lanes * slots) * shards), 1)
        few = max(bins // 8, 1)
        shapes += [PackShape(n * shards, lanes, width, slots) for n in dict.fromkeys((bins, few))]
    return shapes


def pack(groups: Sequence[Group], shapes: Sequence[PackShape]) -> list[GroupBatch]:
    """Lays groups into microbatches, of the kind of bin that takes the fewest slots for all of them.

    Args:
      groups: of any lengths that a bin holds.
      shapes: of `pack_shapes`: of each kind of bin the most of them first.

    Returns:
      Microbatches of these shapes; the last may end with empty bins. Groups without tokens are left out.

    Raises:
      ValueError: a group that no bin holds, with its sizes; advantages that aren't one for each suffix or,
        where they are given so, for each token.
    """
    kinds: dict[tuple[int, ...], list[PackShape]] = {}
    for shape in shapes:
        kinds.setdefault(shape[1:], []).append(shape)
    best: list[tuple[PackShape, list[_Bin]]] = []
    for number, sizes in enumerate(kinds.values()):
        parts = _split(_fill_bins(groups, sizes[0]), sizes)
        if number == 0 or _slots(parts) < _slots(best):
            best = parts
    return [_lay(bins, shape) for shape, bins in best]


def empty_batch(shape: PackShape) -> GroupBatch:
    """A microbatch of padding."""
    return _lay([], shape)


@dataclass
class _Bin:
    """Room left in a bin, and its groups: the start of each prefix, and lane and start of its suffixes."""

    prefix: int
    suffixes: int
    lanes: list[int]
    members: list[tuple[Group, int, list[tuple[int, int]]]]


def _split(bins: list[_Bin], sizes: Sequence[PackShape]) -> list[tuple[PackShape, list[_Bin]]]:
    """The bins of each microbatch."""
    parts = []
    while bins:
        # One that is nearly full is cheaper than several smaller ones.
        size = next((s for s in sizes if 8 * len(bins) >= 7 * s.bins), sizes[-1])
        parts.append((size, bins[: size.bins]))
        bins = bins[size.bins :]
    return parts


def _slots(parts: Sequence[tuple[PackShape, list[_Bin]]]) -> int:
    return sum(size.bins * (size.prefix + size.lanes * size.slots) for size, _ in parts)


def _fill_bins(groups: Sequence[Group], shape: PackShape) -> list[_Bin]:
    """One bin after the other; of the groups that it has room for, it takes the one that suits it best.

    That is the one whose prefix and suffix are largest where the bin has most room (the greedy rule by
    dot products of vector bin packing, Panigrahy et al. 2011).
    """
    left = [group for group in groups if group.tokens]
    sizes = np.array([(len(g.prefix) - 1, g.tokens) for g in left]).reshape(-1, 2)
    longest = np.array([max(map(len, g.suffixes)) for g in left])
    waiting = np.ones(len(left), bool)
    most = np.array([max(shape.prefix, 1), shape.lanes * shape.slots])
    bins = []
    while waiting.any():
        bin = _Bin(shape.prefix, shape.lanes * SUFFIXES_A_LANE, [shape.slots] * shape.lanes, [])
        taken: int | None = -1
        while taken is not None:
            room = np.array([bin.prefix, sum(bin.lanes)])
            fits = waiting & (sizes <= room).all(axis=1) & (longest <= max(bin.lanes))
            suits = (sizes / most) @ (room / most)
            order = np.argsort(-suits, kind="stable")
            taken = next(
                (n for n in order[fits[order]].tolist() if _add(left[n], bin, shape)), None
            )
            if taken is not None:
                waiting[taken] = False
        if not bin.members:
            odd = left[int(waiting.argmax())]
            need = len(odd.suffixes), len(odd.prefix), max(map(len, odd.suffixes))
            raise ValueError(
                f"a group of (suffixes, prefix, longest suffix) {need} fits in no bin of {shape}"
            )
        bins.append(bin)
    return bins


def _add(group: Group, bin: _Bin, shape: PackShape) -> bool:
    """Lays the group into the bin, where its lanes have room for it."""
    if len(group.suffixes) > bin.suffixes:
        return False
    room, places = bin.lanes.copy(), [(-1, -1)] * len(group.suffixes)
    for j in sorted(range(len(group.suffixes)), key=lambda j: -len(group.suffixes[j])):
        length = len(group.suffixes[j])
        # The fullest lane with room for it, so that others stay free for long ones.
        wide_enough = [k for k in range(len(room)) if room[k] >= length]
        if not wide_enough:
            return False
        lane = min(wide_enough, key=room.__getitem__)
        places[j] = lane, shape.slots - room[lane]
        room[lane] -= length
    bin.members.append((group, shape.prefix - bin.prefix, places))
    bin.prefix -= len(group.prefix) - 1
    bin.suffixes -= len(group.suffixes)
    bin.lanes = room
    return True


def _lay(bins: Sequence[_Bin], shape: PackShape) -> GroupBatch:
    n, k, p, s = shape
    c = k * SUFFIXES_A_LANE
    ints = partial(np.zeros, dtype=np.int32)
    lanes = partial(ints, (n, k, s))
    packing = Packing(ints((n, p)), ints((n, p)), lanes(), lanes(), lanes())
    batch = GroupBatch(
        prefix=ints((n, p)),
        rows=lanes(),
        targets=lanes(),
        packing=packing,
        cells=ints((n, c, s)),
        lengths=ints((n, c)),
        advantages=np.zeros((n, c, s), np.float32),
        behavior_logps=np.zeros((n, c, s), np.float32),
    )
    for i, filled in enumerate(bins):
        number = 0  # of the suffix in the bin
        for id_, (group, start, places) in enumerate(filled.members, 1):
            held = len(group.prefix) - 1
            prefix_slots = i, slice(start, start + held)
            batch.prefix[prefix_slots] = group.prefix[:-1]
            packing.prefix_groups[prefix_slots] = id_
            packing.prefix_positions[prefix_slots] = np.arange(held)
            advantages = _token_advantages(group)
            for j, (lane, first) in enumerate(places):
                suffix, length = group.suffixes[j], len(group.suffixes[j])
                slots = i, lane, slice(first, first + length)
                batch.rows[slots] = [group.prefix[-1], *suffix[:-1]][:length]
                batch.targets[slots] = suffix
                packing.groups[slots] = id_
                packing.suffixes[slots] = number + 1
                packing.positions[slots] = held + np.arange(length)
                batch.cells[i, number, :length] = lane * s + first + np.arange(length)
                batch.lengths[i, number] = length
                batch.advantages[i, number, :length] = advantages[j]
                batch.behavior_logps[i, number, :length] = group.behavior_logps[j]
                number += 1
    return batch


def _token_advantages(group: Group) -> list[np.ndarray]:
    """Of each suffix, one for each token."""
    lengths = [len(suffix) for suffix in group.suffixes]
    if group.token_advantages is None:
        return [np.full(n, a) for n, a in zip(lengths, group.advantages, strict=True)]
    shapes = [np.shape(values) for values in group.token_advantages]
    if shapes != [(n,) for n in lengths]:
        raise ValueError(
            f"token_advantages have shapes {shapes}, expected one value for each token of suffixes of "
            f"{lengths} tokens"
        )
    return group.token_advantages
