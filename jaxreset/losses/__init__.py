"""Advantages and policy-gradient losses on plain arrays.

Nothing here knows of models, samplers or configs: arrays in, arrays out, jittable, differentiable
and usable in any trainer. `T` is the number of response tokens of the longest row and `...` is
any batch shape; a row is one sampled continuation (of the prompt, or of a reset's prefix).

References:
  Credit Assignment with Resets in Language Model Reasoning (arXiv 2605.25507): RRPO and SRPO.
  DeepSeekMath (arXiv 2402.03300): GRPO.  Dual-clip PPO (arXiv 1912.09729): `dual_clip`.
  MaxRL (arXiv 2602.02710) and RLOO (arXiv 2402.14740): advantages.  VinePPO (arXiv 2410.01679): of tokens.
"""

from __future__ import annotations

from jaxreset.losses.advantages import Scale, group_advantages
from jaxreset.losses.logps import chunk_size, token_logps, token_logps_and_entropy
from jaxreset.losses.policy import (
    Aggregation,
    Clip,
    KLEstimator,
    Metrics,
    TokenLoss,
    grpo_loss,
    importance_weights,
    kl_penalty,
    policy_loss,
    rrpo_loss,
    srpo_loss,
)

__all__ = [
    "Aggregation",
    "Clip",
    "KLEstimator",
    "Metrics",
    "Scale",
    "TokenLoss",
    "chunk_size",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "kl_penalty",
    "policy_loss",
    "rrpo_loss",
    "srpo_loss",
    "token_logps",
    "token_logps_and_entropy",
]
