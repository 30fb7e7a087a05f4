"""A whole config: its sections, what goes with what, and what its names stand for.

`config_file` reads one. Reading resolves every default, so the config saved in a run folder says all
there is to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import Field, model_validator

from jaxreset import extensions
from jaxreset.config_data import Data
from jaxreset.config_names import Section
from jaxreset.config_sections import (
    Checkpoint,
    Loss,
    Mesh,
    Model,
    Optimizer,
    Reset,
    Run,
    Sampling,
    Train,
)
from jaxreset.config_tasks import Eval, TaskConfig, WarmStart
from jaxreset.learning.settings import LearnerSettings
from jaxreset.losses import Scale
from jaxreset.resets.objectives import Method, Objective, make_objective
from jaxreset.tasks.classes import (
    TASKS,
    demonstrates,
    find_task,
    makes_problems,
    tells_wrong_steps,
)

S = TypeVar("S", bound=Section)


class Config(Section):
    """A whole run."""

    objective: str = Field("srpo", description="grpo, rrpo, srpo, ladder, or an import path")
    method: Method = "ours"
    seed: int = Field(0, ge=0, lt=2**32)
    model: Model = Model()
    task: TaskConfig = TaskConfig()
    data: Data = Data()
    sampling: Sampling = Sampling()
    reset: Reset = Reset()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    warm_start: WarmStart = WarmStart()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()
    mesh: Mesh = Mesh()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        self._check_task(self.make_objective())
        if self.train.prompts_per_step % self.minibatch_prompts:
            raise ValueError(
                f"train.prompts_per_step {self.train.prompts_per_step} is not divisible by "
                f"train.minibatch_prompts {self.minibatch_prompts}"
            )
        loss = self._method_loss()
        clip = loss.clip
        if loss.form is not None and clip is not None:
            raise ValueError(
                f"loss.form={loss.form} with loss.clip={clip}: a form says itself how a token's loss is "
                "bounded; leave one of the two out"
            )
        if loss.credit == "steps" and extensions.is_path(loss.advantage or ""):
            raise ValueError(
                f"loss.credit=steps with loss.advantage={loss.advantage}: credit has the unit of the "
                f"group's advantages, which {', '.join(get_args(Scale))} have; leave one of the two out"
            )
        if loss.credit == "steps" and self.make_objective().mask == "response":
            raise ValueError(
                "loss.credit=steps with reset.mask=response: credit already says what kept steps are "
                "worth; leave one of the two out"
            )
        if self.loss.dual_clip is not None and clip is None:
            raise ValueError(f"loss.dual_clip={self.loss.dual_clip} needs loss.clip")
        if self.train.epochs > 1 and clip is None:
            raise ValueError(
                f"train.epochs={self.train.epochs} needs loss.clip, such as 0.2: after the first pass "
                "the policy is another than the one that sampled"
            )
        if self.loss.ratio_to == "trainer" and clip is None:
            raise ValueError("loss.ratio_to=trainer needs loss.clip: without it there is no ratio")
        cap = self.loss.importance_cap
        if cap is not None and clip is not None and self.loss.ratio_to == "sampler":
            raise ValueError(
                f"loss.importance_cap={cap} with loss.clip={clip} and loss.ratio_to=sampler: the ratio to "
                "the sampler would count twice; set loss.ratio_to=trainer, or leave one of the two out"
            )
        return self

    def _check_task(self, objective: Objective) -> None:
        """That the task has what the other sections ask of it."""
        name, task = self.task.name, find_task(self.task.name)
        self.task.check_options(task)
        if self.data.path is None and not makes_problems(task):
            raise ValueError(f"data.path is null, but task.name={name} needs problems: name a file")
        if name == "chain" and (self.task.delimiter or self.task.answer_marker):
            raise ValueError(
                "task.delimiter and task.answer_marker: task.name=chain writes one step a line and its "
                "answer in \\boxed{}; leave them out"
            )
        lines, most = self.task.max_terms, self.sampling.max_steps
        if name == "chain" and lines + 1 > most:
            raise ValueError(
                f"task.max_terms={lines}: {lines} lines and the answer are {lines + 1} steps, but "
                f"sampling.max_steps={most}; set it to {lines + 1} (and leave room: with letters as tokens "
                f"sampling.max_prompt_tokens={2 * lines + 1} and sampling.max_response_tokens="
                f"{5 * lines + self.sampling.max_step_tokens})"
            )
        if name in TASKS and name != "chain" and self.model.path is None:
            raise ValueError(
                f"model.path is null, but task.name={name} needs a pretrained policy: name a folder"
            )
        warm = self.warm_start
        if warm.steps and warm.path is None and name == "chain" and self.task.mistakes == 0:
            raise ValueError(
                "task.mistakes=0: a warm start shows solutions with mistakes to localise; give some, "
                "such as 0.08"
            )
        if warm.steps and warm.optimizer == "muon" and self.model.path is not None:
            if self.model.lora.rank is not None:
                raise ValueError(
                    f"warm_start.optimizer=muon with model.lora.rank={self.model.lora.rank}: muon is for "
                    "whole matrices, and adapters are trained; use adamw"
                )
            if warm.learning_rate is None:
                raise ValueError(
                    "warm_start.optimizer=muon with model.path: what teaches a fresh model fast ruins a "
                    "trained one; name warm_start.learning_rate, such as 1e-4, or use adamw"
                )
        if objective.rule == "oracle" and not tells_wrong_steps(task):
            raise ValueError(
                f"reset.rule=oracle: task.name={name} can't tell the first wrong step; use chain, or "
                "another rule"
            )

    @property
    def warms_at_once(self) -> bool:
        """Whether a batch of the warm start runs at once: that of a fresh policy, of what its task draws.

        All others are packed into microbatches, as those of training are.
        """
        own = self.warm_start.path is None and demonstrates(find_task(self.task.name))
        return self.model.path is None and own

    @property
    def minibatch_prompts(self) -> int:
        """Prompts in one optimizer step."""
        return self.train.minibatch_prompts or self.train.prompts_per_step

    @property
    def passes(self) -> int:
        """Over minibatches in one training step; each may end with an optimizer step."""
        return self.train.prompts_per_step // self.minibatch_prompts * self.train.epochs

    @property
    def optimizer_steps(self) -> int:
        """Of the whole training, where none waits for signal."""
        return self.train.steps * self.passes

    def make_learner_settings(self) -> LearnerSettings:
        """How the learner steps; `self` is resolved."""
        return LearnerSettings(
            self.optimizer.make(self.optimizer_steps),
            temperature=self.sampling.temperature,
            max_response=self.sampling.max_response_tokens,
            minibatch_prompts=self.minibatch_prompts,
            epochs=self.train.epochs,
            passes=self.passes,
            min_signal_groups=self.train.min_signal_groups or 0,
            remat=self.train.remat,
            max_nonfinite=self.train.max_nonfinite,
            seed=self.seed,
        )

    def make_objective(self) -> Objective:
        """The groups that are drawn."""
        r = self.reset
        return make_objective(
            self.objective,
            method=self.method,
            rule=r.rule,
            layout=r.layout,
            rungs=r.rungs,
            when=r.when,
            seed_choice=r.seed_choice,
            drop_seeds=r.drop_seeds,
            mask=r.mask,
        )

    def resolved(self) -> Config:
        """The same config with the method's choices written out."""
        loss = self._method_loss()
        truncation = {"top_p": self.sampling.top_p, "top_k": self.sampling.top_k}
        greedy = self.method == "paper" and self.reset.layout.startswith("1x")
        localizer = _filled(
            self.reset.localizer, {"temperature": 0.0 if greedy else 0.3} | truncation
        )
        reset = self.reset.model_copy(update={"localizer": localizer})
        signal = self.train.min_signal_groups
        if signal is None:
            signal = 0 if self.method == "paper" else 4
        train = self.train.model_copy(update={"min_signal_groups": signal})
        filled = {
            "task": self.task.model_copy(update={"failed_below": self.task.threshold}),
            "eval": _filled(self.eval, truncation),
            "warm_start": self._warm_start_choices(),
        }
        return self.model_copy(update={"loss": loss, "train": train, "reset": reset, **filled})

    def _warm_start_choices(self) -> WarmStart:
        """The warm start with its optimizer and rate written out."""
        fresh, adapters = self.model.path is None, self.model.lora.rank is not None
        optimizer = self.warm_start.optimizer or ("muon" if fresh else "adamw")
        rate = 2e-2 if optimizer == "muon" else 2e-3 if fresh else 2e-4 if adapters else 1e-5
        return _filled(self.warm_start, {"optimizer": optimizer, "learning_rate": rate})

    def _method_loss(self) -> Loss:
        """The loss with the method's choices written out."""
        paper_grpo = self.method == "paper" and self.objective == "grpo"
        loss = self.loss
        if paper_grpo and loss.form is None and loss.clip is None and loss.aggregation is None:
            clipped = {"clip": 0.2, "dual_clip": loss.dual_clip or 3.0, "aggregation": "token"}
            loss = loss.model_copy(update=clipped)
        advantage = loss.advantage or ("sample_std" if paper_grpo else "std")
        return loss.model_copy(
            update={"aggregation": loss.aggregation or "sequence", "advantage": advantage}
        )


