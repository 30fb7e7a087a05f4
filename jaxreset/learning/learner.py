"""Turns a step's groups into optimizer steps: packing, accumulation, the wait for signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxreset.errors import RunError
from jaxreset.groups import Group
from jaxreset.learning.form import LossForm
from jaxreset.learning.microbatches import GroupBatch, PackShape, empty_batch, pack
from jaxreset.learning.optimizer import learning_rate, make_optimizer
from jaxreset.learning.settings import LearnerSettings
from jaxreset.learning.update import (
    TrainState,
    accumulate,
    apply,
    committed,
    filled,
    init_state,
    layout_of,
    measure,
    score,
    start_anew,
)
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.parallel import put, rows_sharding
from jaxreset.parallel.compiling import Compile, SideBySide


class TrainProgress(NamedTuple):
    """What a run remembers beside its arrays.

    Attributes:
      step: training steps done.
      version: optimizer steps done.
      seed: every random number is named by it, the step and what it is for.
      data_position: prompts taken from the stream.
      signal_groups: groups with a gradient since the last optimizer step.
      normalizer: rollouts or tokens behind the gradients summed since then.
      nonfinite: gradients in a row that weren't finite.
    """

    step: int = 0
    version: int = 0
    seed: int = 0
    data_position: int = 0
    signal_groups: int = 0
    normalizer: float = 0.0
    nonfinite: int = 0


class Minibatch(NamedTuple):
    """Groups that run, their microbatches, and what the loss of the whole minibatch is divided by."""

    groups: list[Group]
    batches: list[GroupBatch]
    normalizer: float

    @property
    def signal(self) -> int:
        """How many of its groups the wait for signal counts."""
        return sum(g.has_signal for g in self.groups)


class Turn(NamedTuple):
    """A pass over a minibatch: its place among the step's, the minibatch, whether an update follows."""

    pass_: int
    minibatch: Minibatch
    steps: bool


def turns(
    minibatches: Sequence[Minibatch], *, epochs: int, least: int, signal: int, normalizer: float
) -> list[Turn]:
    """Which minibatches a step adds to the gradients, in turn, and when the optimizer steps.

    What waits in the sum for an update is there with the current weights already, and isn't added again: a
    group counts once. What a later pass would add and no update of this step takes up is left out, as its
    groups have been learnt from; groups that never were stay in the sum until the gate opens.

    Args:
      minibatches: of the step.
      epochs: passes over them.
      least: groups with signal that open the gate.
      signal, normalizer: what waits in the sum from steps before.
    """
    found, waiting = list[Turn](), set[int]()
    for pass_ in range(epochs * len(minibatches)):
        number = pass_ % len(minibatches)
        if number in waiting:
            continue
        waiting.add(number)
        minibatch = minibatches[number]
        signal += minibatch.signal
        normalizer += minibatch.normalizer
        opens = signal >= least and normalizer > 0
        found.append(Turn(pass_, minibatch, opens))
        if opens:
            signal, normalizer = 0, 0.0
            waiting.clear()
    last = max((n for n, turn in enumerate(found) if turn.steps), default=-1)
    return [t for n, t in enumerate(found) if n <= last or t.pass_ < len(minibatches)]


