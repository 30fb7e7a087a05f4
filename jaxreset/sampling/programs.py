"""The jitted programs of `decoding` and `stores` for one set of stop conditions and one mesh."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxreset.models.block import DecoderConfig
from jaxreset.models.decoder import Store
from jaxreset.models.decoding_copy import Layout, decoding_layout
from jaxreset.models.policy import Policy
from jaxreset.parallel import data_shards, device_bytes, put, replicated, rows_sharding
from jaxreset.parallel.compiling import Compile, run
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
from jaxreset.sampling.memory import RoundMemory
from jaxreset.sampling.prefilling import Chunks, chunk_shape, plan_chunks, prefill
from jaxreset.sampling.rounds import Held, Pages, Shape, Snapshot
from jaxreset.sampling.schedule import Costs
from jaxreset.sampling.stores import Moved
from jaxreset.sampling.tokens import Draws
from jaxreset.steps import StepAutomaton

# Of a decoding step, in times of a row's matrix products. Reading the weights takes as long as the
# products of so many rows (operations over bytes a second), and reading what one attends to is slower.
CPU_STEP, ACCELERATOR_STEP = 8.0, 256.0
ATTENTION_RATE = 10.0
FORK_GROUPS = 8

_LAYOUTS: WeakKeyDictionary[Policy, dict[Any, Layout]] = WeakKeyDictionary()


class Programs:
    """Prefill, fork and decode, with their arguments put on the devices.

    Args:
      automaton: the step table.
      limits: when responses end.
      mesh: that the arrays lie on; None: one device.
      **settings: `slots`, `threads`, `hold_cache` and `parents` of `RoundMemory`.
    """

    def __init__(
        self, automaton: StepAutomaton, limits: Limits, *, mesh: Mesh | None, **settings: Any
    ):
        self._automaton = put(automaton, None if mesh is None else replicated(mesh))
        self._limits = limits
        self._mesh = mesh
        self.shards = data_shards(mesh)
        self._rows = None if mesh is None else rows_sharding(mesh)
        alone = self._automaton.next_state.devices()
        device = min(alone, key=lambda d: d.id) if mesh is None else mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        self._settings = settings | {"device_bytes": device_bytes()}
        self._anchor = put(
            np.float32(0), SingleDeviceSharding(device) if mesh is None else replicated(mesh)
        )
        self._run = run

    def in_shapes(self, compiled: Compile) -> Programs:
        """The same programs, which are compiled and not run: stores are shapes then."""
        programs = copy.copy(self)
        programs._run = compiled
        return programs

    def memory(self, policy: Policy) -> RoundMemory:
        """In which sizes rounds of the policy are drawn, and what they take."""
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.params))
        return RoundMemory(
            policy.config, weights, on_cpu=self._on_cpu, mesh=self._mesh, **self._settings
        )

    def prefill(
        self,
        policy: Policy,
        shape: Shape,
        prefixes: Sequence[np.ndarray],
        places: np.ndarray,
        *,
        behind: tuple[Store, Sequence[int]] | None = None,
    ) -> Store:
        """The prefix store of at most N prefixes, each in its place.

        `behind`: a store that holds some of each, and how many of its tokens; it is used up.
        """
        n, p = shape.groups, shape.prefix
        graph, params = self.layout(policy)
        if behind is None:
            like = stores.layout_for(policy.config, stacked=not self._on_cpu)
            store, begins = self._empty(like, n, None, p), [0] * len(prefixes)
        else:
            store, begins = behind[0], [count - 1 for count in behind[1]]
        tokens = np.zeros((n, p), np.int32)
        for place, prefix in zip(places, prefixes, strict=True):
            tokens[place, : len(prefix)] = prefix
        spans = [(begin, len(prefix) - 1) for begin, prefix in zip(begins, prefixes, strict=True)]
        size = chunk_shape(n, p, on_cpu=self._on_cpu, shards=self.shards)
        chunks = plan_chunks(places.tolist(), spans, size, groups=n, prefix=p, shards=self.shards)
        tokens, groups, starts = put((tokens, *chunks[:2]), self._rows)
        chunks = Chunks(groups, starts, chunks.count)
        args = params, store, tokens, chunks
        return self._run(prefill, *args, graph=graph, size=size.tokens, mesh=self._mesh)

    def _empty(self, like: stores.Layout, groups: int, rows: int | None, slots: int) -> Store:
        sizes = {"groups": groups, "rows": rows, "size": slots}
        return self._run(stores.empty, self._anchor, like=like, **sizes, mesh=self._mesh)

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

    def compile_fork(self, held: Held, parent: Shape, shape: Shape, *, parts: int) -> Store:
        """Compiles all that `fork` may need of a round of shape `parent`, with every page of a part."""
        for some in (shape,) if parts == 1 else (shape, self._few(shape)):
            gathered = self._gathered(held, parent, some)
            for page in held.pages.stores.values():
                if self._in_place(held, page):
                    forked = self._fork_from(held, page, some, {}, {})
                gathered = self._moves(held.prefix).move(page, gathered, self._no_move())
            forked = self._fork_from(held, gathered, some, {}, {})
        if parts == 1:
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
            into, shards = (here, np.zeros_like(here)), here * self.shards // shape.groups
            for moved in moves_of(of_rows, into, shards, count=self.shards):
                gathered = self._moves(held.prefix).move(stores[number], gathered, moved)
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
        size, mesh = shape.prefix, self._mesh
        return self._run(stores.fork, held.prefix, page, *places, size=size, mesh=mesh)

    def _overwrite(self, store: Store, forked: Store, places: Sequence[int]) -> Store:
        size = forked[0].keys.shape[1]
        groups = np.full(size, store[0].keys.shape[1], np.int32)  # out of range: dropped
        groups[: len(places)] = places
        return self._run(stores.overwrite, store, forked, groups)

    def _few(self, shape: Shape) -> Shape:
        return shape._replace(groups=min(shape.groups, FORK_GROUPS))

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
        shapes = self.memory(policy).lanes(part)
        cache = LaneCache(
            self._moves(prefix),
            part[:2],
            part.suffix,
            full=shapes[0][:2],
            shards=self.shards,
            hold=hold,
        )
        draws = draws._replace(max_new=np.int32(min(draws.max_new, part.suffix)))
        rows, spent = draw_rows(
            self._decode(policy, prefix, draws),
            start,
            cache,
            shapes,
            rows=part.rows,
            size=part.suffix,
            prefix=part.prefix,
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
        moves, decode = self._moves(prefix), self._decode(policy, prefix, draws)
        shapes, nothing = self.memory(policy).lanes(part), self._no_move()
        kept = self.empty_part(policy, part, prefix)
        for lanes in shapes:
            own = moves.empty(lanes.groups, lanes.rows, part.suffix)
            if lanes[:2] != part[:2]:  # else rows may stay in their places
                for page in kept.pages.stores.values():
                    own = moves.move(page, own, nothing)
                    moves.move(own, page, nothing)
            idle = idle_lanes(lanes, in_place=lanes[:2] == part[:2])
            decode(own, idle, lanes.window, 0)
        return kept

    def empty_part(self, policy: Policy, part: Shape, prefix: Store) -> Held:
        """A part of a round on which nothing is drawn, with a page of every kind."""
        moves, shapes = self._moves(prefix), self.memory(policy).lanes(part)
        # Lanes that became a page, in their places or not, and pages that rows were written to.
        kinds = {(*lanes, part.suffix) for lanes in (part[:2], shapes[0][:2])}
        if len({s[:2] for s in shapes} | {part[:2]}) > 1:
            kinds |= {(page_rows(s.window, self.shards), 1, s.window) for s in shapes}
        pages = {n: moves.empty(*kind) for n, kind in enumerate(sorted(kinds))}
        nothing, everyone = np.zeros(part[:2], int), range(part.groups)
        return Held(everyone, np.array(everyone), prefix, Pages(pages, nothing, nothing))

    def _decode(self, policy: Policy, prefix: Store, draws: Draws) -> Decode:
        """`decoding.decode`, with what changes from segment to segment left open."""
        graph, params = self.layout(policy)

        def decode(own: Store, lanes: Lanes, window: int, leave: int) -> tuple[Drawn, Store]:
            return self._run(
                decoding.decode,
                params,
                prefix,
                own,
                put(lanes, self._rows) if self._rows else lanes,
                self._automaton,
                self._limits,
                draws,
                np.int32(leave),
                graph=graph,
                window=window,
                mesh=self._mesh,
            )

        return decode

    def _moves(self, prefix: Store) -> Moves:
        return _Moves(partial(self._empty, stores.layout_of(prefix)), self._mesh, self._run)

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
        layouts, kind = (
            _LAYOUTS.setdefault(policy, {}),
            (self._mesh, self._on_cpu, self._run is run),
        )
        if kind not in layouts:
            layouts[kind] = decoding_layout(
                policy.graph,
                policy.params,
                policy.config,
                self._mesh,
                on_cpu=self._on_cpu,
                run=self._run,
            )
        return layouts[kind]


class _Moves(NamedTuple):
    """`lanes.Moves` for stores of a policy."""

    empty: Callable[[int, int, int], Store]
    mesh: Mesh | None
    run: Callable[..., Any]

    def move(self, source: Store, target: Store, moved: Moved) -> Store:
        # As wide as the widest, so that a size of store has one program for either direction.
        size = max(source[0].keys.shape[-1], target[0].keys.shape[-1])
        lifted = self.run(stores.lift, source, moved.source, size=size, mesh=self.mesh)
        return self.run(stores.lay, target, lifted, moved.target, moved.chosen, mesh=self.mesh)