def _filled(section: S, choices: Mapping[str, Any]) -> S:
    """The section with these values where it has null."""
    missing = {name: value for name, value in choices.items() if getattr(section, name) is None}
    return section.model_copy(update=missing)


SAME_DATA = "where problems are read, if they are the same: a run keeps their fingerprint"

# The keys (or sections) that may differ where a run goes on, and why; all others may not: they would
# change what is learnt. Equal within rounding means that a token may then be drawn otherwise.
MAY_CHANGE: dict[str, str] = {
    "run": "where a run lies, and what is kept and shown of it",
    "checkpoint": "when it is saved, and what of that stays",
    "eval": "what is measured; nothing is learnt from it",
    "mesh": "sums in another order: equal within rounding",
    "sampling.slots": "rows decode beside fewer or more others: equal within rounding",
    "sampling.hold_cache": "a prefix's keys and values are kept or computed again: equal within rounding",
    "task.processes": "who checks the answers",
    "train.steps": "how far it goes; not where the learning rate's schedule ends with it",
    "train.microbatch_tokens": "sums over the same groups in another order: equal within rounding",
    "train.remat": "activations are kept or computed again: equal within rounding",
    "train.max_nonfinite": "when it gives up",
    "data.path": SAME_DATA,
    "data.eval_path": SAME_DATA,
    "data.columns": SAME_DATA,
    "data.where": SAME_DATA,
    "data.size": SAME_DATA,
}