class Learner:
    """Holds the train state and applies the objective's gradient to it.

    Args:
      settings: how it steps.
      policy: its parameters are taken over, and those that are trained overwritten by updates.
      form: the loss.
      shapes: of microbatches, see `microbatches.pack_shapes`.
      mesh: of devices that microbatches are split over, None for one.
      on_nonfinite: told of the step and the groups whose gradient, or reward, was not finite.
      reference: trained parameters that `form.kl` keeps the policy near to; only read.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        policy: Policy,
        form: LossForm,
        shapes: Sequence[PackShape],
        mesh: jax.sharding.Mesh | None = None,
        on_nonfinite: Callable[[int, list[Group]], None] = lambda step, groups: None,
        reference: nnx.State | None = None,
    ):
        self.settings, self.form = settings, form
        self.optimizer = make_optimizer(settings.optimizer)
        self.shapes, self._rows = shapes, None if mesh is None else rows_sharding(mesh)
        self.temperature = np.float32(settings.temperature)
        self._static: dict[str, Any] = {
            "graph": policy.graph,
            "remat": settings.remat,
            "mesh": mesh,
        }
        params, frozen = trained(policy.params)
        self._frozen = committed(frozen)
        self.state: TrainState = init_state(params, self.optimizer)
        self._layout = layout_of(self.state)
        self._gradient_layout = layout_of(self.state.gradients)
        self.progress = TrainProgress(seed=settings.seed)
        self._policy = policy.without_params()  # those that were cast are read no more
        self._on_nonfinite = on_nonfinite
        self._reference = None if reference is None else committed(reference)
        self._pending: list[Group] = []  # behind the gradients summed so far

    @property
    def policy(self) -> Policy:
        """The policy with the current parameters, valid until the next update."""
        params = nnx.merge_state(self.state.params, self._frozen)
        return self._policy.with_params(params, self.progress.version)

    def compile(self, compiled: Compile | None = None) -> None:
        """Compiles the update in all its shapes, without running it; see `Sampler.compile`."""
        if compiled is None:
            with SideBySide() as compiled:
                return self.compile(compiled)
        self.state = filled(self.state)
        params, gradients = self.state.params, self.state.gradients
        for shape in self.shapes:
            plain = self._put(empty_batch(shape))
            batch = self._completed(plain)
            compiled(
                accumulate,
                gradients,
                params,
                self._frozen,
                batch,
                self.temperature,
                form=self.form,
                layout=self._gradient_layout,
                **self._static,
            )
        smallest = self._frozen, plain, self.temperature
        compiled(measure, params, *smallest, **self._static)
        static = {"optimizer": self.optimizer, "layout": self._layout}
        compiled(apply, self.state, np.float32(1), np.int32(0), **static)
        compiled(learning_rate, np.int32(0), np.int32(0), settings=self.settings.optimizer)
        self._rest()

    def learn(self, groups: Sequence[Group], prompts: int) -> dict[str, float]:
        """One training step: an optimizer step for each minibatch, unless it waits for signal; see `turns`.

        Args:
          groups: of the step, with advantages.
          prompts: in the batch; minibatches are consecutive runs of them.

        Returns:
          Metrics `loss`, `grad_norm`, `logp_gap`, `policy/entropy`, `groups/*`, `update/*`,
          `optimizer_steps`, `learning_rate` (of the last update, or of one that would come now).
        """
        self.state = filled(self.state)
        metrics = self._measure(groups)
        size = self.settings.minibatch_prompts
        minibatches = [
            self._prepare([g for g in groups if first <= g.prompt < first + size])
            for first in range(0, prompts, size)
        ]
        normalizer = steps = skipped = 0.0
        loss, norms = 0.0, []
        first = self.progress.step * self.settings.passes
        place = self.progress.version, first + len(minibatches) - 1
        for turn in turns(
            minibatches,
            epochs=self.settings.epochs,
            least=self.settings.min_signal_groups,
            signal=self.progress.signal_groups,
            normalizer=self.progress.normalizer,
        ):
            loss += self._accumulate(turn.minibatch)
            normalizer += turn.minibatch.normalizer
            if not turn.steps:
                continue
            place = self.progress.version, first + turn.pass_
            norms.append(self._apply(place[1]))
            steps += bool(np.isfinite(norms[-1]))
            skipped += not np.isfinite(norms[-1])
        self._rest()
        signal = sum(g.has_signal for g in groups)
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        tokens, slots = sum(b.tokens for b in batches), sum(b.slots for b in batches)
        saved = sum(len(g.prefix) + g.tokens for g in groups if not self._runs(g))
        return metrics | {
            "loss": loss / max(normalizer, 1.0),
            "grad_norm": float(np.mean(norms)) if norms else 0.0,
            "learning_rate": float(
                learning_rate(*map(np.int32, place), settings=self.settings.optimizer)
            ),
            "optimizer_steps": steps,
            "skipped_updates": skipped,
            "groups/drawn": float(len(groups)),
            "groups/with_signal": float(signal),
            "groups/signal_share": signal / max(len(groups), 1),
            "update/tokens": float(tokens),
            "update/tokens_saved": float(saved),
            "update/padding_share": 1 - tokens / slots if slots else 0.0,
        }

    def _rest(self) -> None:
        """Lets go of gradients that are zeros until the next step has some."""
        if self.progress.normalizer == 0:
            self.state = self.state._replace(gradients=None)

    def _prepare(self, groups: Sequence[Group]) -> Minibatch:
        """The groups that have a gradient, packed; the others only count in the denominator."""
        runs = [g for g in groups if self._runs(g)]
        batches = [self._completed(batch) for batch in pack(runs, self.shapes)]
        return Minibatch(runs, batches, self._normalizer(groups))

    def _runs(self, group: Group) -> bool:
        return group.has_signal or self.form.regularized

    def _completed(self, batch: GroupBatch) -> GroupBatch:
        """With the log-probabilities that the loss needs besides the sampler's."""
        needed: dict[str, nnx.State | None] = {}
        if self.form.recompute:
            needed["old_logps"] = self.state.params
        if self.form.kl:
            needed["reference_logps"] = self._reference
        placed = self._put(batch) if needed else batch
        scored = {
            name: score(params, self._frozen, placed, self.temperature, **self._static)
            for name, params in needed.items()
        }
        return batch._replace(**scored)

    def _accumulate(self, minibatch: Minibatch) -> float:
        """Adds a minibatch's gradient to the state's; returns its loss, undivided."""
        total = self._sum_gradients(minibatch.batches)
        self._pending += minibatch.groups
        self.progress = self.progress._replace(
            signal_groups=self.progress.signal_groups + minibatch.signal,
            normalizer=self.progress.normalizer + minibatch.normalizer,
        )
        return total

    def _sum_gradients(self, batches: Sequence[GroupBatch]) -> float:
        """Adds their gradients to the state's; returns the loss, undivided."""
        total, gradients = 0.0, self.state.gradients
        for batch in batches:
            gradients, loss = accumulate(
                gradients,
                self.state.params,
                self._frozen,
                self._put(batch),
                self.temperature,
                form=self.form,
                layout=self._gradient_layout,
                **self._static,
            )
            total += float(loss)
        self.state = self.state._replace(gradients=gradients)
        return total

    def _normalizer(self, groups: Sequence[Group]) -> float:
        """What the loss of these groups is divided by."""
        rows = sum(len(g.suffixes) for g in groups)
        if self.form.aggregation == "sequence":
            return float(rows)
        if self.form.aggregation == "token":
            return float(sum(g.tokens for g in groups))
        return float(rows * self.settings.max_response)

    def _apply(self, position: int) -> float:
        """One optimizer step, skipped where the gradient isn't finite; returns its norm.

        `position`: passes over minibatches before this one since training began.
        """
        self.state, norm = apply(
            self.state,
            np.float32(self.progress.normalizer),
            np.int32(position),
            optimizer=self.optimizer,
            layout=self._layout,
        )
        finite = bool(np.isfinite(norm))
        bad = 0 if finite else self.progress.nonfinite + 1
        self.progress = self.progress._replace(
            version=self.progress.version + finite, nonfinite=bad, signal_groups=0, normalizer=0.0
        )
        if not finite:
            self._on_nonfinite(self.progress.step + 1, self._offenders())
        self._pending = []
        if bad >= self.settings.max_nonfinite:
            raise RunError(
                f"{bad} gradients in a row weren't finite; the parameters are the last good ones. "
                "Lower optimizer.learning_rate, or look at the groups in nonfinite/"
            )
        return float(norm)

    def _offenders(self) -> list[Group]:
        """Pending groups with an advantage that isn't finite; else those whose gradient alone is not."""
        odd = [g for g in self._pending if not np.isfinite(g.advantages).all()]
        if odd:
            return odd
        for group in self._pending:
            alone = [self._completed(batch) for batch in pack([group], self.shapes[-1:])]
            self._sum_gradients(alone)
            finite, zeros = start_anew(self.state.gradients, layout=self._gradient_layout)
            self.state = self.state._replace(gradients=zeros)
            if not finite:
                odd.append(group)
        return odd

    def _measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """`logp_gap` and `policy/entropy`, means over the tokens of one microbatch of some groups."""
        smallest = self.shapes[-1]
        for batch in pack(groups[: 4 * smallest.bins], [smallest])[:1]:
            scored = measure(
                self.state.params,
                self._frozen,
                self._put(batch),
                self.temperature,
                **self._static,
            )
            tokens = float(scored.tokens)
            return {
                "logp_gap": float(scored.gap) / tokens,
                "policy/entropy": float(scored.entropy) / tokens,
            }
        return {"logp_gap": 0.0, "policy/entropy": 0.0}

    def _put(self, batch: GroupBatch) -> GroupBatch:
        return put(batch, self._rows)
