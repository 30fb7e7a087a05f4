"""Which chunks of prefixes are computed, and in which order. What they compute: `test_decoder`."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from jaxreset.sampling.prefilling import chunk_shape, plan_chunks


@given(
    here=st.integers(1, 9),
    shards=st.sampled_from([1, 2, 8]),
    prefix=st.integers(1, 700),
    on_cpu=st.booleans(),
    data=st.data(),
)
def test_every_slot_is_filled_after_those_before_it_and_no_chunk_is_needless(
    here, shards, prefix, on_cpu, data
):
    groups = here * shards
    shape = chunk_shape(groups, prefix, on_cpu=on_cpu, shards=shards)
    places = data.draw(st.lists(st.integers(0, groups - 1), unique=True))
    begins = [data.draw(st.integers(0, prefix - 1)) for _ in places]
    spans = [(begin, data.draw(st.integers(begin, prefix))) for begin in begins]
    chunks = plan_chunks(places, spans, shape, groups=groups, prefix=prefix, shards=shards)
    assert chunks.groups.shape == chunks.starts.shape == (shards * shape.chunks, shape.turns)
    assert chunks.count <= shape.turns
    # Each lane of a turn is on its own shard.
    shard_of_lane = np.arange(shards * shape.chunks)[:, None] // shape.chunks
    assert (chunks.groups // here == shard_of_lane).all()
    filled = np.zeros((groups, prefix), bool)
    for place, (begin, _) in zip(places, spans, strict=True):
        filled[place, :begin] = True
    before = filled.copy()
    for turn in range(chunks.count):
        done = filled.copy()
        for group, start in zip(chunks.groups[:, turn], chunks.starts[:, turn], strict=True):
            assert start + shape.tokens <= prefix
            if group in places:
                assert done[group, :start].all()  # what it attends to was there before this turn
            filled[group, start : start + shape.tokens] = True
    needed = [-(-(end - begin) // shape.tokens) for begin, end in spans]
    for place, (_, end), count in zip(places, spans, needed, strict=True):
        assert filled[place, :end].all()
        if count:  # else it may be what an idle shard computes
            assert (filled[place] & ~before[place]).sum() <= count * shape.tokens
    assert chunks.count == max(
        sum(-(-int(wanting) // shape.chunks) for wanting in level)
        for level in wanting_chunks(places, needed, groups, shards)
    )


def wanting_chunks(places, needed, groups, shards):
    """For each shard, how many of its groups want a first chunk, a second, ..."""
    wanted = np.zeros(groups, int)
    wanted[places] = needed
    levels = np.arange(wanted.max(initial=0))[:, None]
    return [(of_shard > levels).sum(axis=1) for of_shard in np.split(wanted, shards)]
