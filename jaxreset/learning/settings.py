"""How a learner steps: plain settings, which load nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Schedule = Literal["constant", "linear", "cosine"]


class AdamW(NamedTuple):
    """Settings of the optimizer; hashable.

    Attributes:
      learning_rate: its peak.
      schedule: the shape of its decay.
      warmup_steps: updates in which it rises.
      weight_decay, b1, b2: of AdamW.
      max_grad_norm: that a gradient is clipped to.
      steps: optimizer steps of the whole training, where a decaying schedule ends.
    """

    learning_rate: float = 3e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    steps: int = 1


@dataclass(frozen=True)
class LearnerSettings:
    """How a learner steps.

    Attributes:
      optimizer: its settings.
      temperature: that rollouts are sampled at.
      max_response: most tokens of a response, which `aggregation="constant"` counts for each.
      minibatch_prompts: prompts in one minibatch.
      epochs: passes over a step's minibatches.
      passes: over minibatches in a step of the training, all epochs together.
      min_signal_groups: groups with a gradient before the optimizer steps; 0: it always does.
      remat: recompute activations in the backward pass.
      max_nonfinite: bad gradients in a row that end the run.
      seed: of the run.
    """

    optimizer: AdamW
    temperature: float
    max_response: int
    minibatch_prompts: int
    epochs: int = 1
    passes: int = 1
    min_signal_groups: int = 0
    remat: bool = False
    max_nonfinite: int = 5
    seed: int = 0
