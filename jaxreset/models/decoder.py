"""A decoder-only transformer, as the families of `families` have it.

    tokens ─▶ embed ─▶ L × [ x + attend(norm x) ; x + mlp(norm x) ] ─▶ norm ─▶ hidden ─▶ head ─▶ logits

The parameters of the L blocks are stacked on a leading axis, and one block's code runs over them: a
`scan` in training, a `fori_loop` in decoding, where the cache is carried along. An unstacked decoder
has each block in a stack of its own: there nothing is sliced, which on CPU is a copy at every token.

A row is always a shared prefix and a suffix of its own, and the last prefix token is the *first input
of the row*: the hidden state of a row's slot t predicts its t-th suffix token, and the prefix holds one
token less.

    prefix    [ p0 p1 p2 ]           positions 0 1 2      keys and values, once per group
    row input [ p3 s0 s1 s2 ]        positions 3 4 5 6    its own slots 0 1 2 3
    predicts  [ s0 s1 s2 s3 ]

Layers may have a window, and see only so much of what lies before a token; see `windows`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxreset.models.attention import (
    Attend,
    Prefix,
    causal_attention,
    shared_prefix_attention,
)
from jaxreset.models.block import Block, DecoderConfig, RMSNorm
from jaxreset.models.packing import Packing
from jaxreset.models.rotary import Rotation
from jaxreset.models.windows import (
    Standing,
    View,
    existing,
    of_layer,
    standing_of,
    turns_of,
    view_of_layer,
    views_of_chunks,
    windowed_layers,
)
from jaxreset.parallel import embed_sharding, hidden_sharding, rows_sharding

Array = jax.Array
Carry = TypeVar("Carry")


class KV(NamedTuple):
    """Keys `[L, ..., G, D, slots]` and values `[L, ..., G, slots, D]` of a stack's L layers."""

    keys: Array
    values: Array


_constrain = jax.lax.with_sharding_constraint
Store = tuple[KV, ...]  # one for each stack of a decoder


