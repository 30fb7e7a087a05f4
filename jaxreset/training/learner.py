"""Turns a step's groups into optimizer steps: packing, accumulation, the wait for signal."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import optax

from jaxreset.config import Config
from jaxreset.errors import RunError
from jaxreset.groups import Group, GroupBatch, PackShape, empty_batch, pack
from jaxreset.models.policy import Policy
from jaxreset.training.checkpoints import Progress
from jaxreset.training.update import (
    LossForm,
    TrainState,
    accumulate,
    apply,
    init_state,
    layout_of,
    logp_gap,
)


class Learner:
    """Holds the train state and applies the objective's gradient to it.

    Args:
      config: resolved.
      policy: its parameters are taken over, and overwritten by updates.
      optimizer: see `update.make_optimizer`.
      form: the loss.
      shapes: of microbatches.
      sharding: of microbatches over the mesh, None for one device.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        optimizer: optax.GradientTransformation,
        form: LossForm,
        shapes: Sequence[PackShape],
        sharding: jax.sharding.Sharding | None = None,
    ):
        self.config, self.optimizer, self.form = config, optimizer, form
        self.shapes, self.sharding = shapes, sharding
        self.temperature = np.float32(config.sampling.temperature)
        self.state: TrainState = init_state(policy.params, optimizer)
        self._layout = layout_of(self.state)
        self._gradient_layout = layout_of(self.state.gradients)
        self.progress = Progress(seed=config.seed)
        self._policy = policy

    @property
    def policy(self) -> Policy:
        """The policy with the current parameters, valid until the next update."""
        return self._policy.with_params(self.state.params, self.progress.version)

    def compile(self) -> None:
        """Compiles the update in all its shapes, without running it."""
        static = {"graph": self._policy.graph, "remat": self.config.train.remat}
        for shape in self.shapes:
            batch = self._put(empty_batch(shape))
            params, gradients = self.state.params, self.state.gradients
            logp_gap.lower(params, batch, self.temperature, **static).compile()
            accumulate.lower(
                gradients,
                params,
                batch,
                self.temperature,
                form=self.form,
                layout=self._gradient_layout,
                **static,
            ).compile()
        apply.lower(
            self.state, np.float32(1), optimizer=self.optimizer, layout=self._layout
        ).compile()

    def learn(self, groups: Sequence[Group], prompts: int) -> dict[str, float]:
        """One training step: an optimizer step for each minibatch, unless it waits for signal.

        Args:
          groups: of the step, with advantages.
          prompts: in the batch; minibatches are consecutive runs of them.

        Returns:
          Metrics `loss`, `grad_norm`, `logp_gap`, `groups/*`, `optimizer_steps`.
        """
        metrics = {"logp_gap": self._logp_gap(groups)}
        size = self.config.minibatch_prompts
        loss_sum = normalizer = steps = skipped = 0.0
        norms = []
        for first in range(0, prompts, size):
            minibatch = [g for g in groups if first <= g.prompt < first + size]
            loss_sum += self._accumulate(minibatch)
            normalizer += self._normalizer(minibatch)
            least = self.config.train.min_signal_groups or 0
            if self.progress.signal_groups < least or self.progress.normalizer == 0:
                continue
            norms.append(self._apply())
            steps += bool(np.isfinite(norms[-1]))
            skipped += not np.isfinite(norms[-1])
        signal = sum(g.has_signal for g in groups)
        return metrics | {
            "loss": loss_sum / max(normalizer, 1.0),
            "grad_norm": float(np.mean(norms)) if norms else 0.0,
            "optimizer_steps": steps,
            "skipped_updates": skipped,
            "groups/drawn": float(len(groups)),
            "groups/with_signal": float(signal),
            "groups/signal_share": signal / max(len(groups), 1),
        }

    def _accumulate(self, groups: Sequence[Group]) -> float:
        """Adds the gradient of groups that have one; the others only count in the denominator."""
        live = [g for g in groups if g.has_signal]
        total, gradients = 0.0, self.state.gradients
        for batch in pack(live, self.shapes):
            gradients, loss = accumulate(
                gradients,
                self.state.params,
                self._put(batch),
                self.temperature,
                graph=self._policy.graph,
                form=self.form,
                remat=self.config.train.remat,
                layout=self._gradient_layout,
            )
            total += float(loss)
        self.state = self.state._replace(gradients=gradients)
        self.progress = self.progress._replace(
            signal_groups=self.progress.signal_groups + len(live),
            normalizer=self.progress.normalizer + self._normalizer(groups),
        )
        return total

    def _normalizer(self, groups: Sequence[Group]) -> float:
        """What the loss of these groups is divided by."""
        rows = sum(len(g.suffixes) for g in groups)
        if self.form.aggregation == "sequence":
            return float(rows)
        if self.form.aggregation == "token":
            return float(sum(g.tokens for g in groups))
        return float(rows * self.config.sampling.max_response_tokens)

    def _apply(self) -> float:
        """One optimizer step, skipped where the gradient isn't finite; returns its norm."""
        normalizer = np.float32(self.progress.normalizer)
        self.state, norm = apply(
            self.state, normalizer, optimizer=self.optimizer, layout=self._layout
        )
        finite = bool(np.isfinite(norm))
        bad = 0 if finite else self.progress.nonfinite + 1
        self.progress = self.progress._replace(
            version=self.progress.version + finite, nonfinite=bad, signal_groups=0, normalizer=0.0
        )
        if bad >= self.config.train.max_nonfinite:
            raise RunError(
                f"{bad} gradients in a row weren't finite; the parameters are the last good ones. "
                "Lower optimizer.learning_rate, or look at the rewards in rollouts/"
            )
        return float(norm)

    def _logp_gap(self, groups: Sequence[Group]) -> float:
        """Mean |trainer's - sampler's log-probability| over the first microbatch of each shape."""
        total = tokens = 0.0
        seen = set()
        for batch in pack(groups, self.shapes):
            if batch.prefix.shape in seen:
                continue
            seen.add(batch.prefix.shape)
            gap, count = logp_gap(
                self.state.params,
                self._put(batch),
                self.temperature,
                graph=self._policy.graph,
                remat=self.config.train.remat,
            )
            total, tokens = total + float(gap), tokens + float(count)
        return total / max(tokens, 1.0)

    def _put(self, batch: GroupBatch) -> GroupBatch:
        return jax.device_put(batch, self.sharding)
