"""The schema of a config file.

`config_file` reads one. Reading resolves every default, so the config saved in a run folder says all
there is to say.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from jaxreset.losses import Aggregation, KLEstimator, Scale
from jaxreset.models.lora import LINEAR, LoRA, Target
from jaxreset.resets.objectives import Method, Objective, ObjectiveName, make_objective
from jaxreset.resets.rules import RuleName


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


S = TypeVar("S", bound=Section)


class FreshModel(Section):
    """Sizes of a decoder with random weights, for `model.path: null`."""

    layers: PositiveInt = 2
    width: PositiveInt = 128
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    mlp: PositiveInt = 384

    @model_validator(mode="after")
    def _divides(self) -> FreshModel:
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width} must be a multiple of heads {self.heads}, and heads of kv_heads "
                f"{self.kv_heads}"
            )
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} / heads {self.heads} must be even: rotary embedding turns pairs"
            )
        return self


class LoRASection(Section):
    """Adapters that are trained in place of the policy's own parameters."""

    rank: PositiveInt | None = Field(None, description="null: no adapters, all parameters learn")
    alpha: PositiveFloat | None = Field(None, description="scale × rank; null: the rank")
    targets: tuple[Target, ...] = Field(
        LINEAR, min_length=1, description="matrices of every block that have one"
    )

    def make(self) -> LoRA | None:
        """What the policy gets."""
        return None if self.rank is None else LoRA(self.rank, self.alpha or self.rank, self.targets)


class Model(Section):
    """The policy."""

    path: str | None = Field(None, description="Hugging Face folder or name; null: a fresh model")
    dtype: Literal["float32", "bfloat16"] = "float32"
    fresh: FreshModel = FreshModel()
    lora: LoRASection = LoRASection()


class TaskConfig(Section):
    """What is learnt."""

    name: Literal["chain", "math"] = "chain"
    min_terms: int = Field(3, ge=2, description="chain: fewest numbers in a sum")
    max_terms: int = Field(8, le=9, description="chain: most numbers in a sum")
    modulus: int = Field(10, ge=2, le=10, description="chain: sums are modulo this")
    mistakes: float = Field(0.08, ge=0, lt=1, description="chain: errors in demonstrations")
    solve_prompt: str | None = Field(None, description="math: template file of the prompt")
    localize_prompt: str | None = Field(None, description="math: template file of the question")
    inline_prompt: str | None = Field(
        None, description="math: template file of the inline question"
    )
    processes: PositiveInt = Field(2, description="math: answer-checking processes")
    cpu_seconds: PositiveFloat = Field(5.0, description="math: deadline of one answer")
    date: datetime.date | None = Field(
        None, description="what a chat template takes for today; null: the day of the run's start"
    )
    enable_thinking: bool | None = Field(
        None, description="switch of chat templates that have one; null: left to the template"
    )

    @model_validator(mode="after")
    def _ordered(self) -> TaskConfig:
        if self.min_terms > self.max_terms:
            raise ValueError(
                f"min_terms {self.min_terms} must not exceed max_terms {self.max_terms}"
            )
        return self


class Data(Section):
    """Problems. The chain task generates its own; `path` is for math."""

    path: str | None = Field(None, description="JSONL or Parquet file, or a `datasets` name")
    eval_path: str | None = Field(None, description="held-out problems; null: the end of `path`")
    eval_size: PositiveInt = Field(500, description="held-out problems evaluated")
    chain_size: PositiveInt = Field(100_000, description="chain: training problems")
    overlong: Literal["drop", "refuse"] = Field("drop", description="prompts over the limit")


class Sampling(Section):
    """How rollouts are drawn and when they end."""

    temperature: PositiveFloat = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: NonNegativeInt = Field(0, description="0 keeps all")
    max_prompt_tokens: PositiveInt = 32
    max_response_tokens: PositiveInt = 96
    max_steps: PositiveInt = 20
    max_step_tokens: PositiveInt = 16
    slots: PositiveInt | None = Field(
        None, description="most rows decoded at once; null: 32 a core on CPU, else all"
    )
    hold_cache: Literal["auto", "always", "never"] = Field(
        "auto", description="keep caches for resets, or prefill again"
    )

    @model_validator(mode="after")
    def _room(self) -> Sampling:
        if self.max_step_tokens > self.max_response_tokens:
            raise ValueError(
                f"max_step_tokens {self.max_step_tokens} exceeds max_response_tokens "
                f"{self.max_response_tokens}: no step would fit"
            )
        return self


