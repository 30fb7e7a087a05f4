"""The jitted programs of `decoding` and `stores` for one set of stop conditions and one mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import Decoder, Store
from jaxreset.models.decoding_copy import decodes_as_it_is, decoding_copy, unstacked_graph
from jaxreset.models.policy import Policy
from jaxreset.parallel import data_shards, put, replicated, rows_sharding
from jaxreset.sampling import decoding, stores
from jaxreset.sampling.decoding import Drawn, Lanes, Limits
from jaxreset.sampling.drawing import (
    Decode,
    Rows,
    Spent,
    Start,
    draw_rows,
    idle_lanes,
)
from jaxreset.sampling.lanes import LaneCache, Moves, moves_of, page_rows
from jaxreset.sampling.places import cut_over
from jaxreset.sampling.rounds import Held, Pages, Shape, Snapshot
from jaxreset.sampling.schedule import Costs, LaneShape, lane_shapes
from jaxreset.sampling.stores import Moved
from jaxreset.sampling.streams import LARGE_WEIGHTS, cores
from jaxreset.sampling.tokens import Draws
from jaxreset.steps import StepAutomaton

# Of a decoding step, in times of a row's matrix products. Reading the weights takes as long as the
# products of so many rows (operations over bytes a second), and reading what one attends to is slower.
CPU_STEP, ACCELERATOR_STEP = 8.0, 256.0
ATTENTION_RATE = 10.0
FORK_GROUPS = 8
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
        self._automaton = put(automaton, None if mesh is None else replicated(mesh))
        self._limits = limits
        self._mesh = mesh
        self.shards = data_shards(mesh)
        self._rows = None if mesh is None else rows_sharding(mesh)
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        self._slots = slots
        self._streams = streams

    def streams(self, policy: Policy, rows: int) -> int:
        """Threads that draw a round of groups of `rows`: no more than `slots` has room for."""
        most = 1
        if self._streams is not None:
            most = self._streams
        elif self._on_cpu and self._mesh is None:
            weights = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.params))
            most = cores() if weights <= LARGE_WEIGHTS else 1
        return most if self._slots is None else max(min(most, self._slots // rows), 1)

    def part(self, policy: Policy, shape: Shape) -> Shape:
        """Sizes of what one stream draws of a round; see `places.cut_over`."""
        groups = -(-shape.groups // self.streams(policy, shape.rows))
        return cut_over(shape._replace(groups=groups), self.shards)

    def prefill(
        self, policy: Policy, shape: Shape, prefixes: Sequence[np.ndarray], places: np.ndarray
    ) -> Store:
        """The prefix store of at most N prefixes, each in its place."""
        tokens = np.zeros((shape.groups, shape.prefix), np.int32)
        for place, prefix in zip(places, prefixes, strict=True):
            tokens[place, : len(prefix)] = prefix
        tokens = put(tokens, self._rows)
        graph, params = self.layout(policy)
        return decoding.prefill(params, tokens, graph=graph, mesh=self._mesh)

    def shard(self, held: Sequence[Held], group: int) -> int:
        """The data shard that a group of a round stands on."""
        part = next(part for part in held if group in part.groups)
        return part.place(group) * self.shards // part.prefix[0].keys.shape[1]

    def fork(
        self,
        held: Sequence[Held],
        shape: Shape,
        snapshots: Sequence[Snapshot],
        places: np.ndarray,
    ) -> Store:
        """The prefix store of snapshots of one round, each in its place, from the round's caches."""
        found: defaultdict[int, dict[int, Snapshot]] = defaultdict(dict)
        for place, s in zip(places.tolist(), snapshots, strict=True):
            found[next(i for i, part in enumerate(held) if s.group in part.groups)][place] = s
        # All at once from the part that most are of, the others a few at a time.
        first, *others = sorted(found, key=lambda part: -len(found[part]))
        store = self._fork_part(held[first], shape, found[first])
        some = self._few(shape)
        for part in others:
            members = list(found[part].items())
            for start in range(0, len(members), some.groups):
                their_places, chosen = zip(*members[start : start + some.groups], strict=True)
                forked = self._fork_part(held[part], some, dict(enumerate(chosen)))
                store = self._overwrite(store, forked, their_places)
        return store

    def compile_fork(self, held: Held, parent: Shape, shape: Shape) -> Store:
        """Compiles all that `fork` may need of a part, of a round of shape `parent`, with every page."""
        # Over a mesh a round is one part.
        for some in (shape,) if self._mesh is not None else (shape, self._few(shape)):
            gathered = self._gathered(held, parent, some)
            for page in held.pages.stores:
                if self._in_place(held, page):
                    forked = self._fork_from(held, page, some, {}, {})
                gathered = self._moves(held.prefix).load(page, gathered, self._no_move())
            forked = self._fork_from(held, gathered, some, {}, {})
        if self._mesh is not None:
            return forked
        store = self._fork_from(held, self._gathered(held, parent, shape), shape, {}, {})
        return self._overwrite(store, forked, ())

    def _no_move(self) -> Moved:
        none = np.zeros(0, np.int32)
        (moved,) = moves_of((none, none), (none, none), none, count=self.shards)
        return moved

    def _fork_part(self, held: Held, shape: Shape, snapshots: Mapping[int, Snapshot]) -> Store:
        """With the snapshots, all of rows of one part, as the groups of those numbers."""
        stores, page, cell = held.pages
        rows = {n: (held.place(s.group), s.row) for n, s in snapshots.items()}
        pages = {int(page[row]) for row in rows.values()} - {-1}  # on no page: nothing was drawn
        if len(pages) == 1 and self._in_place(held, only := stores[min(pages)]):
            cells = {n: int(cell[row]) for n, row in rows.items()}
            return self._fork_from(held, only, shape, snapshots, cells)
        parent = next(iter(snapshots.values())).round.shape
        gathered = self._gathered(held, parent, shape)
        for number in sorted(pages):
            here = np.array([n for n, row in rows.items() if page[row] == number])
            across = stores[number][0].keys.shape[2]
            of_rows = np.divmod(np.array([cell[rows[n]] for n in here]), across)
            lanes, shards = (here, np.zeros_like(here)), here * self.shards // shape.groups
            for moved in moves_of(lanes, of_rows, shards, count=self.shards):
                gathered = self._moves(held.prefix).load(stores[number], gathered, moved)
        return self._fork_from(held, gathered, shape, snapshots, {n: n for n in rows})

    def _gathered(self, held: Held, parent: Shape, shape: Shape) -> Store:
        """A page for the rows of as many groups as `shape` has, whatever pages they are on."""
        return self._moves(held.prefix).empty(shape.groups, 1, parent.suffix)

    def _in_place(self, held: Held, page: Store) -> bool:
        return page[0].keys.shape[1:3] == held.pages.page.shape

    def _fork_from(
        self,
        held: Held,
        page: Store,
        shape: Shape,
        snapshots: Mapping[int, Snapshot],
        row_cells: Mapping[int, int],
    ) -> Store:
        """With the snapshots, whose rows are in those cells of the page."""
        groups, cells = np.zeros((2, shape.groups), np.int32)
        lengths = np.ones(held.prefix[0].keys.shape[1], np.int32)
        for n, s in snapshots.items():
            groups[n] = held.place(s.group)
            cells[n] = row_cells[n]
            lengths[groups[n]] = len(s.round.prefixes[s.group])
        places = lengths, groups, np.divmod(cells, np.int32(page[0].keys.shape[2]))
        places = put(places, self._rows)
        return stores.fork(held.prefix, page, *places, size=shape.prefix, mesh=self._mesh)

    def _overwrite(self, store: Store, forked: Store, places: Sequence[int]) -> Store:
        size = forked[0].keys.shape[1]
        groups = np.full(size, store[0].keys.shape[1], np.int32)  # out of range: dropped
        groups[: len(places)] = places
        return stores.overwrite(store, forked, groups)

    def _few(self, shape: Shape) -> Shape:
        return shape._replace(groups=min(shape.groups, FORK_GROUPS))

    def extend(
        self,
        policy: Policy,
        prefix: Store,
        prefixes: Sequence[np.ndarray],
        questions: Sequence[np.ndarray],
        places: np.ndarray,
        size: int,
    ) -> Store:
        """The prefix store with at most `size` tokens put behind each prefix, which has its place."""
        groups = prefix[0].keys.shape[1]
        lengths, tokens = np.ones(groups, np.int32), np.zeros((groups, size), np.int32)
        for place, kept, question in zip(places, prefixes, questions, strict=True):
            lengths[place] = len(kept)
            tokens[place, : len(question)] = [kept[-1], *question[:-1]]
        lengths, tokens = put((lengths, tokens), self._rows)
        graph, params = self.layout(policy)
        return decoding.extend(params, prefix, lengths, tokens, graph=graph, mesh=self._mesh)

    def draw(
        self,
        policy: Policy,
        part: Shape,
        prefix: Store,
        start: Start,
        draws: Draws,
        *,
        hold: bool,
    ) -> tuple[Rows, Pages | None, Spent]:
        """All rows of a part, its keys and values if `hold`, and what was spent."""
        shapes = self._lane_shapes(policy, part)
        cache = LaneCache(
            self._moves(prefix),
            prefix,
            part[:2],
            full=shapes[0][:2],
            shards=self.shards,
            hold=hold,
        )
        rows, spent = draw_rows(
            self._decode(policy, draws._replace(max_new=np.int32(min(draws.max_new, part.suffix)))),
            start,
            cache,
            shapes,
            rows=part.rows,
            size=part.suffix,
            costs=self._costs(policy.config),
            dtype=np.dtype(jnp.promote_types(policy.config.dtype, jnp.float32)),
            shards=self.shards,
        )
        if not hold:
            return rows, None, spent
        # Where no row could draw anything, a page all the same.
        return rows, cache.finish() or self.empty_part(policy, part, prefix).pages, spent

    def compile_draw(self, policy: Policy, part: Shape, prefix: Store, draws: Draws) -> Held:
        """Compiles all that `draw` may need; returns a part with empty pages of every kind."""
        moves, decode = self._moves(prefix), self._decode(policy, draws)
        shapes = self._lane_shapes(policy, part)
        kept = self.empty_part(policy, part, prefix)
        pages, nothing = kept.pages.stores, self._no_move()
        for lanes in shapes:
            groups = np.zeros(lanes.groups, np.int32)
            shared = moves.take(prefix, groups, None, lanes.prefix)
            shared = moves.take(prefix, groups, shared, lanes.prefix)
            own = moves.empty(lanes.groups, lanes.rows, lanes.window)
            for n, page in enumerate(pages):
                *cells, width = *page[0].keys.shape[1:3], page[0].keys.shape[-1]
                written = tuple(cells) == (page_rows(width, self.shards), 1)
                if width <= lanes.window and (written or tuple(cells) == part[:2]):
                    own = moves.load(page, own, nothing)
                if width == lanes.window and written:
                    pages[n] = moves.save(page, own, nothing)
            _, own = decode(shared, own, idle_lanes(lanes), 0)
            if (lanes.groups, lanes.rows) == part[:2]:
                for wider in {other.window for other in shapes if other.window > lanes.window}:
                    moves.widen(own, wider)
        return kept

    def empty_part(self, policy: Policy, part: Shape, prefix: Store) -> Held:
        """A part of a round on which nothing is drawn, with a page of every kind."""
        moves, shapes = self._moves(prefix), self._lane_shapes(policy, part)
        # Lanes that became pages, in their places or not, and pages that rows were written to.
        kinds = {s.own for s in shapes if s[:2] in (part[:2], shapes[0][:2])}
        if len({s[:2] for s in shapes} | {part[:2]}) > 1:
            kinds |= {(page_rows(s.window, self.shards), 1, s.window) for s in shapes}
        pages = [moves.empty(*kind) for kind in sorted(kinds)]
        nothing, everyone = np.zeros(part[:2], int), range(part.groups)
        return Held(everyone, np.array(everyone), prefix, Pages(pages, nothing, nothing))

    def _decode(self, policy: Policy, draws: Draws) -> Decode:
        """`decoding.decode`, with what changes from segment to segment left open."""
        graph, params = self.layout(policy)

        def decode(shared: Store, own: Store, lanes: Lanes, leave: int) -> tuple[Drawn, Store]:
            return decoding.decode(
                params,
                shared,
                own,
                put(lanes, self._rows) if self._rows else lanes,
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
        slots = CPU_SLOTS if self._on_cpu else None
        if self._slots is not None:
            slots = self._slots // self.streams(policy, part.rows)
        return lane_shapes(*part, slots=slots, shards=self.shards)

    def _costs(self, model: DecoderConfig) -> Costs:
        attention = 2 * model.heads * model.head_dim
        projections = 2 * (model.heads + model.kv_heads) * model.head_dim
        products = (
            model.layers * model.width * (projections + 3 * model.mlp) + model.vocab * model.width
        )
        slot = ATTENTION_RATE * model.layers * attention / products
        return Costs(CPU_STEP if self._on_cpu else ACCELERATOR_STEP, slot)

    def layout(self, policy: Policy) -> Layout:
        """The policy as decoding wants it; samplers on one mesh share the copy.

        It lives as long as the policy object: while a step samples, since an update makes another one.
        """
        if not self._on_cpu and decodes_as_it_is(policy.params, policy.config, self._mesh):
            return policy.graph, policy.params
        layouts = _LAYOUTS.setdefault(policy, {})
        if self._mesh not in layouts:
            graph, plain = policy.graph, policy
            if self._on_cpu:
                # Adapters cost time at every token, but merged in bfloat16 they would be rounded away.
                if jnp.finfo(policy.config.dtype).bits >= 32:
                    plain = policy.merged()
                graph = unstacked_graph(plain.config)
            params = decoding_copy(
                plain.params, graph=plain.graph, unstacked=self._on_cpu, mesh=self._mesh
            )
            layouts[self._mesh] = graph, params
        return layouts[self._mesh]


class _Moves(NamedTuple):
    """`lanes.Moves` beside a prefix store."""

    prefix: Store
    mesh: Mesh | None
    sharding: jax.sharding.Sharding | None

    def empty(self, groups: int, rows: int, window: int) -> Store:
        return stores.empty(self.prefix, groups=groups, rows=rows, size=window, mesh=self.mesh)

    def widen(self, store: Store, window: int) -> Store:
        if store[0].keys.shape[-1] == window:
            return store
        return stores.widen(store, size=window, mesh=self.mesh)

    def save(self, page: Store, own: Store, moved: Moved) -> Store:
        return stores.save(page, own, moved, mesh=self.mesh)

    def load(self, page: Store, own: Store, moved: Moved) -> Store:
        return stores.load(page, own, moved, mesh=self.mesh)

    def take(self, prefix: Store, groups: np.ndarray, into: Store | None, window: int) -> Store:
        if self.sharding is not None:
            groups = put(groups, self.sharding)
        return stores.take(prefix, groups, into, size=window, mesh=self.mesh)


def cache_bytes(model: DecoderConfig, shape: Shape) -> int:
    """Bytes of keys and values that one round holds: P + K * S slots for each group."""
    slots = shape.groups * (shape.prefix + shape.rows * shape.suffix)
    numbers = 2 * model.layers * slots * model.kv_heads * model.head_dim
    return numbers * jnp.dtype(model.dtype).itemsize
