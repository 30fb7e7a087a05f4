"""The jitted programs of `decoding` for one set of stop conditions and one mesh, called from the host."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxreset.models.decoder import KV, DecoderConfig
from jaxreset.models.policy import Policy
from jaxreset.parallel import decode_shardings, rows_sharding
from jaxreset.sampling import decoding
from jaxreset.sampling.decoding import Drawn, Lanes, Limits
from jaxreset.sampling.drawing import Decode, Rows, Spent, Start, draw_rows, idle_lanes
from jaxreset.sampling.rounds import Shape, Snapshot
from jaxreset.sampling.schedule import Costs, LaneShape, lane_shapes
from jaxreset.sampling.tokens import Draws
from jaxreset.steps import StepAutomaton

# Of a decoding step, in times of a row's matrix products. Reading the weights takes as long as the
# products of so many rows (operations over bytes a second), and reading what one attends to is slower.
CPU_STEP, ACCELERATOR_STEP = 8.0, 256.0
ATTENTION_RATE = 10.0
CPU_SLOTS = 32  # more lanes make none cheaper there: their keys and values leave the cache


class Programs:
    """Prefill, fork and decode, with their arguments put on the devices.

    Args:
      automaton: the step table.
      limits: when responses end.
      slots: most rows that decode at once; None: as many as make a row cheaper.
      mesh: that the arrays lie on; None: one device.
    """

    def __init__(
        self, automaton: StepAutomaton, limits: Limits, *, slots: int | None, mesh: Mesh | None
    ):
        self._automaton = jax.device_put(automaton)
        self._limits = limits
        self._mesh = mesh
        self._rows = None if mesh is None else rows_sharding(mesh)
        self._layout: tuple[nnx.State, nnx.State] | None = None
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        self._slots = CPU_SLOTS if slots is None and self._on_cpu else slots

    def prefill(self, policy: Policy, shape: Shape, prefixes: Sequence[np.ndarray]) -> KV:
        """The prefix store of at most N prefixes."""
        tokens = np.zeros((shape.groups, shape.prefix), np.int32)
        for n, prefix in enumerate(prefixes):
            tokens[n, : len(prefix)] = prefix
        tokens = jax.device_put(tokens, self._rows)
        params = self._laid_out(policy)
        return decoding.prefill(params, tokens, graph=policy.graph, mesh=self._mesh)

    def fork(self, cache: tuple[KV, KV], shape: Shape, snapshots: Sequence[Snapshot]) -> KV:
        """The prefix store of snapshots of one round, from its caches."""
        groups, rows = np.zeros((2, shape.groups), np.int32)
        groups[: len(snapshots)] = [s.group for s in snapshots]
        rows[: len(snapshots)] = [s.row for s in snapshots]
        lengths = np.zeros(cache[0].keys.shape[1], np.int32)
        for s in snapshots:
            lengths[s.group] = len(s.round.prefixes[s.group])
        chosen = jax.device_put((lengths, groups, rows), self._rows)
        return decoding.fork(*cache, *chosen, size=shape.prefix, mesh=self._mesh)

    def extend(
        self,
        policy: Policy,
        prefix: KV,
        prefixes: Sequence[np.ndarray],
        questions: Sequence[np.ndarray],
        size: int,
    ) -> KV:
        """The prefix store with at most `size` tokens put behind each prefix."""
        groups = prefix.keys.shape[1]
        lengths, tokens = np.ones(groups, np.int32), np.zeros((groups, size), np.int32)
        for n, (kept, question) in enumerate(zip(prefixes, questions, strict=True)):
            lengths[n] = len(kept)
            tokens[n, : len(question)] = [kept[-1], *question[:-1]]
        lengths, tokens = jax.device_put((lengths, tokens), self._rows)
        params = self._laid_out(policy)
        return decoding.extend(params, prefix, lengths, tokens, graph=policy.graph, mesh=self._mesh)

    def draw(
        self, policy: Policy, shape: Shape, prefix: KV, start: Start, draws: Draws
    ) -> tuple[Rows, KV, Spent]:
        """All rows of a round, its suffix store and what was spent; see `drawing.draw_rows`."""
        return draw_rows(
            self._decode(policy, prefix, draws),
            start,
            self.empty_suffix(shape, prefix),
            self._lane_shapes(shape),
            rows=shape.rows,
            size=shape.suffix,
            costs=self._costs(policy.config),
            dtype=np.dtype(jnp.promote_types(policy.config.dtype, jnp.float32)),
        )

    def compile_draw(self, policy: Policy, shape: Shape, prefix: KV, draws: Draws) -> KV:
        """Compiles all that `draw` may need; returns an empty suffix store."""
        suffix = self.empty_suffix(shape, prefix)
        for lanes in self._lane_shapes(shape):
            _, suffix = self._decode(policy, prefix, draws)(suffix, idle_lanes(lanes), 0, lanes)
        return suffix

    def _decode(self, policy: Policy, prefix: KV, draws: Draws) -> Decode:
        """`decoding.decode`, with what changes from segment to segment left open."""
        params = self._laid_out(policy)

        def decode(suffix: KV, lanes: Lanes, leave: int, shape: LaneShape) -> tuple[Drawn, KV]:
            return decoding.decode(
                params,
                prefix,
                suffix,
                jax.device_put(lanes, self._rows),
                self._automaton,
                self._limits,
                draws,
                np.int32(leave),
                graph=policy.graph,
                window=shape.window,
                prefix_window=shape.prefix,
                mesh=self._mesh,
            )

        return decode

    def empty_suffix(self, shape: Shape, prefix: KV) -> KV:
        """A round's suffix store before anything is drawn."""
        return decoding.empty_suffix(prefix, rows=shape.rows, size=shape.suffix, mesh=self._mesh)

    def _lane_shapes(self, shape: Shape) -> list[LaneShape]:
        shards = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        return lane_shapes(*shape, slots=self._slots, shards=shards)

    def _costs(self, model: DecoderConfig) -> Costs:
        attention = 2 * model.heads * model.head_dim
        projections = 2 * (model.heads + model.kv_heads) * model.head_dim
        products = (
            model.layers * model.width * (projections + 3 * model.mlp) + model.vocab * model.width
        )
        slot = ATTENTION_RATE * model.layers * attention / products
        return Costs(CPU_STEP if self._on_cpu else ACCELERATOR_STEP, slot)

    def _laid_out(self, policy: Policy) -> nnx.State:
        """The parameters as decoding wants them; laid out once for each policy."""
        if self._mesh is None:
            return policy.params
        if self._layout is None or self._layout[0] is not policy.params:
            shardings = decode_shardings(self._mesh, policy.params)
            self._layout = policy.params, jax.device_put(policy.params, shardings)
        return self._layout[1]


def cache_bytes(model: DecoderConfig, shape: Shape) -> int:
    """Bytes of keys and values that one round holds: P + K * S slots for each group."""
    slots = shape.groups * (shape.prefix + shape.rows * shape.suffix)
    numbers = 2 * model.layers * slots * model.kv_heads * model.head_dim
    return numbers * jnp.dtype(model.dtype).itemsize