class Localizer(Section):
    """How the policy is asked for its first wrong step."""

    mode: Literal["generate", "inline", "score"] = Field(
        "generate",
        description="write an answer to a fresh prompt, or behind the failed rollout itself; or weigh "
        "every possible answer in a forward pass",
    )
    temperature: NonNegativeFloat | None = Field(
        None, description="null: 0.3, and 0 for layout 1x8 of method=paper"
    )
    top_p: float | None = Field(None, gt=0, le=1, description="null: sampling.top_p")
    top_k: NonNegativeInt | None = Field(None, description="0 keeps all; null: sampling.top_k")
    max_tokens: PositiveInt = 8
    max_question_tokens: PositiveInt = Field(128, description="longer ones count as unanswered")


class Reset(Section):
    """Where and what is reset; null takes what the objective stands for."""

    rule: RuleName | None = None
    layout: str = Field("4+4", description="base + reset rollouts, or reset groups x rollouts")
    rungs: PositiveInt | None = None
    when: Literal["any_failure", "all_failed"] | None = None
    seed_choice: Literal["first", "deepest"] | None = None
    localizer: Localizer = Localizer()


class Loss(Section):
    """The loss form; null takes the method's."""

    aggregation: Aggregation | None = None
    clip: PositiveFloat | tuple[PositiveFloat, PositiveFloat] | None = None
    dual_clip: float | None = Field(None, gt=1)
    advantage_scale: Scale | None = None
    ratio_to: Literal["sampler", "trainer"] = Field(
        "sampler", description="whose log-probabilities the clipped ratio is taken to"
    )
    importance_cap: PositiveFloat | None = Field(
        None,
        description="weigh tokens by trainer / sampler probability, at most this; with clip only where "
        "ratio_to is trainer",
    )
    kl: NonNegativeFloat = Field(0.0, description="pull towards the policy training started from")
    kl_estimator: KLEstimator = "k3"
    entropy_bonus: NonNegativeFloat = 0.0
    overlong: Literal["keep", "mask"] = Field(
        "keep", description="responses cut at a limit: mask gives them no advantage"
    )
    overlong_penalty: NonNegativeFloat = Field(
        0.0, description="taken off their reward before advantages are computed"
    )


class Optimizer(Section):
    """AdamW."""

    learning_rate: PositiveFloat = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="the others fall to 0 where training ends, update by update"
    )
    warmup_steps: NonNegativeInt = Field(0, description="optimizer updates in which the rate rises")
    weight_decay: NonNegativeFloat = 0.01
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: PositiveFloat = 1.0


class Train(Section):
    """The loop."""

    steps: NonNegativeInt = 30
    prompts_per_step: PositiveInt = 32
    minibatch_prompts: PositiveInt | None = Field(None, description="null: one minibatch a step")
    epochs: PositiveInt = Field(
        1, description="passes over a step's minibatches; later ones repeat what an update has used"
    )
    microbatch_tokens: PositiveInt = Field(
        8192, description="token slots in one forward pass; one group always fits"
    )
    min_signal_groups: NonNegativeInt | None = Field(
        None,
        description="groups with a gradient before the optimizer steps, each counted once; 0: always step",
    )
    remat: bool = Field(False, description="recompute activations in the backward pass")
    max_nonfinite: PositiveInt = Field(5, description="bad gradients in a row that end the run")


class WarmStart(Section):
    """Supervised steps before the first RL step, on demonstrations of the chain task."""

    steps: NonNegativeInt = 0
    batch: PositiveInt = 64
    learning_rate: PositiveFloat = Field(2e-2, description="Muon's; Adam takes a tenth")


