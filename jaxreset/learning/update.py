"""The optimizer side of a step: gradients summed over microbatches, then one update.

Gradients are sums over rollouts; the division by the number of rollouts (or tokens) comes at the
end, so the result doesn't depend on how groups are split into microbatches, nor on how many steps
an update waits for groups with a gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxreset.learning.form import LossForm
from jaxreset.learning.microbatches import GroupBatch
from jaxreset.losses import (
    chunk_size,
    importance_weights,
    kl_penalty,
    policy_loss,
    token_logps,
    token_logps_and_entropy,
)
from jaxreset.models.precision import computing_decoder, widened
from jaxreset.parallel import data_shards, head_sharding

Array = jax.Array
Layout = tuple[jax.sharding.Sharding, ...] | None


class TrainState(NamedTuple):
    """What an update overwrites: trained parameters, optimizer state, and gradients summed so far.

    Gradients of nothing need no room while a step samples: None stands for zeros; see `filled`.
    """

    params: nnx.State
    opt_state: optax.OptState
    gradients: nnx.State | None


def init_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """State at step 0: all of it in float32 at least, and where `params` lie."""
    shardings = jax.tree.map(_sharding, abstract_state(params, optimizer))
    params = widened(params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return filled(TrainState(committed(params), opt_state, None))


def filled(state: TrainState) -> TrainState:
    """The state with gradients, which are zeros where it has none."""
    if state.gradients is not None:
        return state
    return state._replace(gradients=_zeros(state.params, layout=layout_of(state.params)))


@partial(jax.jit, static_argnames="layout", keep_unused=True)  # they say where zeros lie
def _zeros(params: nnx.State, *, layout: Layout) -> nnx.State:
    return _laid_out(jax.tree.map(jnp.zeros_like, params), layout)


def abstract_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and places of `init_state`'s result; of `params` it asks no more either."""
    shardings = jax.tree.map(_sharding, params)
    params = jax.eval_shape(widened, params)
    replicated = jax.tree.leaves(shardings)[0]
    if isinstance(replicated, jax.sharding.NamedSharding):
        replicated = jax.sharding.NamedSharding(replicated.mesh, jax.sharding.PartitionSpec())

    def like(x: Any, sharding: jax.sharding.Sharding) -> Any:
        if isinstance(x, optax.MaskedNode):  # another part of the optimizer has this parameter's
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        like,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda x: like(x, replicated),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    whole = jax.tree.map(like, params, shardings)
    return TrainState(whole, opt_state, whole)


def committed(tree: Any) -> Any:
    """The arrays bound to where they lie, as an update's and a checkpoint's are: others compile anew."""
    return jax.device_put(tree, jax.tree.map(_sharding, tree))


def _sharding(x: Array) -> jax.sharding.Sharding:
    return x.sharding


def layout_of(tree: Any) -> Layout:
    """The sharding of each leaf, hashable, so a static argument; None where all lie on one device."""
    shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(tree))
    return shardings if any(len(s.device_set) > 1 for s in shardings) else None


def _laid_out(tree: Any, layout: Layout) -> Any:
    """`tree` in that layout: left to itself, XLA may give a result another than its input's."""
    if layout is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, layout))


def batch_hidden(
    params: nnx.State,
    frozen: nnx.State,
    batch: GroupBatch,
    graph: nnx.GraphDef,
    remat: bool,
    mesh: jax.sharding.Mesh | None,
) -> tuple[Array, Array]:
    """Hidden states of a microbatch's slots, [N, K, S, E], and the output projection."""
    model = computing_decoder(graph, params, frozen)
    head = model.head
    if mesh is not None:
        head = jax.lax.with_sharding_constraint(head, head_sharding(mesh, head.shape[-1]))
    hidden = model.suffix_hidden(batch.prefix, batch.rows, batch.packing, remat=remat, mesh=mesh)
    return hidden, head


def exists(batch: GroupBatch) -> Array:
    """Which tokens of a microbatch's suffixes there are: [N, C, S]."""
    return jnp.arange(batch.cells.shape[-1]) < batch.lengths[..., None]


def by_suffix(values: Array, batch: GroupBatch) -> Array:
    """Values of the slots [N, K, S], sorted by suffix: [N, C, S]; padding holds any of them."""
    bins, cells = len(values), batch.cells
    taken = jnp.take_along_axis(values.reshape(bins, -1), cells.reshape(bins, -1), axis=1)
    return taken.reshape(cells.shape)


