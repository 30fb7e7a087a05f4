"""Log-probabilities and entropies of tokens, from hidden states and the output projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreset.losses._arrays import Array, shaped

MOST_LOGITS = 2**25  # that a device computes at once


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
        kept = shaped("where", jnp.asarray(where, bool), tokens.shape, "that of tokens")
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
    shaped("tokens", tokens, hidden.shape[:-1], f"hidden is {hidden.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens are {tokens.dtype}, expected integers: ids of the vocabulary")
    shaped("temperature", jnp.asarray(temperature), (), "a scalar")
    if not isinstance(temperature, jax.core.Tracer) and not float(temperature) > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    for name, size in (("chunk", chunk), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {size}")
