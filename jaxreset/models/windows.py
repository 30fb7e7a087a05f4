"""What a token sees, in layers that see all before it and in layers with a window.

One block's code runs over both kinds of layers. What each kind needs is computed once, and a layer chooses.
Where no layer has a window there is nothing to choose, and programs are as if there were none anywhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxreset.models.attention import within
from jaxreset.models.block import DecoderConfig
from jaxreset.models.rotary import Rotation, rotation

Array = jax.Array
Choice = TypeVar("Choice")

NO_WINDOW = 2**30  # tokens, more than there are


class View(NamedTuple):
    """What tokens behind a prefix see in a layer, T of each row: one in a decoding step.

    turn: their rotation.  mask: own slots, broadcastable to `[N, K, T, S]`.
    prefix_mask: slots of the prefix, broadcastable to `[N, K, T, P]`.
    """

    turn: Rotation
    mask: Array
    prefix_mask: Array


class Standing(NamedTuple):
    """Where the tokens of a decoding step stand.

    turn, mask: as in `View`.  inside: the view in layers with a window, if there are any.
    """

    turn: Rotation
    mask: Array
    inside: View | None = None


def windowed_layers(config: DecoderConfig, stacks: int) -> list[np.ndarray | None]:
    """Of each stack, which of its layers `[L]` have a window; None, where no layer of all has one."""
    if not any(config.windowed):
        return [None] * stacks
    return list(np.array(config.windowed).reshape(stacks, -1))


def turns_of(config: DecoderConfig, positions: Array) -> tuple[Rotation, Rotation]:
    """Of tokens at `positions` [..., T]: in layers that see all, and in those with a window."""
    c = config
    turn = functools.partial(rotation, positions, width=c.head_dim, dtype=c.dtype)
    whole = turn(theta=c.rope_theta, scaling=c.rope_scaling)
    if c.window_rope is None:
        return whole, whole
    return whole, turn(theta=c.window_rope.theta, scaling=c.window_rope.scaling)


def of_layer(
    config: DecoderConfig, windowed: Array | None, turns: tuple[Rotation, Rotation]
) -> tuple[Rotation, Array | None]:
    """Rotation and window of a layer; the window is None where no layer has one."""
    if windowed is None:
        return turns[0], None
    return chosen(windowed, *turns), jnp.where(windowed, config.window or NO_WINDOW, NO_WINDOW)


def view_of_layer(
    windowed: np.ndarray | None, index: Array | int, whole: View, inside: View | None
) -> View:
    """The view in a stack's layer of that index, `windowed` as `windowed_layers` says."""
    if windowed is None or inside is None:
        return whole
    if len(windowed) == 1:
        return inside if windowed[0] else whole
    return chosen(jnp.asarray(windowed)[index], whole, inside)


def chosen(windowed: Array, whole: Choice, inside: Choice) -> Choice:
    """What a layer uses, of what those that see all use and of what those with a window use."""
    return jax.tree.map(functools.partial(jnp.where, windowed), inside, whole)


def standing_of(
    config: DecoderConfig, slots: Array, prefix_lengths: Array, size: int, prefix_size: int
) -> Standing:
    """Of tokens in the own `slots` `[N, K]` of rows with `size` of them, behind `prefix_size` slots."""
    positions = (prefix_lengths[:, None] + slots)[..., None]
    whole, inside = turns_of(config, positions)
    standing = Standing(whole, (jnp.arange(size) <= slots[..., None])[:, :, None])
    if not any(config.windowed):
        return standing
    window = config.window or NO_WINDOW
    own = standing.mask & within(window, slots[..., None], jnp.arange(size))
    near = within(window, positions, jnp.arange(prefix_size))
    seen = existing(prefix_lengths, prefix_size) & near
    return standing._replace(inside=View(inside, own, seen))


def views_of_chunks(
    config: DecoderConfig, starts: Array, length: int, prefix_size: int
) -> tuple[View, View | None]:
    """Of `length` tokens of each of N prefixes, behind its first `starts` [N] of `prefix_size` slots.

    In layers that see all, and in those with a window, if there are any.
    """
    slots = jnp.arange(length)
    positions = starts[:, None, None] + slots
    whole, inside = turns_of(config, positions)
    causal = (slots <= slots[:, None])[None, None]
    exist = existing(starts, prefix_size)
    view = View(whole, causal, exist)
    if not any(config.windowed):
        return view, None
    window = config.window or NO_WINDOW
    near = within(window, positions, jnp.arange(prefix_size))
    return view, View(inside, causal & within(window, slots, slots), exist & near)


def existing(lengths: Array, size: int) -> Array:
    """Which of a prefix's slots there are, `[N, 1, 1, size]`."""
    return (jnp.arange(size) < lengths[:, None])[:, None, None]
