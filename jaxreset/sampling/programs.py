"""The jitted programs of `decoding` for one set of stop conditions and one mesh, called from the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxreset.models.decoder import Decoder, DecoderConfig, Store, unstack, unstacked_graph
from jaxreset.models.policy import Policy
from jaxreset.parallel import decode_shardings, rows_sharding
from jaxreset.sampling import decoding
from jaxreset.sampling.decoding import Cells, Drawn, Lanes, Limits
from jaxreset.sampling.drawing import (
    Decode,
    Rows,
    Spent,
    Start,
    draw_rows,
    idle_cells,
    idle_lanes,
)
from jaxreset.sampling.lanes import LaneCache, Moves
from jaxreset.sampling.rounds import Held, Shape, Snapshot
from jaxreset.sampling.schedule import Costs, LaneShape, lane_shapes
from jaxreset.sampling.streams import LARGE_WEIGHTS, cores
from jaxreset.sampling.tokens import Draws
from jaxreset.steps import StepAutomaton

# Of a decoding step, in times of a row's matrix products. Reading the weights takes as long as the
# products of so many rows (operations over bytes a second), and reading what one attends to is slower.
CPU_STEP, ACCELERATOR_STEP = 8.0, 256.0
ATTENTION_RATE = 10.0
CPU_SLOTS = 32  # more lanes make none cheaper there: their keys and values leave the cache


Layout = tuple[nnx.GraphDef[Decoder], nnx.State]
_LAYOUTS: WeakKeyDictionary[Policy, dict[Mesh | None, Layout]] = WeakKeyDictionary()


class Programs:
    """Prefill, fork and decode, with their arguments put on the devices.

    Args:
      automaton: the step table.
      limits: when responses end.
      slots: most rows that decode at once; None: as many as make a row cheaper.
      streams: threads that draw a round; None: see `streams`.
      mesh: that the arrays lie on; None: one device.
    """

    def __init__(
        self,
        automaton: StepAutomaton,
        limits: Limits,
        *,
        slots: int | None,
        streams: int | None,
        mesh: Mesh | None,
    ):
        self._automaton = jax.device_put(automaton)
        self._limits = limits
        self._mesh = mesh
        self._rows = None if mesh is None else rows_sharding(mesh)
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        self._slots = slots
        self._streams = streams

    def streams(self, policy: Policy) -> int:
        """Threads that draw a round."""
        if self._streams is not None:
            return self._streams
        if self._mesh is not None or not self._on_cpu:
            return 1
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.params))
        return 1 if weights > LARGE_WEIGHTS else cores()

    def part(self, policy: Policy, shape: Shape) -> Shape:
        """Sizes of what one stream draws of a round."""
        return shape._replace(groups=-(-shape.groups // self.streams(policy)))

    def prefill(self, policy: Policy, shape: Shape, prefixes: Sequence[np.ndarray]) -> Store:
        """The prefix store of at most N prefixes."""
        tokens = np.zeros((shape.groups, shape.prefix), np.int32)
        for n, prefix in enumerate(prefixes):
            tokens[n, : len(prefix)] = prefix
        tokens = jax.device_put(tokens, self._rows)
        graph, params = self._laid_out(policy)
        return decoding.prefill(params, tokens, graph=graph, mesh=self._mesh)

    def fork(self, held: Sequence[Held], shape: Shape, snapshots: Sequence[Snapshot]) -> Store:
        """The prefix store of snapshots of one round, from its caches."""
        store = None
        for source in held:
            chosen = np.zeros(shape.groups, bool)
            groups, rows = np.zeros((2, shape.groups), np.int32)
            lengths = np.ones(source.prefix[0].keys.shape[1], np.int32)
            for n, s in enumerate(snapshots):
                if s.group in source.groups:
                    chosen[n], rows[n] = True, s.row
                    groups[n] = s.group - source.groups.start
                    lengths[groups[n]] = len(s.round.prefixes[s.group])
            if store is not None and snapshots and not chosen.any():
                continue  # but where all is compiled, on no snapshots
            places = jax.device_put((lengths, groups, rows), self._rows)
            forked = decoding.fork(
                source.prefix, source.suffix, *places, size=shape.prefix, mesh=self._mesh
            )
            store = forked if store is None else decoding.overlay(store, forked, chosen)
        assert store is not None  # a held round has at least one part
        return store

    def extend(
        self,
        policy: Policy,
        prefix: Store,
        prefixes: Sequence[np.ndarray],
        questions: Sequence[np.ndarray],
        size: int,
    ) -> Store:
        """The prefix store with at most `size` tokens put behind each prefix."""
        groups = prefix[0].keys.shape[1]
        lengths, tokens = np.ones(groups, np.int32), np.zeros((groups, size), np.int32)
        for n, (kept, question) in enumerate(zip(prefixes, questions, strict=True)):
            lengths[n] = len(kept)
            tokens[n, : len(question)] = [kept[-1], *question[:-1]]
        lengths, tokens = jax.device_put((lengths, tokens), self._rows)
        graph, params = self._laid_out(policy)
        return decoding.extend(params, prefix, lengths, tokens, graph=graph, mesh=self._mesh)

    def draw(
        self, policy: Policy, part: Shape, prefix: Store, start: Start, draws: Draws
    ) -> tuple[Rows, LaneCache, Spent]:
        """All rows of a round, its keys and values, and what was spent; see `drawing.draw_rows`."""
        cache = LaneCache(self._moves(prefix), prefix, part[:2], part.suffix)
        rows, spent = draw_rows(
            self._decode(policy, draws._replace(max_new=min(draws.max_new, part.suffix))),
            start,
            cache,
            self._lane_shapes(policy, part),
            rows=part.rows,
            size=part.suffix,
            costs=self._costs(policy.config),
            dtype=np.dtype(jnp.promote_types(policy.config.dtype, jnp.float32)),
        )
        return rows, cache, spent

    def compile_draw(self, policy: Policy, part: Shape, prefix: Store, draws: Draws) -> Store:
        """Compiles all that `draw` may need; returns an empty suffix store."""
        moves, decode = self._moves(prefix), self._decode(policy, draws)
        store = moves.empty(*part[:2], part.suffix)
        shapes = self._lane_shapes(policy, part)
        for lanes in shapes:
            groups, cells = np.zeros(lanes.groups, np.int32), idle_cells(lanes)
            shared = moves.take(prefix, groups, lanes.prefix)
            own = moves.empty(lanes.groups, lanes.rows, lanes.window)
            own = moves.load(store, own, cells)
            _, own = decode(shared, own, idle_lanes(lanes), 0)
            store = moves.save(store, own, cells)
            if (lanes.groups, lanes.rows) == part[:2]:
                for wider in {other.window for other in shapes if other.window > lanes.window}:
                    moves.widen(own, wider)
        return store

    def empty_suffix(self, part: Shape, prefix: Store) -> Store:
        """A round's suffix store before anything is drawn."""
        return self._moves(prefix).empty(*part[:2], part.suffix)

    def _decode(self, policy: Policy, draws: Draws) -> Decode:
        """`decoding.decode`, with what changes from segment to segment left open."""
        graph, params = self._laid_out(policy)

        def decode(shared: Store, own: Store, lanes: Lanes, leave: int) -> tuple[Drawn, Store]:
            return decoding.decode(
                params,
                shared,
                own,
                jax.device_put(lanes, self._rows),
                self._automaton,
                self._limits,
                draws,
                np.int32(leave),
                graph=graph,
                mesh=self._mesh,
            )

        return decode

    def _moves(self, prefix: Store) -> Moves:
        return _Moves(prefix, self._mesh, self._rows)

    def _lane_shapes(self, policy: Policy, part: Shape) -> list[LaneShape]:
        shards = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        slots = CPU_SLOTS if self._on_cpu else None
        if self._slots is not None:
            slots = max(self._slots // self.streams(policy), 1)
        return lane_shapes(*part, slots=slots, shards=shards)

    def _costs(self, model: DecoderConfig) -> Costs:
        attention = 2 * model.heads * model.head_dim
        projections = 2 * (model.heads + model.kv_heads) * model.head_dim
        products = (
            model.layers * model.width * (projections + 3 * model.mlp) + model.vocab * model.width
        )
        slot = ATTENTION_RATE * model.layers * attention / products
        return Costs(CPU_STEP if self._on_cpu else ACCELERATOR_STEP, slot)

    def _laid_out(self, policy: Policy) -> Layout:
        """The policy as decoding wants it; samplers on one mesh share the copy."""
        if self._mesh is None and not self._on_cpu:
            return policy.graph, policy.params
        layouts = _LAYOUTS.setdefault(policy, {})
        if self._mesh not in layouts:
            graph, params = policy.graph, policy.params
            if self._on_cpu:
                graph, params = unstacked_graph(policy.config), unstack(params, graph=graph)
            if self._mesh is not None:
                params = jax.device_put(params, decode_shardings(self._mesh, params))
            layouts[self._mesh] = graph, params
        return layouts[self._mesh]


class _Moves(NamedTuple):
    """`lanes.Moves` beside a prefix store."""

    prefix: Store
    mesh: Mesh | None
    sharding: jax.sharding.Sharding | None

    def empty(self, groups: int, rows: int, window: int) -> Store:
        return decoding.empty(self.prefix, groups=groups, rows=rows, size=window, mesh=self.mesh)

    def widen(self, store: Store, window: int) -> Store:
        if store[0].keys.shape[-1] == window:
            return store
        return decoding.widen(store, size=window, mesh=self.mesh)

    def save(self, store: Store, own: Store, cells: Cells) -> Store:
        return decoding.save(store, own, jax.device_put(cells, self.sharding), mesh=self.mesh)

    def load(self, store: Store, own: Store, cells: Cells) -> Store:
        return decoding.load(store, own, jax.device_put(cells, self.sharding), mesh=self.mesh)

    def take(self, prefix: Store, groups: np.ndarray, window: int) -> Store:
        groups = jax.device_put(groups, self.sharding)
        return decoding.take(prefix, groups, size=window, mesh=self.mesh)


def cache_bytes(model: DecoderConfig, shape: Shape) -> int:
    """Bytes of keys and values that one round holds: P + K * S slots for each group."""
    slots = shape.groups * (shape.prefix + shape.rows * shape.suffix)
    numbers = 2 * model.layers * slots * model.kv_heads * model.head_dim
    return numbers * jnp.dtype(model.dtype).itemsize
