"""Supervised steps on demonstrations: they give a fresh policy something to be reinforced."""

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

from jaxreset.config import WarmStart
from jaxreset.losses import token_logps
from jaxreset.models.block import MATRICES
from jaxreset.models.encoding import continuation_tokens, prompt_tokens
from jaxreset.models.policy import Policy
from jaxreset.models.precision import computing_decoder, widened
from jaxreset.parallel import data_shards, put, rows_sharding
from jaxreset.tasks.base import Problem

Array = jax.Array

# Solving comes first: localising is learnt quickly once the sums are known, and hardly before.
SOLVING_ONLY = 0.45


class Demonstrations(NamedTuple):
    """Right-padded prompts with completions: tokens `[B, T]`, completion starts and ends `[B]`."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def demonstrations(
    task: Any,
    problems: Sequence[Problem],
    tokenizer: Any,
    config: WarmStart,
    *,
    seed: int,
    inline: bool = False,
) -> Iterator[tuple[Demonstrations, ...]]:
    """What each step learns from: solutions, and later as many localisations beside them.

    `task` has `demonstrate_solution`, and where localising is taught `demonstrate_localization`; see
    `tasks.base.Task`.

    Lengths are rounded up to multiples of 16, so that few shapes are compiled.
    """

    def draw(show: Callable[..., tuple[str, str]], count: int) -> Demonstrations:
        encoded = []
        for problem in rng.integers(len(problems), size=count):
            asked, answered = show(problems[int(problem)], rng)
            prompt = prompt_tokens(tokenizer, [asked])[0]
            completion = continuation_tokens(tokenizer, answered)
            encoded.append((len(prompt), [*prompt, *completion, tokenizer.eos_token_id]))
        width = -(-max(len(ids) for _, ids in encoded) // 16) * 16
        tokens = np.zeros((count, width), np.int32)
        for row, (_, ids) in enumerate(encoded):
            tokens[row, : len(ids)] = ids
        starts = np.array([start for start, _ in encoded], np.int32)
        return Demonstrations(tokens, starts, np.array([len(i) for _, i in encoded], np.int32))

    half = max(config.batch // 2, 1)
    for step in range(config.steps):
        rng = np.random.default_rng((seed, step))
        if step < SOLVING_ONLY * config.steps or not hasattr(task, "demonstrate_localization"):
            yield (draw(task.demonstrate_solution, config.batch),)
        else:
            yield (
                draw(task.demonstrate_solution, half),
                draw(partial(task.demonstrate_localization, inline=inline), half),
            )


def make_warm_start_optimizer(config: WarmStart) -> optax.GradientTransformation:
    """Muon on the matrices, which learns the sums in half of AdamW's steps, and AdamW elsewhere."""
    warmup = max(config.steps // 20, 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1)
    )

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
    batches: tuple[Demonstrations, ...],
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
    task: Any,
    problems: Sequence[Problem],
    config: WarmStart,
    *,
    seed: int,
    inline: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    interrupt: Callable[[], None] = lambda: None,
    mesh: jax.sharding.Mesh | None = None,
) -> Policy:
    """Trains on demonstrations; `on_step(step, loss)` is called now and then. Consumes `policy`.

    `interrupt` is called before each step and may raise. `inline`: localisations stand behind the
    attempt that they are about. `mesh`: its data shards split the batches that they divide.
    """
    optimizer = make_warm_start_optimizer(config)
    params = widened(policy.params)
    opt_state = jax.jit(optimizer.init)(params)
    for step, batches in enumerate(
        demonstrations(task, problems, policy.tokenizer, config, seed=seed, inline=inline), 1
    ):
        interrupt()
        if mesh is not None and all(len(b.ends) % data_shards(mesh) == 0 for b in batches):
            batches = put(batches, rows_sharding(mesh))
        params, opt_state, loss = supervised_step(
            params, opt_state, batches, graph=policy.graph, optimizer=optimizer
        )
        if step % 20 == 0 or step == config.steps:
            on_step(step, float(loss))
    kept = jax.tree.map(lambda x, before: x.astype(before.dtype), params, policy.params)
    return policy.with_params(kept, policy.version)
