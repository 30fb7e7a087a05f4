"""In which sizes rounds are drawn, which of them are held, and the bytes that this takes of a device.

The sampler asks before it draws, and a plan asks about devices that aren't there: both get one answer.

    a round drawn     prefixes N × P, rows N × K × S in their places or on pages, lanes beside them
    a round held      prefixes N × P, rows N × K × S; let go when its last resets have gathered theirs
    for decoding      a copy of the parameters, where they don't decode as they are (`models.decoding_copy`)
    compiling         nothing: programs are compiled from shapes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxreset.models.block import DecoderConfig
from jaxreset.parallel import data_shards
from jaxreset.sampling.lanes import page_rows
from jaxreset.sampling.places import cut_over
from jaxreset.sampling.rounds import Shape
from jaxreset.sampling.schedule import LaneShape, lane_shapes
from jaxreset.sampling.threads import LARGE_WEIGHTS, cores

HoldCache = Literal["auto", "always", "never"]

HELD_SHARE = 1 / 3  # of a device's memory that a round may hold on to with hold_cache="auto"
CPU_SLOTS = 32  # more lanes make none cheaper there: their keys and values leave the cache


@dataclass(frozen=True)
class RoundMemory:
    """How a sampler draws rounds of a policy.

    Attributes:
      model: sizes of the policy.
      weights: bytes of its parameters, on all devices.
      on_cpu: whether the devices are a machine's cores.
      device_bytes: memory of a device.
      mesh, slots, threads, hold_cache: as of `sampler.Sampler`.
      parents: rounds that others go back to; None: any may be.
    """

    model: DecoderConfig
    weights: int
    on_cpu: bool
    device_bytes: int
    mesh: Mesh | None = None
    slots: int | None = None
    threads: int | None = None
    hold_cache: HoldCache = "auto"
    parents: frozenset[Shape] | None = None

    @property
    def shards(self) -> int:
        """Into how many parts the groups of a round are split."""
        return data_shards(self.mesh)

    def threads_of(self, rows: int) -> int:
        """Threads that draw a round of groups of `rows`: no more than `slots` has room for."""
        most = 1
        if self.threads is not None:
            most = self.threads
        elif self.on_cpu and self.mesh is None:
            most = cores() if self.weights <= LARGE_WEIGHTS else 1
        return most if self.slots is None else max(min(most, self.slots // rows), 1)

    def part(self, shape: Shape) -> Shape:
        """Sizes of what one thread draws of a round; see `places.cut_over`."""
        groups = -(-shape.groups // self.threads_of(shape.rows))
        return cut_over(shape._replace(groups=groups), self.shards)

    def lanes(self, part: Shape) -> list[LaneShape]:
        """Sizes of the lanes that one thread may decode its part of a round in."""
        slots = CPU_SLOTS if self.on_cpu else None
        if self.slots is not None:
            slots = self.slots // self.threads_of(part.rows)
        return lane_shapes(*part, slots=slots, shards=self.shards)

    def holds(self, shape: Shape) -> bool:
        """Whether a round of that shape keeps its keys and values, so that resets gather theirs."""
        if self.part(shape).rows < shape.rows:
            return False  # its groups are cut
        if self.hold_cache != "auto":
            return self.hold_cache == "always"
        if self.parents is not None and shape not in self.parents:
            return False
        return self.held_bytes(shape) <= HELD_SHARE * self.device_bytes

    def held_bytes(self, shape: Shape) -> int:
        """Bytes on a device of a round that is held."""
        n, k, p, s = part = self.part(shape)
        lanes = self.lanes(part)[0]
        own = n * k * s
        if lanes[:2] != (n, k):  # on pages, one of which is the last lanes
            own = self._page_slots(n * k, s) + lanes.groups * lanes.rows * s
        return self._threads_drawing(shape) * self._bytes(n * p + own)

    def prefix_bytes(self, shape: Shape) -> int:
        """Bytes on a device of a round's prefixes."""
        part = self.part(shape)
        return self._threads_drawing(shape) * self._bytes(part.groups * part.prefix)

    def drawing_bytes(self, shape: Shape) -> int:
        """Bytes on a device at the worst moment of drawing a round, which may be held then."""
        part = self.part(shape)
        lanes = self.lanes(part)
        in_place = lanes[0][:2] == part[:2]
        beside = self._beside_in_place if in_place else self._beside_pages
        most = max(self._segment_slots(part, at) + beside(shape, at) for at in lanes)
        slots = part.groups * part.prefix + most
        return self._threads_drawing(shape) * self._bytes(slots)

    def _segment_slots(self, part: Shape, at: LaneShape) -> int:
        """Slots of lanes, and of copies in their program: of a narrow window, of prefixes not in place."""
        m, k, window = at
        copied = m * k * window if window < part.suffix else 0
        prefixes = m * part.prefix if (m, k) != part[:2] else 0
        return m * k * part.suffix + copied + prefixes

    def _beside_in_place(self, shape: Shape, at: LaneShape) -> int:
        """Slots beside a segment's and the prefixes where all rows start in their places."""
        n, k, _, s = self.part(shape)
        if at[:2] == (n, k):
            return 0
        # The places that rows came from and go back to; once they are dropped, pages and fewer lanes.
        return max(n * k * s, self._page_slots(at.groups * at.rows, s))

    def _beside_pages(self, shape: Shape, at: LaneShape) -> int:
        """Slots beside a segment's and the prefixes where more rows wait than have a lane."""
        n, k, _, s = part = self.part(shape)
        spare = max((x.groups * x.rows * s for x in self.lanes(part) if x[:2] != at[:2]), default=0)
        rows, window = n * k, s
        if not self.holds(shape):  # some that wait have filled a quarter, some all
            rows, window = n * k - at.groups * at.rows, -(-s // 2)
        return spare + self._page_slots(rows, window)

    def _page_slots(self, rows: int, window: int) -> int:
        """Of the pages that so many rows are written to."""
        on_page = page_rows(window, self.shards)
        return -(-rows // on_page) * on_page * window

    def _threads_drawing(self, shape: Shape) -> int:
        """That have groups to draw."""
        return -(-shape.groups // -(-shape.groups // self.threads_of(shape.rows)))

    def _bytes(self, slots: int) -> int:
        """Of so many slots in all groups, on one device."""
        c, heads = self.model, self.model.kv_heads
        if self.mesh is not None and heads % self.mesh.shape["tensor"] == 0:
            heads //= self.mesh.shape["tensor"]
        numbers = 2 * c.layers * heads * c.head_dim * (slots // self.shards)
        return numbers * jnp.dtype(c.dtype).itemsize