@partial(
    jax.jit,
    static_argnames=("graph", "form", "remat", "mesh", "layout"),
    donate_argnames="gradients",
)
def accumulate(
    gradients: nnx.State,
    params: nnx.State,
    frozen: nnx.State,
    batch: GroupBatch,
    temperature: Array,
    *,
    graph: nnx.GraphDef,
    form: LossForm,
    remat: bool,
    mesh: jax.sharding.Mesh | None = None,
    layout: Layout = None,
) -> tuple[nnx.State, Array]:
    """Adds a microbatch's gradient, undivided, to `gradients`.

    Args:
      gradients: donated; of `params`.
      params: the trained parameters.
      frozen: the others: the base of LoRA adapters, or none.
      batch: the microbatch.
      temperature: scalar float32, of sampling.
      graph, form, remat: static; `remat` recomputes activations in the backward pass.
      mesh: static; its data shards split the bins. None: one device.
      layout: that of `gradients`, which the sum keeps; None leaves it to XLA.

    Returns:
      The sum, and the microbatch's loss, undivided.
    """

    def loss(params: nnx.State) -> Array:
        hidden, head = batch_hidden(params, frozen, batch, graph, remat, mesh)
        scoring = token_logps_and_entropy if form.entropy_bonus else token_logps
        chunk = chunk_size(head.shape[-1], shards=data_shards(mesh))
        scored = scoring(hidden, head, batch.targets, temperature=temperature, chunk=chunk)
        logps, *entropy = (by_suffix(x, batch) for x in jax.tree.leaves(scored))
        mask, weights, penalties = exists(batch), None, jnp.zeros_like(logps)
        old = batch.old_logps if form.recompute else None
        if form.importance_cap is not None:
            ours = logps if old is None else old
            weights = importance_weights(ours, batch.behavior_logps, cap=form.importance_cap)
        if form.kl:
            assert batch.reference_logps is not None  # the learner's part
            divergence = kl_penalty(
                logps, batch.reference_logps, where=mask, estimator=form.kl_estimator
            )
            penalties += form.kl * divergence
        if form.entropy_bonus:
            penalties -= form.entropy_bonus * entropy[0]
        return policy_loss(
            logps,
            batch.advantages,
            mask,
            behavior_logps=batch.behavior_logps if old is None else old,
            clip=form.clip,
            dual_clip=form.dual_clip,
            form=form.form,
            token_weights=weights,
            penalties=penalties if form.regularized else None,
            aggregation=form.aggregation,
            normalizer=1.0,
        )[0]

    value, gradient = jax.value_and_grad(loss)(params)
    total = jax.tree.map(jnp.add, gradients, gradient)
    return _laid_out(total, layout), value


@partial(jax.jit, static_argnames=("graph", "remat", "mesh"))
def score(
    params: nnx.State,
    frozen: nnx.State,
    batch: GroupBatch,
    temperature: Array,
    *,
    graph: nnx.GraphDef,
    remat: bool,
    mesh: jax.sharding.Mesh | None = None,
) -> Array:
    """Log-probabilities of a microbatch's suffixes, `[N, C, S]`; padding holds any of them."""
    hidden, head = batch_hidden(params, frozen, batch, graph, remat, mesh)
    chunk = chunk_size(head.shape[-1], shards=data_shards(mesh))
    logps = token_logps(hidden, head, batch.targets, temperature=temperature, chunk=chunk)
    return by_suffix(logps, batch)


class TokenSums(NamedTuple):
    """Sums over tokens: |trainer's - sampler's log-probability|, entropy, and how many there are."""

    gap: Array
    entropy: Array
    tokens: Array


@partial(jax.jit, static_argnames=("graph", "remat", "mesh"))
def measure(
    params: nnx.State,
    frozen: nnx.State,
    batch: GroupBatch,
    temperature: Array,
    *,
    graph: nnx.GraphDef,
    remat: bool,
    mesh: jax.sharding.Mesh | None = None,
) -> TokenSums:
    """What the policy makes of tokens that were sampled."""
    hidden, head = batch_hidden(params, frozen, batch, graph, remat, mesh)
    chunk = chunk_size(head.shape[-1], shards=data_shards(mesh))
    scored = token_logps_and_entropy(
        hidden, head, batch.targets, temperature=temperature, chunk=chunk
    )
    logps, entropies = (by_suffix(x, batch) for x in scored)
    mask = exists(batch)
    gaps = jnp.where(mask, jnp.abs(logps - batch.behavior_logps), 0)
    return TokenSums(gaps.sum(), jnp.where(mask, entropies, 0).sum(), mask.sum())


@partial(jax.jit, static_argnames=("optimizer", "layout"), donate_argnames="state")
def apply(
    state: TrainState,
    normalizer: Array,
    position: Array | int = 0,
    *,
    optimizer: optax.GradientTransformation,
    layout: Layout = None,
) -> tuple[TrainState, Array]:
    """One optimizer step with `gradients / normalizer`, which start from 0 again.

    Args:
      state: `filled`; donated.
      normalizer: scalar float32: rollouts or tokens behind the gradients.
      position: scalar int32: how far the training is, see `learning_rate`.
      optimizer: static.
      layout: that of `state`, which the new state keeps; None leaves it to XLA.

    Returns:
      The new state, and the gradient's global norm; where that isn't finite the step is skipped.
    """
    gradients = jax.tree.map(lambda g: g / normalizer.astype(g.dtype), state.gradients)
    norm = optax.tree.norm(gradients)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(_: None) -> tuple[nnx.State, optax.OptState]:
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, position=position
        )
        return optax.apply_updates(state.params, updates), opt_state

    def skip(_: None) -> tuple[nnx.State, optax.OptState]:
        return state.params, state.opt_state

    params, opt_state = jax.lax.cond(jnp.isfinite(norm), step, skip, None)
    zeros = jax.tree.map(jnp.zeros_like, state.gradients)
    after = TrainState(params, opt_state, zeros)
    return _laid_out(after, layout), norm


@partial(jax.jit, static_argnames="layout", donate_argnames="gradients")
def start_anew(gradients: nnx.State, *, layout: Layout) -> tuple[Array, nnx.State]:
    """Whether the gradients (donated) are finite, and zeros in their place."""
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    return jnp.isfinite(optax.tree.norm(gradients)), _laid_out(zeros, layout)
