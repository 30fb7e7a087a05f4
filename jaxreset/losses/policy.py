"""Policy-gradient losses, and the weights and penalties of tokens that go into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreset.losses._arrays import Array, shaped, wide

Metrics = Mapping[str, Array]
Aggregation = Literal["sequence", "token", "constant"]
Clip = float | tuple[float, float]
KLEstimator = Literal["k1", "k2", "k3"]
TokenLoss = Callable[..., Array]  # see `form` of `policy_loss`


def policy_loss(
    logps: Array,
    advantages: Array,
    mask: Array,
    *,
    behavior_logps: Array | None = None,
    clip: Clip | None = None,
    dual_clip: float | None = None,
    form: TokenLoss | None = None,
    token_weights: Array | None = None,
    penalties: Array | None = None,
    aggregation: Aggregation = "sequence",
    normalizer: Array | float | None = None,
) -> tuple[Array, Metrics]:
    """The policy-gradient loss of which GRPO, RRPO and SRPO are presets.

    Without `clip` a token's loss is `-advantage * logp`. With it, it is PPO's clipped surrogate
    `-min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)`, and with `dual_clip` the
    loss of a negative advantage is at most `dual_clip * |advantage|`. A ratio beyond what the dtype of
    `logps` holds counts as one that leaves room for sums, and keeps its slope. With `form`, a token's loss
    is what that function returns.

    Nothing broadcasts, and all is counted and summed in float32 at least.

    Args:
      logps: `[..., T]` log-probabilities under the policy being trained.
      advantages: `[...]` one for each row, or `[..., T]` one for each token (credit of steps, as in
        VinePPO, arXiv 2410.01679).
      mask: `[..., T]` True on the tokens that carry the loss: the suffix, not the shared prefix. Elsewhere
        the other arrays may hold anything.
      behavior_logps: `[..., T]` log-probabilities when sampled, or what else the ratio is taken to (the
        trainer's before its first update); needed with `clip`.
      clip: None, one width for both sides, or `(low, high)`.
      dual_clip: None, or a bound above 1; needs `clip`.
      form: None, or a pure function in place of the surrogate: `form(logps, advantages, mask, *,
        behavior_logps)` gives the `[..., T]` losses of the tokens. It gets arrays `[..., T]`, of float32
        at least and 0 outside the mask; advantages are one for each token, `behavior_logps` is None
        where not given. What it gives outside the mask is not read, but its slope there must be finite (a
        row may have no tokens to divide by). All else here applies as ever, and sums over microbatches
        are exact if the losses of a row depend on that row alone.
      token_weights: `[..., T]` that each token's loss is multiplied by, such as `importance_weights`; they
        get no gradient. Weights to the policy that the ratio is to would count it twice.
      penalties: `[..., T]` that are added to each token's loss, such as `kl_penalty` times a coefficient,
        or an entropy times a negative one.
      aggregation: `"sequence"`: mean over a row's tokens, then over rows. `"token"`: mean over all
        tokens. `"constant"`: sum over all tokens, divided by `normalizer`, a fixed budget.
      normalizer: scalar that the sum is divided by; None counts it here (rows for `"sequence"`, tokens for
        `"token"`). Give the count of the whole minibatch, and the losses of its microbatches sum to
        the minibatch's. Rows without tokens count as rows.

    Returns:
      `(loss, metrics)`: a scalar, and scalars `tokens`, and with `behavior_logps` also `logp_gap`
      (mean |logps - behavior_logps|), `ratio` (mean) and with `clip` also `clip_fraction`; all in float32
      at least.

    Raises:
      ValueError: an option without the one it needs, `form` with `clip` or `dual_clip`, an unknown
        `aggregation`, or an array (a result of `form` too) of another shape than that above; it names both.
    """
    if aggregation not in ("sequence", "token", "constant"):
        raise ValueError(
            f"aggregation must be 'sequence', 'token' or 'constant', got {aggregation!r}"
        )
    if form is not None and (clip is not None or dual_clip is not None):
        raise ValueError(
            f"form takes the surrogate's place, so clip={clip} and dual_clip={dual_clip} must be None"
        )
    if clip is not None and behavior_logps is None:
        raise ValueError("clip needs behavior_logps: the ratio is exp(logps - behavior_logps)")
    if dual_clip is not None and (clip is None or dual_clip <= 1):
        raise ValueError(f"dual_clip={dual_clip} must be above 1 and needs clip")
    if aggregation == "constant" and normalizer is None:
        raise ValueError("aggregation='constant' needs normalizer, the fixed token budget")

    given = jnp.asarray(logps)
    if given.ndim == 0:
        raise ValueError("logps has shape (), expected (..., T)")
    mask = shaped("mask", jnp.asarray(mask, bool), given.shape, "that of logps")

    def of_tokens(name: str, values: Array) -> Array:
        """Padding may hold anything, infinities too: it is replaced before it meets arithmetic."""
        return jnp.where(mask, shaped(name, wide(values), given.shape, "that of logps"), 0)

    advantage = wide(advantages)
    if advantage.shape == given.shape[:-1]:
        advantage = jnp.broadcast_to(advantage[..., None], given.shape)
    elif advantage.shape != given.shape:
        raise ValueError(
            f"advantages has shape {advantage.shape}, expected {given.shape[:-1]}, one for each row, or "
            f"{given.shape}, one for each token: logps is {given.shape}"
        )
    advantage = of_tokens("advantages", advantage)
    logps = of_tokens("logps", given)
    counts = mask.sum(-1).astype(logps.dtype)  # [...]
    tokens = mask.sum().astype(logps.dtype)
    metrics = {"tokens": tokens}

    behavior = None
    if behavior_logps is not None:
        behavior = of_tokens("behavior_logps", behavior_logps)
        log_ratio = logps - behavior
        metrics["logp_gap"] = _masked_mean(jnp.abs(log_ratio), mask)
        most = _most_log_ratio(given.dtype)
        same_slope = most + (logps - jax.lax.stop_gradient(logps))
        ratio = jnp.exp(jnp.where(log_ratio > most, same_slope, log_ratio))
        metrics["ratio"] = _masked_mean(ratio, mask)
    if form is not None:
        name = f"the result of form={getattr(form, '__name__', form)}"
        losses = wide(form(logps, advantage, mask, behavior_logps=behavior))
        shaped(name, losses, given.shape, "that of logps")
    elif clip is None:
        losses = -advantage * logps
    else:
        low, high = clip if isinstance(clip, tuple | list) else (clip, clip)
        unclipped, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - low, 1 + high)
        losses = jnp.maximum(unclipped, clipped)
        metrics["clip_fraction"] = _masked_mean((clipped > unclipped).astype(losses.dtype), mask)
        if dual_clip is not None:
            bounded = jnp.minimum(losses, -advantage * dual_clip)
            losses = jnp.where(advantage < 0, bounded, losses)

    if token_weights is not None:
        losses = losses * jax.lax.stop_gradient(of_tokens("token_weights", token_weights))
    if penalties is not None:
        losses = losses + of_tokens("penalties", penalties)
    losses = jnp.where(mask, losses, 0)
    if aggregation == "sequence":
        total = (losses.sum(-1) / jnp.maximum(counts, 1)).sum()
        default = jnp.asarray(max(counts.size, 1), logps.dtype)
    else:
        total, default = losses.sum(), jnp.maximum(tokens, 1)
    if normalizer is None:
        return total / default, metrics
    return total / shaped("normalizer", wide(normalizer), (), "a scalar"), metrics


def rrpo_loss(
    logps: Array, advantages: Array, mask: Array, **options: Any
) -> tuple[Array, Metrics]:
    """RRPO (arXiv 2605.25507, Algorithm 2): no ratio, no clip; mean over rows of the row's mean.

    `policy_loss` with `aggregation="sequence"`; `options` are its others.
    """
    return policy_loss(logps, advantages, mask, **{"aggregation": "sequence"} | options)


def srpo_loss(
    logps: Array, advantages: Array, mask: Array, **options: Any
) -> tuple[Array, Metrics]:
    """SRPO has RRPO's loss: the two differ in where the reset goes, not in what is learnt from it.

    `policy_loss` with `aggregation="sequence"`; `options` are its others.
    """
    return policy_loss(logps, advantages, mask, **{"aggregation": "sequence"} | options)


def grpo_loss(
    logps: Array, advantages: Array, mask: Array, **options: Any
) -> tuple[Array, Metrics]:
    """GRPO as the paper's baseline runs it: clipped ratio, dual clip, mean over all tokens.

    `policy_loss` with `clip=0.2, dual_clip=3.0, aggregation="token"`; `options` are its others, of which
    `behavior_logps` is needed.
    """
    preset: dict[str, Any] = {"clip": 0.2, "dual_clip": 3.0, "aggregation": "token"}
    return policy_loss(logps, advantages, mask, **preset | options)


def importance_weights(trainer_logps: Array, behavior_logps: Array, *, cap: float) -> Array:
    """min(pi_trainer / pi_behavior, cap) of each token, `[..., T]`, without a gradient.

    Corrects a gradient for a sampler that computes its log-probabilities otherwise than the trainer, or
    has older weights; truncated as in IMPALA (arXiv 1802.01561). In float32 at least.

    Raises:
      ValueError: the shapes differ.
    """
    trainer, behavior = wide(trainer_logps), wide(behavior_logps)
    shaped("behavior_logps", behavior, trainer.shape, "that of trainer_logps")
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(trainer - behavior), cap))


def kl_penalty(
    logps: Array,
    reference_logps: Array,
    *,
    where: Array | None = None,
    estimator: KLEstimator = "k3",
) -> Array:
    """An estimate of KL(policy || reference) from each token that the policy drew.

    With r = pi_reference / pi_policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r (Schulman,
    "Approximating KL divergence", 2020). They differ in value: k1 and k3 are unbiased, and k3 is never
    negative. The gradient is k2's for each, because for tokens that the policy drew itself only that one
    is, in expectation, the gradient of the divergence.

    Args:
      logps, reference_logps: `[..., T]`.
      where: `[..., T]` bool, False on padding, which may hold anything: value and gradient are 0 there.
        Without it, whatever isn't finite is taken for padding and has no gradient.
      estimator: "k1", "k2" or "k3".

    Returns:
      `[..., T]`, float32 at least; k3 is bounded as ratios are in `policy_loss`.

    Raises:
      ValueError: `estimator` is none of the three, or the shapes differ.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")
    given = jnp.asarray(logps)
    reference = shaped("reference_logps", wide(reference_logps), given.shape, "that of logps")
    log_ratio = jax.lax.stop_gradient(reference) - wide(given)
    if where is None:
        padding = ~jnp.isfinite(log_ratio)
    else:
        padding = ~shaped("where", jnp.asarray(where, bool), given.shape, "that of logps")
        log_ratio = jnp.where(padding, 0, log_ratio)
    k2 = jnp.square(jnp.where(padding, 0, log_ratio)) / 2
    if estimator == "k1":
        value = -log_ratio
    elif estimator == "k2":
        value = jnp.square(log_ratio) / 2
    else:
        value = jnp.expm1(jnp.minimum(log_ratio, _most_log_ratio(given.dtype))) - log_ratio
    return k2 + jax.lax.stop_gradient(value - k2)


def _most_log_ratio(dtype: Any) -> float:
    """Three quarters of the range of `dtype`: it holds such a ratio's gradient, and sums of many."""
    floating = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    return 0.75 * math.log(float(jnp.finfo(floating).max))


def _masked_mean(values: Array, mask: Array) -> Array:
    kept = jnp.where(mask, jax.lax.stop_gradient(values), 0)
    return kept.sum() / jnp.maximum(mask.sum(), 1)
