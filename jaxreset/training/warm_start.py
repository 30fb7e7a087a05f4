"""Supervised steps on demonstrations: they give a fresh policy something to be reinforced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxreset.config import WarmStart
from jaxreset.losses import token_logps
from jaxreset.models.decoder import Decoder
from jaxreset.models.policy import Policy
from jaxreset.tasks.base import Problem
from jaxreset.tasks.chain import ChainTask

Array = jax.Array


def demonstration_batches(
    task: ChainTask, problems: Sequence[Problem], tokenizer: Any, config: WarmStart, *, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of demonstrations: tokens [B, T], completion starts [B] and ends [B].

    T is the longest demonstration's length that was met, rounded up to a multiple of 16.
    """
    eos = tokenizer.eos_token_id
    for step in range(config.steps):
        rng = np.random.default_rng((seed, step))
        encoded = []
        for _ in range(config.batch):
            problem = problems[int(rng.integers(len(problems)))]
            # Localising is easier to learn once the sums are known.
            solve = step < config.steps // 3 or rng.random() < 0.5
            show = task.demonstrate_solution if solve else task.demonstrate_localization
            prompt, completion = map(tokenizer.encode, show(problem, rng))
            encoded.append((len(prompt), [*prompt, *completion, eos]))
        width = -(-max(len(tokens) for _, tokens in encoded) // 16) * 16
        tokens = np.zeros((config.batch, width), np.int32)
        for row, (_, ids) in enumerate(encoded):
            tokens[row, : len(ids)] = ids
        starts = np.array([start for start, _ in encoded], np.int32)
        ends = np.array([len(ids) for _, ids in encoded], np.int32)
        yield tokens, starts, ends


@partial(jax.jit, static_argnames=("graph", "optimizer"), donate_argnums=(0, 1))
def supervised_step(
    params: nnx.State,
    opt_state: optax.OptState,
    tokens: Array,
    starts: Array,
    ends: Array,
    *,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
) -> tuple[nnx.State, optax.OptState, Array]:
    """One step on the negative log-likelihood of completions; see `demonstration_batches`.

    It is the mean over demonstrations of each one's mean, so that a short answer to a localisation
    question weighs as much as a long solution.
    """

    def loss(params: nnx.State) -> Array:
        model: Decoder = nnx.merge(graph, params)
        logps = token_logps(model.hidden(tokens[:, :-1]), model.head, tokens[:, 1:])
        position = jnp.arange(1, tokens.shape[1])
        mask = (position >= starts[:, None]) & (position < ends[:, None])
        return -(jnp.where(mask, logps, 0).sum(-1) / (ends - starts)).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def warm_start(
    policy: Policy,
    task: ChainTask,
    problems: Sequence[Problem],
    config: WarmStart,
    *,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Policy:
    """Trains on demonstrations; `on_step(step, loss)` is called now and then. Consumes `policy`."""
    warmup = max(config.steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    params, opt_state = policy.params, jax.jit(optimizer.init)(policy.params)
    batches = demonstration_batches(task, problems, policy.tokenizer, config, seed=seed)
    for step, batch in enumerate(batches, 1):
        params, opt_state, loss = supervised_step(
            params, opt_state, *batch, graph=policy.graph, optimizer=optimizer
        )
        if step % 20 == 0 or step == config.steps:
            on_step(step, float(loss))
    return policy.with_params(params, policy.version)