class Decoder(nnx.Module):
    """The whole network. Its methods are pure: split it with `nnx.split`, merge it inside `jax.jit`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Untied, a token enters the stream at the scale of what the blocks add to it.
        scale = 0.02 if config.tie_embeddings else 1.0
        init = jax.nn.initializers.normal
        shape = config.vocab, config.width
        self.embed = nnx.Param(init(scale)(rngs.params(), shape, config.dtype))
        self.blocks: Block | nnx.List[Block] = Block(config, stack=config.layers, rngs=rngs)
        self.norm = RMSNorm((config.width,), config.norm_eps, config.dtype)
        if not config.tie_embeddings:
            self.output = nnx.Param(init(0.02)(rngs.params(), shape[::-1], config.dtype))

    @property
    def head(self) -> Array:
        """`[E, V]` output projection."""
        return self.embed[...].T if self.config.tie_embeddings else self.output[...]

    @property
    def stacks(self) -> list[Block]:
        """All layers, in one stack or each in its own."""
        return [self.blocks] if isinstance(self.blocks, Block) else list(self.blocks)

    def unstack(self) -> None:
        """Gives each layer a stack of its own, and the output projection an array of its own."""
        (whole,) = self.stacks
        graph, params = nnx.split(whole)

        def layer(index: int) -> Block:
            return nnx.merge(graph, jax.tree.map(lambda p: p[index : index + 1], params))

        self.blocks = nnx.List([layer(index) for index in range(self.config.layers)])
        if self.config.tie_embeddings:
            self.output = nnx.Param(self.head)
            self.config = dataclasses.replace(self.config, tie_embeddings=False)

    def logits(self, tokens: Array) -> Array:
        """`[B, T]` right-padded tokens -> `[B, T, V]` float32 logits; for inspection, not for training."""
        hidden = self.hidden(tokens)
        return jnp.dot(hidden, self.head, preferred_element_type=_wide(hidden))

    def hidden(self, tokens: Array, *, remat: bool = False) -> Array:
        """`[B, T]` right-padded tokens -> `[B, T, E]`; position t predicts token t + 1.

        `remat`: recompute activations in the backward pass instead of keeping them.
        """
        turns = turns_of(self.config, jnp.arange(tokens.shape[-1])[None])

        def layer(x: Array, block: Block, windowed: Array | None) -> Array:
            turn, window = of_layer(self.config, windowed, turns)
            return _self_attend(block, x, turn, window=window)[0]

        return self.norm(self._scan(layer, self.embed[tokens], remat=remat))

    def extend(
        self,
        tokens: Array,
        prefix: Store,
        groups: Array,
        starts: Array,
        attend: Attend = shared_prefix_attention,
    ) -> Store:
        """Keys and values of the next tokens of some prefixes; what these hold isn't computed again.

        Args:
          tokens: `[B, C]`; the first stands in slot `starts`.
          prefix: `[L, N, ...]` with P slots.
          groups: `[B]` int, the prefixes' places in `prefix`.
          starts: `[B]` int, slots of theirs that exist.
          attend: as of `decode`.

        Returns:
          `[L, B, G, D, C]` and `[L, B, G, C, D]`: C slots of B prefixes.
        """
        size, length = prefix[0].keys.shape[-1], tokens.shape[-1]
        whole, inside = views_of_chunks(self.config, starts, length, size)

        def layer(
            stack: Block,
            windowed: np.ndarray | None,
            shared: KV,
            x: Array,
            index: Array | int,
        ) -> tuple[Array, KV]:
            view = view_of_layer(windowed, index, whole, inside)
            graph, params = nnx.split(stack)
            return _extend_layer(params, shared, index, x, groups, view, graph=graph, attend=attend)

        x, made = self.embed[tokens][:, None], []  # [B, 1, C, E]
        kinds = windowed_layers(self.config, len(self.stacks))
        for stack, windowed, shared in zip(self.stacks, kinds, prefix, strict=True):
            step = functools.partial(layer, stack, windowed, shared)
            if len(shared.keys) == 1:
                x, own = step(x, 0)
                own = jax.tree.map(lambda of_layer: of_layer[None], own)
            else:
                x, own = jax.lax.scan(step, x, jnp.arange(len(shared.keys)))
            made.append(own)
        return tuple(made)

    def suffix_hidden(
        self,
        prefix: Array,
        rows: Array,
        packing: Packing,
        *,
        remat: bool = False,
        mesh: Mesh | None = None,
    ) -> Array:
        """Hidden states of suffixes whose shared prefixes run through the network once.

        Args:
          prefix: `[N, P]` tokens of prefixes, the last token of each left out.
          rows: `[N, K, S]` tokens: of each suffix the last prefix token, then its own but for the last.
          packing: which group and suffix each of them is of; see `one_group_each`.
          remat: recompute activations in the backward pass instead of keeping them.
          mesh: of devices that hidden states are split over: between layers by `parallel.hidden_sharding`,
            inside one by groups alone. Left to itself, XLA may split them as the weights are, and sum them
            over devices in every layer.

        Returns:
          `[N, K, S, E]`; the state at a suffix's slot t predicts its t-th token.
        """
        turns = turns_of(self.config, packing.positions)
        prefix_turns = turns_of(self.config, packing.prefix_positions)

        def between(x: Array) -> Array:
            return x if mesh is None else _constrain(x, hidden_sharding(mesh, x.shape))

        def inside(x: Array) -> Array:
            return x if mesh is None else _constrain(x, rows_sharding(mesh))

        def layer(
            carry: tuple[Array, Array], block: Block, windowed: Array | None
        ) -> tuple[Array, Array]:
            turn, window = of_layer(self.config, windowed, turns)
            prefix_turn, _ = of_layer(self.config, windowed, prefix_turns)
            # Both at either end: else XLA gathers weights for tokens that stay split.
            shared, own = (inside(between(x)) for x in carry)
            shared, seen_keys, seen_values = _self_attend(
                block, shared, prefix_turn, packing.prefix_groups, window=window, recompute=True
            )
            seen = Prefix(seen_keys, seen_values, packing.prefix_groups, packing.groups)
            if window is not None:
                seen = seen._replace(
                    positions=packing.prefix_positions, reader_positions=packing.positions
                )
            query, keys, values = block.project(own, turn)
            attended = causal_attention(
                query,
                *_slots_inside(keys, values),
                packing.suffixes,
                seen,
                window=window,
                recompute=True,
            )
            own = block.combine(own, attended)
            return between(inside(shared)), between(inside(own))

        embed = self.embed[...]
        if mesh is not None:
            embed = _constrain(embed, embed_sharding(mesh, len(embed)))
        start = between(inside(embed[prefix])), between(inside(embed[rows]))
        _, own = self._scan(layer, start, remat=remat)
        return self.norm(own)

    def standing(
        self, slots: Array, prefix_lengths: Array, size: int, prefix_size: int
    ) -> Standing:
        """Of tokens in the own `slots` `[N, K]` of rows with `size` of them, behind `prefix_size` slots."""
        return standing_of(self.config, slots, prefix_lengths, size, prefix_size)

    def decode(
        self,
        tokens: Array,
        slots: Array,
        prefix: Store,
        prefix_lengths: Array,
        suffix: Store,
        standing: Standing | None = None,
        attend: Attend = shared_prefix_attention,
    ) -> tuple[Array, Store]:
        """One decoding step for K rows of N groups.

        Args:
          tokens: `[N, K]` the tokens fed.
          slots: `[N, K]` the row's own slot each is written to; slot 0 is the last prefix token's.
          prefix: keys and values shared by a group's rows, `[L, N, ...]` with P slots.
          prefix_lengths: `[N]` int, slots of `prefix` that exist.
          suffix: the rows' own keys and values, `[L, N, K, ...]` with S slots.
          standing: of the slots. A loop that carries it keeps it from being computed in every layer.
          attend: the attention, as over one device or over several.

        Returns:
          `[N, K, E]` hidden states that predict the next tokens, and `suffix` with the slots written.
        """
        size = suffix[0].keys.shape[-1]
        prefix_size = prefix[0].keys.shape[-1]
        here = standing or self.standing(slots, prefix_lengths, size, prefix_size)
        whole = View(here.turn, here.mask, existing(prefix_lengths, prefix_size))

        def layer(
            stack: Block,
            windowed: np.ndarray | None,
            shared: KV,
            index: Array | int,
            carry: tuple[Array, KV],
        ) -> tuple[Array, KV]:
            x, cache = carry
            view = view_of_layer(windowed, index, whole, here.inside)
            graph, params = nnx.split(stack)
            return _decode_layer(
                params, shared, index, x, cache, slots, view, graph=graph, attend=attend
            )

        x, written = self.embed[tokens][:, :, None], []  # [N, K, 1, E]
        kinds = windowed_layers(self.config, len(self.stacks))
        for stack, windowed, shared, own in zip(self.stacks, kinds, prefix, suffix, strict=True):
            step = functools.partial(layer, stack, windowed, shared)
            count = len(own.keys)
            x, own = (
                step(0, (x, own)) if count == 1 else jax.lax.fori_loop(0, count, step, (x, own))
            )
            written.append(own)
        return self.norm(x)[:, :, 0], tuple(written)

    def _scan(
        self, layer: Callable[[Carry, Block, Array | None], Carry], carry: Carry, *, remat: bool
    ) -> Carry:
        """`layer(carry, block, whether windowed)` over all layers."""
        kinds = windowed_layers(self.config, len(self.stacks))
        for stack, windowed in zip(self.stacks, kinds, strict=True):
            graph, params = nnx.split(stack)

            def body(
                carry: Carry, xs: tuple[nnx.State, Any], graph: nnx.GraphDef = graph
            ) -> tuple[Carry, None]:
                return layer(carry, nnx.merge(graph, xs[0]), xs[1]), None

            carry, _ = jax.lax.scan(
                jax.checkpoint(body) if remat else body, carry, (params, windowed)
            )
        return carry


# Both of their own, so that layers which are unrolled are traced once.
@functools.partial(jax.jit, static_argnames=("graph", "attend"))
def _extend_layer(
    params: nnx.State,
    shared: KV,
    index: Array | int,
    x: Array,
    groups: Array,
    view: View,
    *,
    graph: nnx.GraphDef[Block],
    attend: Attend,
) -> tuple[Array, KV]:
    """A layer of `Decoder.extend`: the one of that index in its stack."""
    block = nnx.merge(graph, jax.tree.map(lambda p: p[index], params))
    query, keys, values = block.project(x, view.turn)
    own = KV(*_slots_inside(keys, values))
    # Only the prefixes that are read are taken out, and only of this layer.
    seen = shared.keys[index, groups], shared.values[index, groups]
    attended = attend(query, *own, view.mask, *seen, view.prefix_mask)
    return block.combine(x, attended), KV(own.keys[:, 0], own.values[:, 0])


@functools.partial(jax.jit, static_argnames=("graph", "attend"))
def _decode_layer(
    params: nnx.State,
    shared: KV,
    index: Array | int,
    x: Array,
    cache: KV,
    slots: Array,
    view: View,
    *,
    graph: nnx.GraphDef[Block],
    attend: Attend,
) -> tuple[Array, KV]:
    """A layer of `Decoder.decode`: the one of that index in its stack."""
    block = nnx.merge(graph, jax.tree.map(lambda p: p[index], params))
    group, row = jnp.indices(slots.shape)
    query, key, value = block.project(x, view.turn)
    # Written per row: TPU copies a cache that is written at one shared slot.
    keys = cache.keys.at[index, group, row, :, :, slots].set(key[:, :, 0])
    values = cache.values.at[index, group, row, :, slots].set(value[:, :, 0])
    attended = attend(
        query,
        keys[index],
        values[index],
        view.mask,
        shared.keys[index],
        shared.values[index],
        view.prefix_mask,
    )
    return block.combine(x, attended), KV(keys, values)


def _self_attend(
    block: Block,
    x: Array,
    turn: Rotation,
    segments: Array | None = None,
    *,
    window: Array | None = None,
    recompute: bool = False,
) -> tuple[Array, Array, Array]:
    """One causal layer over `x` [N, T, E]; right padding can't be seen from before it."""
    query, keys, values = block.project(x, turn)
    keys, values = _slots_inside(keys, values)
    if segments is not None:
        segments = segments[:, None]
    own = query[:, None], keys[:, None], values[:, None]  # one lane
    attended = causal_attention(*own, segments, window=window, recompute=recompute)[:, 0]
    return block.combine(x, attended), keys, values


def _slots_inside(keys: Array, values: Array) -> tuple[Array, Array]:
    """`[..., slots, G, D]` both -> `[..., G, D, slots]` and `[..., G, slots, D]`."""
    return jnp.moveaxis(keys, -3, -1), jnp.moveaxis(values, -3, -2)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
