"""Advantages and policy-gradient losses on plain arrays.

Nothing here knows of models, samplers or configs: arrays in, arrays out, jittable, differentiable
and usable in any trainer. `T` is the number of response tokens of the longest row and `...` is
any batch shape; a row is one sampled continuation (of the prompt, or of a reset's prefix).

References:
  Credit Assignment with Resets in Language Model Reasoning (arXiv 2605.25507): RRPO and SRPO.
  DeepSeekMath (arXiv 2402.03300): GRPO.  Dual-clip PPO (arXiv 1912.09729): `dual_clip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

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

    Args:
      rewards: `[..., K]` float, the rewards of the K rollouts of each group.
      where: `[..., K]` bool, False for entries that are padding: they neither count nor get an
        advantage. A group may be empty.
      scale: what the centred rewards are divided by. `"std"`: the population standard deviation,
        0 where it is below 1e-8 (RRPO and SRPO, arXiv 2605.25507 appendix C). `"sample_std"`: the
        sample deviation (K - 1) plus 1e-6, the published GRPO baseline. `"none"`: nothing.

    Returns:
      `[..., K]` advantages in the dtype of `rewards`.

    Raises:
      ValueError: `scale` is none of the three.

    >>> group_advantages(jnp.array([1.0, 0.0, 0.0, 1.0]))
    Array([ 1., -1., -1.,  1.], dtype=float32)
    """
    if scale not in ("std", "sample_std", "none"):
        raise ValueError(f"scale must be 'std', 'sample_std' or 'none', got {scale!r}")
    rewards = jnp.asarray(rewards)
    valid = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where, bool)
    count = valid.sum(-1, keepdims=True)
    mean = jnp.where(valid, rewards, 0).sum(-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid, rewards - mean, 0)
    if scale == "none":
        return centred
    squares = jnp.square(centred).sum(-1, keepdims=True)
    if scale == "sample_std":
        return centred / (jnp.sqrt(squares / jnp.maximum(count - 1, 1)) + 1e-6)
    std = jnp.sqrt(squares / jnp.maximum(count, 1))
    return jnp.where(std < 1e-8, 0, centred / jnp.where(std < 1e-8, 1, std))


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
      temperature: logits are divided by it; scalar, may be traced.
      chunk: tokens whose logits exist at one time, at least one of each entry; None: `chunk_size` of one
        device.
      vocab_chunk: columns of `head` whose logits exist at one time; None: all. Leave it at that where
        they are spread over devices.

    Returns:
      `[...]` float32 (float64 for float64 inputs) log-probabilities, log-softmax(logits / T).
    """
    return _score_tokens(hidden, head, tokens, temperature, chunk, vocab_chunk, entropy=False)[0]


def token_logps_and_entropy(
    hidden: Array,
    head: Array,
    tokens: Array,
    *,
    temperature: Array | float = 1.0,
    chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Array, Array]:
    """`token_logps`, and the entropy of the distribution behind each token, in nats: `[...]`."""
    logps, entropy = _score_tokens(
        hidden, head, tokens, temperature, chunk, vocab_chunk, entropy=True
    )
    return logps, entropy


def _score_tokens(
    hidden: Array,
    head: Array,
    tokens: Array,
    temperature: Array | float,
    chunk: int | None,
    vocab_chunk: int | None,
    *,
    entropy: bool,
) -> tuple[Array, ...]:
    """Log-probabilities, and entropies if asked for."""
    shape, width = tokens.shape, hidden.shape[-1]
    rows, vocab = shape[0] if len(shape) > 1 else 1, head.shape[-1]
    count = tokens.size // max(rows, 1)  # of each row
    chunk = max(min((chunk or chunk_size(vocab)) // max(rows, 1), count), 1)
    blocks = range(0, vocab, vocab_chunk or vocab)
    padding = (0, 0), (0, -count % chunk)
    row_hidden = jnp.pad(hidden.reshape(rows, count, width), (*padding, (0, 0)))
    row_tokens = jnp.pad(tokens.reshape(rows, count), padding)
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)

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
    return tuple(x[:, :count].reshape(shape) for x in scored)


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
    loss of a negative advantage is at most `dual_clip * |advantage|`.

    Args:
      logps: `[..., T]` log-probabilities under the policy being trained.
      advantages: `[...]` one for each row.
      mask: `[..., T]` True on the tokens that carry the loss: the suffix, not the shared prefix.
      behavior_logps: `[..., T]` log-probabilities when sampled, or what else the ratio is taken to (the
        trainer's before its first update); needed with `clip`.
      clip: None, one width for both sides, or `(low, high)`.
      dual_clip: None, or a bound above 1; needs `clip`.
      token_weights: `[..., T]` that each token's loss is multiplied by, such as `importance_weights`; they
        get no gradient.
      penalties: `[..., T]` that are added to each token's loss, such as `kl_penalty` times a coefficient,
        or an entropy times a negative one.
      aggregation: `"sequence"`: mean over a row's tokens, then over rows. `"token"`: mean over all
        tokens. `"constant"`: sum over all tokens, divided by `normalizer`, a fixed budget.
      normalizer: what the sum is divided by; None counts it here (rows for `"sequence"`, tokens for
        `"token"`). Give the count of the whole minibatch, and the losses of its microbatches sum to
        the minibatch's. Rows without tokens count as rows.

    Returns:
      `(loss, metrics)`: a scalar, and scalars `tokens`, and with `behavior_logps` also `logp_gap`
      (mean |logps - behavior_logps|), `ratio` (mean) and with `clip` also `clip_fraction`.

    Raises:
      ValueError: an option without the one it needs, or an unknown `aggregation`.
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

    mask = jnp.asarray(mask, bool)
    # Padding may hold anything, infinities too: it is replaced before it meets arithmetic.
    logps = jnp.where(mask, logps, 0)
    counts = mask.sum(-1).astype(logps.dtype)  # [...]
    tokens = counts.sum()
    metrics = {"tokens": tokens}
    advantage = advantages[..., None]

    if behavior_logps is not None:
        log_ratio = logps - jnp.where(mask, behavior_logps, 0)
        ratio = jnp.exp(log_ratio)
        metrics["logp_gap"] = _masked_mean(jnp.abs(log_ratio), mask)
        metrics["ratio"] = _masked_mean(ratio, mask)
    if clip is None:
        losses = -advantage * logps
    else:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        unclipped, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - low, 1 + high)
        losses = jnp.maximum(unclipped, clipped)
        metrics["clip_fraction"] = _masked_mean((clipped > unclipped).astype(losses.dtype), mask)
        if dual_clip is not None:
            bounded = jnp.minimum(losses, -advantage * dual_clip)
            losses = jnp.where(advantage < 0, bounded, losses)

    if token_weights is not None:
        losses = losses * jax.lax.stop_gradient(jnp.where(mask, token_weights, 0))
    if penalties is not None:
        losses = losses + jnp.where(mask, penalties, 0)
    losses = jnp.where(mask, losses, 0)
    if aggregation == "sequence":
        total = (losses.sum(-1) / jnp.maximum(counts, 1)).sum()
        default = jnp.asarray(max(counts.size, 1), logps.dtype)
    else:
        total, default = losses.sum(), jnp.maximum(tokens, 1)
    return total / (default if normalizer is None else normalizer), metrics


def importance_weights(trainer_logps: Array, behavior_logps: Array, *, cap: float) -> Array:
    """min(pi_trainer / pi_behavior, cap) of each token, `[..., T]`, without a gradient.

    Corrects a gradient for a sampler that computes its log-probabilities otherwise than the trainer, or
    has older weights; truncated as in IMPALA (arXiv 1802.01561).
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(trainer_logps - behavior_logps), cap))


