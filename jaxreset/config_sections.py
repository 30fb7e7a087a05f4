"""The sections of a config about the policy, rollouts, losses and the run, each with its keys, their
defaults and what each may be; `config_tasks` and `config_data` have those about what is learnt.

`config` puts them together, and checks what goes with what.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from jaxreset.config_names import AdvantageName, CallbackName, FormName, RuleName, Section
from jaxreset.learning.form import LossForm, find_form
from jaxreset.learning.settings import AdamW, Schedule
from jaxreset.losses import Aggregation, KLEstimator
from jaxreset.models.lora import LINEAR, LoRA, Target
from jaxreset.resets.objectives import Mask, When


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


class LocalizerSection(Section):
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
    when: When | None = None
    seed_choice: Literal["first", "deepest"] | None = None
    drop_seeds: bool | None = Field(
        None,
        description="leave the rollouts that are reset out of the base group; null: the method's",
    )
    mask: Mask | None = Field(
        None, description="what of a reset group learns: suffix, or response: its kept steps too"
    )
    localizer: LocalizerSection = LocalizerSection()


class Loss(Section):
    """The loss form; null takes the method's."""

    aggregation: Aggregation | None = None
    clip: PositiveFloat | tuple[PositiveFloat, PositiveFloat] | None = None
    dual_clip: float | None = Field(None, gt=1)
    advantage: AdvantageName | None = Field(
        None, description="std, sample_std, mean, loo or none, or a function by its import path"
    )
    form: FormName | None = Field(
        None,
        description="losses of tokens, by the import path of a function; null: the policy gradient",
    )
    credit: Literal["group", "steps"] = Field(
        "group",
        description="steps: what a later reset kept is worth what it adds to the chance of success",
    )
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

    def make(self) -> LossForm:
        """What the learner gets; `self` is resolved."""
        assert self.aggregation is not None
        return LossForm(
            self.aggregation,
            self.clip,
            self.dual_clip,
            recompute=self.ratio_to == "trainer",
            importance_cap=self.importance_cap,
            kl=self.kl,
            kl_estimator=self.kl_estimator,
            entropy_bonus=self.entropy_bonus,
            form=None if self.form is None else find_form(self.form),
        )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """`advantage` was called `advantage_scale`."""
        if isinstance(values, dict) and "advantage_scale" in values:
            values = dict(values)
            values.setdefault("advantage", values.pop("advantage_scale"))
        return values


class Optimizer(Section):
    """AdamW."""

    learning_rate: PositiveFloat = 3e-4
    schedule: Schedule = Field(
        "constant", description="the others fall to 0 where training ends, update by update"
    )
    warmup_steps: NonNegativeInt = Field(0, description="optimizer updates in which the rate rises")
    weight_decay: NonNegativeFloat = 0.01
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: PositiveFloat = 1.0

    def make(self, steps: int) -> AdamW:
        """What the optimizer is made of, for a training of so many optimizer steps."""
        return AdamW(**self.model_dump(), steps=steps)


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
    callbacks: tuple[CallbackName, ...] = Field(
        (), description="functions of a step's record and the experiment, by import path"
    )

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
