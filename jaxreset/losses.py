"""Advantages and policy-gradient losses on plain arrays.

Nothing here knows of models, samplers or configs: arrays in, arrays out, jittable, differentiable
and usable in any trainer. `T` is the number of response tokens of the longest row and `...` is
any batch shape; a row is one sampled continuation (of the prompt, or of a reset's prefix).

References:
  Credit Assignment with Resets in Language Model Reasoning (arXiv 2605.25507): RRPO and SRPO.
  DeepSeekMath (arXiv 2402.03300): GRPO.  Dual-clip PPO (arXiv 1912.09729): `dual_clip`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Metrics = Mapping[str, Array]
Scale = Literal["std", "sample_std", "none"]
Aggregation = Literal["sequence", "token", "constant"]
Clip = float | tuple[float, float]
KLEstimator = Literal["k1", "k2", "k3"]

MOST_LOGITS = 2**25  # that a device computes at once


def group_advantages(rewards: Array, *, where: Array | None = None, scale: Scale = "std") -> Array:
    """Normalises rewards inside each group (the last axis).

    Rewards that are all the same, whatever they are, have no advantage: exactly 0. They are compared before
    anything is rounded, and what differs is computed in float32 at least.

    Args:
      rewards: `[..., K]`, the rewards of the K rollouts of each group; integers and booleans count as
        float32.
      where: `[..., K]` bool, False for entries that are padding: they neither count nor get an
        advantage, and may hold anything. A group may be empty.
      scale: what the centred rewards are divided by. `"std"`: the population standard deviation,
        0 where it is below 1e-8 (RRPO and SRPO, arXiv 2605.25507 appendix C). `"sample_std"`: the
        sample deviation (K - 1) plus 1e-6, the published GRPO baseline. `"none"`: nothing.

    Returns:
      `[..., K]` advantages in the dtype of `rewards`; all NaN in a group where a reward, or the largest
      difference of two, isn't finite.

    Raises:
      ValueError: `scale` is none of the three, or shapes that don't go together.

    >>> group_advantages(jnp.array([1.0, 0.0, 0.0, 1.0]))
    Array([ 1., -1., -1.,  1.], dtype=float32)
    """
    if scale not in ("std", "sample_std", "none"):
        raise ValueError(f"scale must be 'std', 'sample_std' or 'none', got {scale!r}")
    given = jnp.asarray(rewards)
    if given.ndim == 0:
        raise ValueError("rewards has shape (), expected (..., K): the last axis is a group")
    rewards, valid = _wide(given), jnp.ones(given.shape, bool)
    if where is not None:
        where = jnp.asarray(where, bool)
        if jnp.broadcast_shapes(where.shape, given.shape) != given.shape:
            raise ValueError(
                f"where has shape {where.shape}, expected {given.shape}, that of rewards"
            )
        valid = jnp.broadcast_to(where, given.shape)
    count = valid.sum(-1, keepdims=True)
    fixed = jax.lax.stop_gradient(rewards)
    axis: dict[str, Any] = {"axis": -1, "keepdims": True, "where": valid}
    low = jnp.where(count > 0, jnp.min(fixed, initial=jnp.inf, **axis), 0)
    high = jnp.where(count > 0, jnp.max(fixed, initial=-jnp.inf, **axis), 0)
    spread = high - low
    differ = spread > 0
    # From the lowest on, equal rewards are 0 and near ones keep their digits; squares can't overflow.
    unit = jnp.where(differ, spread, 1) if scale != "none" else 1
    placed = (jnp.where(valid, rewards, low) - low) / unit
    mean = placed.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    advantages = jnp.where(valid, placed - mean, 0)
    if scale != "none":
        freedom = count if scale == "std" else count - 1
        variance = jnp.square(advantages).sum(-1, keepdims=True) / jnp.maximum(freedom, 1)
        std = jnp.sqrt(jnp.where(differ, variance, 1))  # a root has no slope at 0
        if scale == "std":
            differ &= unit * std >= 1e-8
        else:
            std += 1e-6 / unit
        advantages = jnp.where(differ, advantages / std, 0)
    spoilt = valid & ~jnp.isfinite(spread)
    dtype = given.dtype if jnp.issubdtype(given.dtype, jnp.floating) else rewards.dtype
    return jnp.where(spoilt, jnp.nan, advantages).astype(dtype)


def chunk_size(vocab: int, *, shards: int = 1) -> int:
    """Tokens whose logits fit on `shards` devices: 2 ** 25 logits on each, or those of 1024 tokens.

    >>> chunk_size(512), chunk_size(152_064), chunk_size(152_064, shards=32)
    (1024, 220, 7040)
    """
    return max(min(MOST_LOGITS // vocab, 1024), 1) * shards


def token_logps(
    hidden: Array,
    head: Array,
    tokens: Array,
    *,
    where: Array | None = None,
    temperature: Array | float = 1.0,
    chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> Array:
    """Log-probabilities of `tokens`, without ever holding `[..., vocabulary]` logits for all of them.

    Tokens are taken `chunk` at a time, evenly from the entries of the first axis, which may be spread over
    devices; the backward pass recomputes each chunk's logits.

    Args:
      hidden: `[..., E]` final hidden states; the one at a position predicts that position's token.
      head: `[E, V]` output projection.
      tokens: `[...]` int, the tokens to score.
      where: `[...]` bool, False where `hidden` and `tokens` are padding, which may hold anything: result
        and gradient are 0 there.
      temperature: logits are divided by it; scalar above 0, may be traced.
      chunk: tokens whose logits exist at one time, at least one of each entry; None: `chunk_size` of one
        device.
      vocab_chunk: columns of `head` whose logits exist at one time; None: all. Leave it at that where
        they are spread over devices.

    Returns:
      `[...]` float32 (float64 for float64 inputs) log-probabilities, log-softmax(logits / T); NaN for a
      token outside the vocabulary.

    Raises:
      ValueError: shapes that don't go together, tokens that aren't integers, or a size or temperature of 0
        or less.
    """
    options = where, temperature, chunk, vocab_chunk
    return _score_tokens(hidden, head, tokens, *options, entropy=False)[0]


def token_logps_and_entropy(
    hidden: Array,
    head: Array,
    tokens: Array,
    *,
    where: Array | None = None,
    temperature: Array | float = 1.0,
    chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Array, Array]:
    """`token_logps`, and the entropy of the distribution behind each token, in nats: `[...]`."""
    options = where, temperature, chunk, vocab_chunk
    logps, entropy = _score_tokens(hidden, head, tokens, *options, entropy=True)
    return logps, entropy


def _score_tokens(
    hidden: Array,
    head: Array,
    tokens: Array,
    where: Array | None,
    temperature: Array | float,
    chunk: int | None,
    vocab_chunk: int | None,
    *,
    entropy: bool,
) -> tuple[Array, ...]:
    """Log-probabilities, and entropies if asked for."""
    hidden, head, tokens = map(jnp.asarray, (hidden, head, tokens))
    _check_scoring(hidden, head, tokens, temperature, chunk, vocab_chunk)
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    if tokens.size == 0:
        return (jnp.zeros(tokens.shape, accumulate),) * (2 if entropy else 1)
    kept = None
    if where is not None:
        kept = _shaped("where", jnp.asarray(where, bool), tokens.shape, "that of tokens")
        hidden, tokens = jnp.where(kept[..., None], hidden, 0), jnp.where(kept, tokens, 0)
    shape, width = tokens.shape, hidden.shape[-1]
    rows, vocab = shape[0] if len(shape) > 1 else 1, head.shape[-1]
    count = tokens.size // rows  # of each row
    chunk = max(min((chunk or chunk_size(vocab)) // rows, count), 1)
    blocks = range(0, vocab, vocab_chunk or vocab)
    padding = (0, 0), (0, -count % chunk)
    row_hidden = jnp.pad(hidden.reshape(rows, count, width), (*padding, (0, 0)))
    row_tokens = jnp.pad(tokens.reshape(rows, count), padding)

    @jax.checkpoint
    def score_block(hidden: Array, head: Array, tokens: Array) -> tuple[Array, ...]:
        """Of some columns: the token's logit (0: it is another's), log-sum-exp, and mean logit if asked."""
        logits = jnp.dot(hidden, head, preferred_element_type=accumulate) / temperature
        inside = (tokens >= 0) & (tokens < head.shape[-1])
        column = jnp.where(inside, tokens, 0)
        chosen = jnp.take_along_axis(logits, column[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        scores = jnp.where(inside, chosen, 0), total
        if not entropy:
            return scores
        return *scores, (jnp.exp(logits - total[..., None]) * logits).sum(axis=-1)

    def score(hidden: Array, tokens: Array) -> tuple[Array, ...]:
        parts = [
            score_block(hidden, head[:, first : first + blocks.step], tokens - first)
            for first in blocks
        ]
        chosen, totals, *means = (jnp.stack(part) for part in zip(*parts, strict=True))
        total = jax.nn.logsumexp(totals, axis=0)
        logps = chosen.sum(axis=0) - total
        return logps, *(total - (jnp.exp(totals - total) * mean).sum(axis=0) for mean in means)

    if row_tokens.shape[1] == chunk:
        scored = score(row_hidden, row_tokens)
    else:
        chunks = (
            jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)
            for x in (row_hidden, row_tokens)
        )
        parts = jax.lax.map(lambda c: score(*c), tuple(chunks))  # each [chunks, rows, chunk]
        scored = tuple(jnp.moveaxis(x, 0, 1).reshape(rows, -1) for x in parts)
    logps, *entropies = (x[:, :count].reshape(shape) for x in scored)
    logps = jnp.where((tokens >= 0) & (tokens < vocab), logps, jnp.nan)
    if kept is None:
        return logps, *entropies
    return tuple(jnp.where(kept, x, 0) for x in (logps, *entropies))


def _check_scoring(
    hidden: Array,
    head: Array,
    tokens: Array,
    temperature: Array | float,
    chunk: int | None,
    vocab_chunk: int | None,
) -> None:
    if head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"head has shape {head.shape}, expected (E, V) for hidden {hidden.shape}: (..., E)"
        )
    _shaped("tokens", tokens, hidden.shape[:-1], f"hidden is {hidden.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens are {tokens.dtype}, expected integers: ids of the vocabulary")
    _shaped("temperature", jnp.asarray(temperature), (), "a scalar")
    if not isinstance(temperature, jax.core.Tracer) and not float(temperature) > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    for name, size in (("chunk", chunk), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {size}")


def policy_loss(
    logps: Array,
    advantages: Array,
    mask: Array,
    *,
    behavior_logps: Array | None = None,
    clip: Clip | None = None,
    dual_clip: float | None = None,
    token_weights: Array | None = None,
    penalties: Array | None = None,
    aggregation: Aggregation = "sequence",
    normalizer: Array | float | None = None,
) -> tuple[Array, Metrics]:
    """The policy-gradient loss of which GRPO, RRPO and SRPO are presets.

    Without `clip` a token's loss is `-advantage * logp`. With it, it is PPO's clipped surrogate
    `-min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)`, and with `dual_clip` the
    loss of a negative advantage is at most `dual_clip * |advantage|`. A ratio beyond what the dtype of
    `logps` holds counts as one that leaves room for sums, and keeps its slope.

    Nothing broadcasts, and all is counted and summed in float32 at least.

    Args:
      logps: `[..., T]` log-probabilities under the policy being trained.
      advantages: `[...]` one for each row.
      mask: `[..., T]` True on the tokens that carry the loss: the suffix, not the shared prefix. Elsewhere
        the other arrays may hold anything.
      behavior_logps: `[..., T]` log-probabilities when sampled, or what else the ratio is taken to (the
        trainer's before its first update); needed with `clip`.
      clip: None, one width for both sides, or `(low, high)`.
      dual_clip: None, or a bound above 1; needs `clip`.
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
      ValueError: an option without the one it needs, an unknown `aggregation`, or an array of another shape
        than that above; it names both.
    """
    if aggregation not in ("sequence", "token", "constant"):
        raise ValueError(
            f"aggregation must be 'sequence', 'token' or 'constant', got {aggregation!r}"
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
    mask = _shaped("mask", jnp.asarray(mask, bool), given.shape, "that of logps")

    def of_tokens(name: str, values: Array) -> Array:
        """Padding may hold anything, infinities too: it is replaced before it meets arithmetic."""
        return jnp.where(mask, _shaped(name, _wide(values), given.shape, "that of logps"), 0)

    rows = _shaped("advantages", _wide(advantages), given.shape[:-1], f"logps is {given.shape}")
    advantage = jnp.where(mask.any(-1), rows, 0)[..., None]
    logps = of_tokens("logps", given)
    counts = mask.sum(-1).astype(logps.dtype)  # [...]
    tokens = mask.sum().astype(logps.dtype)
    metrics = {"tokens": tokens}

    if behavior_logps is not None:
        log_ratio = logps - of_tokens("behavior_logps", behavior_logps)
        metrics["logp_gap"] = _masked_mean(jnp.abs(log_ratio), mask)
        most = _most_log_ratio(given.dtype)
        same_slope = most + (logps - jax.lax.stop_gradient(logps))
        ratio = jnp.exp(jnp.where(log_ratio > most, same_slope, log_ratio))
        metrics["ratio"] = _masked_mean(ratio, mask)
    if clip is None:
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
    return total / _shaped("normalizer", _wide(normalizer), (), "a scalar"), metrics


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
    trainer, behavior = _wide(trainer_logps), _wide(behavior_logps)
    _shaped("behavior_logps", behavior, trainer.shape, "that of trainer_logps")
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
    reference = _shaped("reference_logps", _wide(reference_logps), given.shape, "that of logps")
    log_ratio = jax.lax.stop_gradient(reference) - _wide(given)
    if where is None:
        padding = ~jnp.isfinite(log_ratio)
    else:
        padding = ~_shaped("where", jnp.asarray(where, bool), given.shape, "that of logps")
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


def _wide(values: Any) -> Array:
    """As an array of float32 at least."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _shaped(name: str, values: Array, shape: tuple[int, ...], reason: str) -> Array:
    """`values`, if they have that shape: what broadcasts is counted wrongly without a word."""
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, expected {shape}: {reason}")
    return values
