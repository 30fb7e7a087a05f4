"""A round dealt out to threads and shards, drawn, and put together again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import jax
import numpy as np

from jaxreset.models.decoder import Store
from jaxreset.models.policy import Policy
from jaxreset.sampling.drawing import Rows, Spent, Start, pad_start
from jaxreset.sampling.places import dealt, places_on
from jaxreset.sampling.programs import Programs
from jaxreset.sampling.rounds import Held, Round, Shape, Snapshot
from jaxreset.sampling.threads import deal, run_side_by_side
from jaxreset.sampling.tokens import Draws


def draw_round(
    programs: Programs,
    policy: Policy,
    shape: Shape,
    prepare: Callable[[Shape, np.ndarray, np.ndarray], Store],
    starts: Start,
    prefixes: list[np.ndarray],
    prompt_lengths: Sequence[int],
    draws: Draws,
    shards: Sequence[int] | None = None,
    release: Round | None = None,
) -> Round:
    """Draws all rows of a round.

    Args:
      programs: that draw.
      policy: whose weights draw.
      shape: of the round.
      prepare: (sizes, groups, their places) -> the prefix store of some groups, or of each of their parts.
      starts: what all rows begin with.
      prefixes, prompt_lengths: of the groups.
      draws: how tokens are drawn.
      shards: where each group must stand; None: they are dealt evenly.
      release: a round that is read by `prepare` for the last time.
    """
    memory = programs.memory(policy)
    part, holds = memory.part(shape), memory.holds(shape)
    cuts = shape.rows // part.rows

    def prepared(groups: range) -> tuple[range, np.ndarray, Start, Store]:
        members = np.repeat(groups, cuts)
        shard_of = dealt(len(members), programs.shards)
        if shards is not None:
            shard_of = np.asarray(shards)[members]
        places = places_on(shard_of, part.groups, programs.shards)
        start = jax.tree.map(lambda x: x[members], starts)
        first_rows = start.first_rows + np.tile(
            np.arange(cuts, dtype=np.int32) * part.rows, len(groups)
        )
        start = pad_start(start._replace(first_rows=first_rows), part.groups, places)
        return groups, places, start, prepare(part, members, places)

    def draw(
        groups: range, places: np.ndarray, start: Start, prefix: Store
    ) -> tuple[Rows, Held | None, Spent]:
        rows, pages, spent = programs.draw(policy, part, prefix, start, draws, hold=holds)
        whole = len(groups), shape.rows
        rows = jax.tree.map(lambda x: x[places].reshape(*whole, *x.shape[2:]), rows)
        return rows, None if pages is None else Held(groups, places, prefix, pages), spent

    programs.layout(policy)  # once, before threads ask for it side by side
    parts = deal(len(prefixes), memory.threads_of(shape.rows))
    ready = run_side_by_side([partial(prepared, groups) for groups in parts])
    if release is not None:
        release.release()
    threads = [partial(draw, *beginning) for beginning in ready]
    drawn, held, spent = zip(*run_side_by_side(threads), strict=True)
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *drawn)
    return Round(
        ids=np.asarray(starts.ids, np.int64),
        prefixes=prefixes,
        prompt_lengths=np.asarray(prompt_lengths, np.int64),
        tokens=rows.tokens,
        lengths=rows.lengths,
        behavior_logps=rows.behavior_logps,
        sampling_logps=rows.sampling_logps,
        reasons=rows.reasons,
        version=policy.version,
        shape=shape,
        lane_steps=sum(s.lane_steps for s in spent),
        prefix_reads=sum(s.prefix_reads for s in spent),
        held=tuple(h for h in held if h is not None),
        weights=policy.weights,
    )


def together(
    snapshots: Sequence[Snapshot], batch: int, *, shards: int, shard: Callable[[Snapshot], int]
) -> list[Hashable]:
    """Names that are equal where snapshots may be resumed in one call: they are of one round, and no more
    of them on a shard than a call of `batch` has room for.

    Args:
      shards, shard: a sampler's, see `sampler.Sampler`.
    """
    calls, met = list[Hashable](), Counter[Hashable]()
    for snapshot in snapshots:
        room = batch // (shards if snapshot.round.held else 1)
        place = id(snapshot.round), shard(snapshot)
        calls.append((id(snapshot.round), met[place] // room))
        met[place] += 1
    return calls