def kl_penalty(logps: Array, reference_logps: Array, *, estimator: KLEstimator = "k3") -> Array:
    """An estimate of KL(policy || reference) from each token that the policy drew.

    With r = pi_reference / pi_policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r (Schulman,
    "Approximating KL divergence", 2020). They differ in value: k1 and k3 are unbiased, and k3 is never
    negative. The gradient is k2's for each, because for tokens that the policy drew itself only that one
    is, in expectation, the gradient of the divergence.

    Args:
      logps, reference_logps: `[..., T]`.
      estimator: "k1", "k2" or "k3".

    Returns:
      `[..., T]`.

    Raises:
      ValueError: `estimator` is none of the three.
    """
    log_ratio = jax.lax.stop_gradient(reference_logps) - logps
    k2 = jnp.square(log_ratio) / 2
    if estimator == "k1":
        value = -log_ratio
    elif estimator == "k2":
        value = k2
    elif estimator == "k3":
        value = jnp.expm1(log_ratio) - log_ratio
    else:
        raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")
    return k2 + jax.lax.stop_gradient(value - k2)


def _masked_mean(values: Array, mask: Array) -> Array:
    kept = jnp.where(mask, jax.lax.stop_gradient(values), 0)
    return kept.sum() / jnp.maximum(mask.sum(), 1)


rrpo_loss = partial(policy_loss, aggregation="sequence")
"""RRPO (arXiv 2605.25507, Algorithm 2): no ratio, no clip; mean over rows of the row's mean."""

srpo_loss = partial(policy_loss, aggregation="sequence")
"""SRPO has RRPO's loss: the two differ in where the reset goes, not in what is learnt from it."""

grpo_loss = partial(policy_loss, clip=0.2, dual_clip=3.0, aggregation="token")
"""GRPO as the paper's baseline runs it: clipped ratio, dual clip, mean over all tokens."""
