"""Supervised steps on demonstrations, before the first step that learns from rewards.

The loss of a step is minus the mean over demonstrations of the mean over the answer's tokens of
log π(token): a short answer weighs as much as a long one. So a demonstration is a group with one suffix
and an advantage of 1, and the trainer's own update learns from it, with its microbatches, adapters, mesh.

Only a fresh policy and what its task draws for it are kept apart: they are small, and a batch runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from jaxreset.config import Config
from jaxreset.errors import RunError
from jaxreset.groups import Group
from jaxreset.learning.form import LossForm
from jaxreset.learning.microbatches import PackShape, pack, pack_shapes
from jaxreset.learning.optimizer import make_optimizer
from jaxreset.learning.update import accumulate, apply, committed, init_state, layout_of
from jaxreset.losses import token_logps
from jaxreset.models.adapters import trained
from jaxreset.models.block import MATRICES
from jaxreset.models.policy import Policy
from jaxreset.models.precision import computing_decoder, widened
from jaxreset.parallel import data_shards, put, rows_sharding
from jaxreset.run.lessons import Lessons
from jaxreset.tasks.demonstrations import Demonstration

Array = jax.Array
OnStep = Callable[[dict[str, float]], None]

SUPERVISED = LossForm(aggregation="sequence")
SIZES = 32  # of which a microbatch's are multiples
SEEN = 20  # steps after which those of a batch at once are looked at


class Padded(NamedTuple):
    """Right-padded prompts with answers: tokens `[B, T]`, answers' starts and ends `[B]`."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def padded(shown: Sequence[Demonstration]) -> Padded:
    """Demonstrations as rows, their width a multiple of 16, so that few shapes are compiled."""
    starts = np.array([len(one.prompt) for one in shown], np.int32)
    ends = np.array([len(one.prompt) + len(one.answer) for one in shown], np.int32)
    tokens = np.zeros((len(shown), -(-int(ends.max()) // 16) * 16), np.int32)
    for row, one in enumerate(shown):
        tokens[row, : starts[row]], tokens[row, starts[row] : ends[row]] = one.prompt, one.answer
    return Padded(tokens, starts, ends)


def make_warm_start_optimizer(config: Config) -> optax.GradientTransformation:
    """The one that a resolved config asks for; its rate rises, and falls to 0 where the warm start ends.

    AdamW is the run's, but for the rate.
    """
    warm = config.warm_start
    assert warm.learning_rate is not None
    warmup = max(warm.steps // 20, 1)
    if warm.optimizer == "muon":
        return _muon(
            optax.warmup_cosine_decay_schedule(
                0.0, warm.learning_rate, warmup, max(warm.steps, warmup + 1)
            )
        )
    settings = config.optimizer.make(warm.steps)._replace(
        learning_rate=warm.learning_rate, warmup_steps=warmup, schedule="cosine"
    )
    return make_optimizer(settings)


def _muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon on the matrices, which learns the sums in half of AdamW's steps, and AdamW elsewhere."""

    def matrices(params: nnx.State) -> Any:
        def of(path: tuple[Any, ...], _: Array) -> MuonDimensionNumbers | None:
            names = (str(getattr(key, "key", getattr(key, "name", key))) for key in path)
            axes = next((MATRICES[name] for name in names if name in MATRICES), None)
            return None if axes is None else MuonDimensionNumbers(*axes)  # the rest is left to Adam

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            rate,
            adam_learning_rate=lambda step: 0.1 * rate(step),
            adam_b2=0.95,
            weight_decay=1e-4,
            muon_weight_dimension_numbers=matrices,
        ),
    )


@partial(jax.jit, static_argnames=("graph", "optimizer"), donate_argnums=(0, 1))
def supervised_step(
    params: nnx.State,
    opt_state: optax.OptState,
    batches: tuple[Padded, ...],
    *,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
) -> tuple[nnx.State, optax.OptState, Array]:
    """One step on the negative log-likelihood of completions, the sum of the batches' means.

    A batch's mean is over demonstrations, of each one's mean over its tokens: a short answer weighs
    as much as a long one.
    """

    def loss(params: nnx.State) -> Array:
        model = computing_decoder(graph, params)
        total = jnp.zeros(())
        for tokens, starts, ends in jax.tree.map(jnp.asarray, batches):
            logps = token_logps(model.hidden(tokens[:, :-1]), model.head, tokens[:, 1:])
            position = jnp.arange(1, tokens.shape[1])
            mask = (position >= starts[:, None]) & (position < ends[:, None])
            total -= (jnp.where(mask, logps, 0).sum(-1) / (ends - starts)).mean()
        return total

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def warm_start(
    policy: Policy,
    lessons: Lessons,
    config: Config,
    *,
    on_step: OnStep = lambda record: None,
    interrupt: Callable[[], None] = lambda: None,
    mesh: jax.sharding.Mesh | None = None,
) -> Policy:
    """Trains on demonstrations. Consumes `policy`, of which it trains what training would.

    Args:
      policy: a fresh one without adapters, for all its parameters are to learn.
      lessons: what each step learns from.
      config: resolved.
      on_step: told of steps: `step`, `loss`, and of packed ones `grad_norm` and `tokens`.
      interrupt: called before each step; may raise.
      mesh: of devices that the batches are split over.

    Returns:
      The policy; what a fresh one learnt is rounded to its dtype, as a base of adapters is.

    Raises:
      RunError: the loss, or gradients in a row, aren't finite.
    """
    learn = _at_once if config.warms_at_once else _packed
    params = learn(policy, lessons, config, on_step, interrupt, mesh)
    if config.model.path is None:
        params = jax.tree.map(lambda x, before: x.astype(before.dtype), params, policy.params)
    return policy.with_params(params, policy.version)


def _at_once(
    policy: Policy,
    lessons: Lessons,
    config: Config,
    on_step: OnStep,
    interrupt: Callable[[], None],
    mesh: jax.sharding.Mesh | None,
) -> nnx.State:
    """The parameters after steps whose batches are padded; a mesh splits those that it divides."""
    optimizer = make_warm_start_optimizer(config)
    params = widened(policy.params)
    opt_state = jax.jit(optimizer.init)(params)
    for step, shown in _steps(lessons, config, interrupt):
        batches = tuple(map(padded, shown))
        if mesh is not None and all(len(b.ends) % data_shards(mesh) == 0 for b in batches):
            batches = put(batches, rows_sharding(mesh))
        params, opt_state, loss = supervised_step(
            params, opt_state, batches, graph=policy.graph, optimizer=optimizer
        )
        if step % SEEN == 0 or step == config.warm_start.steps:
            if not np.isfinite(loss):
                raise _diverged(f"the loss of step {step} isn't finite")
            on_step({"step": step, "loss": float(loss)})
    return params


def _packed(
    policy: Policy,
    lessons: Lessons,
    config: Config,
    on_step: OnStep,
    interrupt: Callable[[], None],
    mesh: jax.sharding.Mesh | None,
) -> nnx.State:
    """The parameters after steps of the trainer's update; what is trained is float32 at least."""
    optimizer = make_warm_start_optimizer(config)
    params, frozen = trained(policy.params)
    frozen, state = committed(frozen), init_state(params, optimizer)
    del params
    layout, gradient_layout = layout_of(state), layout_of(state.gradients)
    shapes = warm_start_shapes(lessons.found, config.train.microbatch_tokens, mesh)
    static: dict[str, Any] = {"graph": policy.graph, "remat": config.train.remat, "mesh": mesh}
    bad = 0
    for step, shown in _steps(lessons, config, interrupt):
        if not shown:  # all that the task drew is too long
            continue
        groups, loss, normalizer = as_groups(shown), 0.0, len(shown[0])
        for batch in pack(groups, shapes):
            gradients, part = accumulate(
                state.gradients,
                state.params,
                frozen,
                put(batch, None if mesh is None else rows_sharding(mesh)),
                np.float32(1),
                form=SUPERVISED,
                layout=gradient_layout,
                **static,
            )
            state, loss = state._replace(gradients=gradients), loss + float(part)
        state, norm = apply(
            state, np.float32(normalizer), np.int32(step - 1), optimizer=optimizer, layout=layout
        )
        bad = 0 if np.isfinite(norm) else bad + 1
        if bad >= config.train.max_nonfinite:
            places = ", ".join(one.place for one in shown[0][:3])
            raise _diverged(
                f"{bad} gradients in a row weren't finite; the last batch began with {places}"
            )
        tokens = sum(group.tokens for group in groups)
        on_step(
            {"step": step, "loss": loss / normalizer, "grad_norm": float(norm), "tokens": tokens}
        )
    return nnx.merge_state(state.params, frozen)


def _steps(
    lessons: Lessons, config: Config, interrupt: Callable[[], None]
) -> Iterator[tuple[int, tuple[Sequence[Demonstration], ...]]]:
    """Each step from 1, with what it learns from."""
    for step in range(1, config.warm_start.steps + 1):
        interrupt()
        yield step, lessons.of_step(step - 1)


def as_groups(shown: Sequence[Sequence[Demonstration]]) -> list[Group]:
    """Groups whose summed losses, divided by the size of the first batch, are the batches' means summed."""
    return [
        Group(
            number,
            one.prompt,
            [one.answer],
            behavior_logps=[np.zeros(len(one.answer), np.float32)],
            rewards=np.ones(1),
            advantages=np.array([len(shown[0]) / len(batch)]),
        )
        for batch in shown
        for number, one in enumerate(batch)
    ]


def warm_start_shapes(
    found: Sequence[Demonstration], tokens: int, mesh: jax.sharding.Mesh | None = None
) -> list[PackShape]:
    """At most four shapes of microbatches that hold any of the demonstrations; see `pack_shapes`."""
    prompt = max(len(one.prompt) for one in found) - 1
    answer = max(len(one.answer) for one in found)
    return pack_shapes(
        1,
        *(-(-size // SIZES) * SIZES for size in (prompt, answer)),
        tokens=tokens,
        shards=data_shards(mesh),
        multiple=1 if mesh is None else mesh.shape["tensor"],
    )


def _diverged(what: str) -> RunError:
    return RunError(f"warm start: {what}. Lower warm_start.learning_rate, and start again")