class Eval(Section):
    """Accuracy on held-out problems."""

    every_steps: PositiveInt | None = Field(
        None, description="null: before and after training only"
    )
    temperature: PositiveFloat = 1.0
    top_p: float | None = Field(None, gt=0, le=1, description="null: sampling.top_p")
    top_k: NonNegativeInt | None = Field(None, description="0 keeps all; null: sampling.top_k")
    batch: PositiveInt = 128


class Checkpoint(Section):
    """Orbax checkpoints."""

    every_steps: PositiveInt = 10
    keep: PositiveInt = Field(2, description="latest ones kept")
    keep_best: NonNegativeInt = Field(
        0, description="kept too: most accurate ones; evaluated steps are saved then"
    )
    keep_every_hours: PositiveFloat | None = Field(
        None, description="kept too: the first one, and one each time so much later"
    )


class Run(Section):
    """The run folder and what is logged."""

    dir: str = "runs/quickstart"
    compile_cache: bool | str = Field(
        True, description="keep compiled programs in dir/cache, or the folder named; false: don't"
    )
    rollouts_mb: NonNegativeFloat = Field(200.0, description="disk for rollouts; oldest go first")
    profile_steps: tuple[int, ...] = Field((), description="steps to trace with jax.profiler")
    tensorboard: bool = False
    wandb_project: str | None = None

    @model_validator(mode="after")
    def _on_a_filesystem(self) -> Run:
        if "://" in self.dir:
            raise ValueError(
                f"dir {self.dir}: expected a path; mount the bucket and name its folder"
            )
        return self


class Mesh(Section):
    """Devices along each axis; the product must be the number of devices."""

    data: PositiveInt | None = Field(None, description="null: all that the other two leave")
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1


class Config(Section):
    """A whole run."""

    objective: ObjectiveName = "srpo"
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
        self.make_objective()
        if self.task.name == "math" and self.data.path is None:
            raise ValueError("data.path is null, but task.name=math needs problems: name a file")
        if self.task.name == "math" and self.model.path is None:
            raise ValueError(
                "model.path is null, but task.name=math needs a pretrained policy: name a folder"
            )
        if self.task.name == "math" and self.warm_start.steps:
            raise ValueError(
                f"warm_start.steps={self.warm_start.steps}: only task.name=chain has demonstrations; "
                "set it to 0"
            )
        if self.warm_start.steps and self.task.mistakes == 0:
            raise ValueError(
                "task.mistakes=0: a warm start shows solutions with mistakes to localise; give some, "
                "such as 0.08"
            )
        if self.task.name == "math" and self.reset.rule == "oracle":
            raise ValueError(
                "reset.rule=oracle: task.name=math can't tell the first wrong step; use chain, or "
                "another rule"
            )
        if self.train.prompts_per_step % self.minibatch_prompts:
            raise ValueError(
                f"train.prompts_per_step {self.train.prompts_per_step} is not divisible by "
                f"train.minibatch_prompts {self.minibatch_prompts}"
            )
        clip = self._method_loss().clip
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
        evaluation = _filled(self.eval, truncation)
        return self.model_copy(
            update={"loss": loss, "train": train, "reset": reset, "eval": evaluation}
        )

    def _method_loss(self) -> Loss:
        """The loss with the method's choices written out."""
        paper_grpo = self.method == "paper" and self.objective == "grpo"
        loss = self.loss
        if paper_grpo and loss.clip is None and loss.aggregation is None:
            clipped = {"clip": 0.2, "dual_clip": loss.dual_clip or 3.0, "aggregation": "token"}
            loss = loss.model_copy(update=clipped)
        scale = loss.advantage_scale or ("sample_std" if paper_grpo else "std")
        return loss.model_copy(
            update={"aggregation": loss.aggregation or "sequence", "advantage_scale": scale}
        )


def _filled(section: S, choices: Mapping[str, Any]) -> S:
    """The section with these values where it has null."""
    missing = {name: value for name, value in choices.items() if getattr(section, name) is None}
    return section.model_copy(update=missing)


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
}
