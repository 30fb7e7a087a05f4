"""From a config to the objects of a run: everything that can be refused is refused here.

The programs of a run are compiled later, so a bad config costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxreset.config import Config
from jaxreset.errors import ConfigError
from jaxreset.learning.microbatches import PackShape, pack_shapes
from jaxreset.learning.update import LossForm
from jaxreset.models.block import DecoderConfig
from jaxreset.models.encoding import chat_variables
from jaxreset.models.policy import Policy, load_policy, new_policy
from jaxreset.parallel import check_sizes, data_shards, make_mesh, param_shardings, put
from jaxreset.resets.collect import Collector, Localizer
from jaxreset.resets.localize import PolicyLocalizer, ScoringLocalizer
from jaxreset.resets.objectives import Objective
from jaxreset.sampling import Sampler, Shape, StopRules
from jaxreset.tasks.base import Task
from jaxreset.tasks.chain import TOKENIZER, ChainTask
from jaxreset.tasks.pipeline import (
    Overlong,
    Problems,
    PromptStream,
    chain_problems,
    encode_prompts,
    fit_prompts,
    make_task,
    read_problems,
)


@dataclass(frozen=True)
class Plan:
    """The shapes that a run compiles; nothing else is compiled once it trains.

    Attributes:
      base: shapes of `sample`, the first the base round's.
      forks: (parent, child) shapes of `resume`.
      localize: shape of localisation, None where no policy is asked.
      evaluate: shape of evaluation.
      pack: microbatch shapes of the update.
      sets: (most sets normalised apart in a step, most rollouts in one).
    """

    base: tuple[Shape, ...]
    forks: tuple[tuple[Shape, Shape], ...]
    localize: Shape | None
    evaluate: Shape
    pack: tuple[PackShape, ...]
    sets: tuple[int, int]


def make_plan(config: Config, objective: Objective, *, shards: int = 1, tensor: int = 1) -> Plan:
    """All shapes of a run, from the limits of its config; `shards` and `tensor`: of its mesh, those that
    groups lie on and those that share one."""
    s, o, prompts = config.sampling, objective, config.train.prompts_per_step
    prompt, response = s.max_prompt_tokens, s.max_response_tokens
    base = [Shape(prompts, o.first_draw, prompt, response)]
    if o.drop_seeds and o.max_draws > o.first_draw:
        base.append(Shape(prompts, o.max_draws - o.first_draw, prompt, response))
    forks, localize, longest = [], None, prompt
    if o.rule is not None:
        child = Shape(prompts * o.resets, o.branches, prompt + response, response)
        forks = [(parent, child) for parent in base]
        if o.rungs > 1:
            forks.append((child, child))
        longest = child.prefix
    if o.rule == "self":
        ask = config.reset.localizer
        attempt = prompt + response if ask.mode == "inline" else 0
        localize = Shape(prompts, 1, attempt + ask.max_question_tokens, ask.max_tokens)
    return Plan(
        base=tuple(base),
        forks=tuple(forks),
        localize=localize,
        evaluate=Shape(config.eval.batch, 1, prompt, response),
        pack=tuple(
            pack_shapes(
                o.most_in_group,
                longest - 1,
                response,
                tokens=config.train.microbatch_tokens,
                shards=shards,
                multiple=tensor,
            )
        ),
        sets=(prompts * (1 + o.rungs * o.resets), o.base + o.resets * o.branches),
    )


@dataclass
class Experiment:
    """What a config describes, ready to sample and to train.

    `policy` is the one that a warm start starts from: it has no adapters yet, and once it is trained no
    parameters either.
    """

    config: Config
    objective: Objective
    plan: Plan
    policy: Policy
    task: Task
    problems: Problems
    overlong: Overlong
    stream: PromptStream
    sampler: Sampler
    collector: Collector
    form: LossForm
    mesh: jax.sharding.Mesh | None  # None: one device

    @property
    def decode(self) -> Callable[[np.ndarray], str]:
        """Token ids -> text; see `Policy.decode`."""
        return self.collector.decode

    def adapted(self, policy: Policy) -> Policy:
        """The policy with the adapters that the config asks for."""
        if (lora := self.config.model.lora.make()) is None:
            return policy
        policy = policy.with_lora(
            lora.rank, lora.alpha, targets=lora.targets, seed=self.config.seed
        )
        return _spread(policy, self.mesh)

    def compile_sampling(self, policy: Policy) -> None:
        """Compiles all that sampling, asking and evaluating will need."""
        self.sampler.compile(policy)
        if self.collector.localizer is not None:
            self.collector.localizer.compile(policy)

    def test_prompts(self) -> list[Any]:
        """The held-out prompts; their numbers start at 0."""
        test = self.problems.test
        return encode_prompts(
            [test[i] for i in range(len(test))], self.task, self.policy.tokenizer, range(len(test))
        )


def make_experiment(config: Config) -> Experiment:
    """Loads and checks all that a run needs.

    Raises:
      ConfigError: anything missing, unreadable or that doesn't fit together; names what to change.
    """
    try:
        return _make_experiment(config)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(str(error)) from error


def _make_experiment(config: Config) -> Experiment:
    objective = config.make_objective()
    mesh = choose_mesh(config)
    plan = make_plan(config, objective, shards=data_shards(mesh), tensor=mesh.shape["tensor"])
    task = make_task(config.task)
    problems = _problems(config, task)
    spread = mesh if mesh.size > 1 else None
    policy = _policy(config, spread)

    refuse = config.data.overlong == "refuse"
    limit = config.sampling.max_prompt_tokens
    train, overlong = fit_prompts(problems.train, task, policy.tokenizer, limit, refuse=refuse)
    test, _ = fit_prompts(problems.test, task, policy.tokenizer, limit, refuse=refuse)
    problems = problems._replace(train=train, test=test)

    s = config.sampling
    sampler = Sampler.for_policy(
        policy,
        StopRules(s.max_response_tokens, s.max_steps, s.max_step_tokens),
        delimiter=task.delimiter,
        answer_marker=task.answer_marker,
        shapes=[*plan.base, plan.evaluate],
        forks=plan.forks,
        slots=s.slots,
        hold_cache=s.hold_cache,
        mesh=spread,
    )
    collector = Collector(
        objective,
        sampler,
        task,
        policy.without_params().decode,
        None if plan.localize is None else _localizer(config, plan, task, policy, spread),
        draw={"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k},
    )
    return Experiment(
        config=config,
        objective=objective,
        plan=plan,
        policy=policy,
        task=task,
        problems=problems,
        overlong=overlong,
        stream=PromptStream(train, task, policy.tokenizer, seed=config.seed),
        sampler=sampler,
        collector=collector,
        form=loss_form(config),
        mesh=spread,
    )


def _spread(policy: Policy, mesh: jax.sharding.Mesh | None) -> Policy:
    """With its parameters where they belong on the mesh, if there is one."""
    if mesh is None:
        return policy
    params = put(policy.params, param_shardings(mesh, policy.params))
    return policy.with_params(params, policy.version)


def loss_form(config: Config) -> LossForm:
    """The config's."""
    loss = config.loss
    assert loss.aggregation is not None  # resolved
    return LossForm(
        loss.aggregation,
        loss.clip,
        loss.dual_clip,
        recompute=loss.ratio_to == "trainer",
        importance_cap=loss.importance_cap,
        kl=loss.kl,
        kl_estimator=loss.kl_estimator,
        entropy_bonus=loss.entropy_bonus,
    )


def _localizer(
    config: Config, plan: Plan, task: Task, policy: Policy, mesh: jax.sharding.Mesh | None
) -> Localizer:
    ask, shape = config.reset.localizer, plan.localize
    assert shape is not None
    common: dict[str, Any] = {
        "batch": shape.groups,
        "question_limit": ask.max_question_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k,
        "variables": chat_variables(config.task.date, config.task.enable_thinking),
    }
    if ask.mode == "score":
        return ScoringLocalizer(policy.tokenizer, most_steps=config.sampling.max_steps, **common)
    inline = ask.mode == "inline"
    failed = sorted({parent for parent, _ in plan.forks})  # rounds whose rollouts are asked about
    sampler = Sampler.for_policy(
        policy,
        StopRules(ask.max_tokens),
        delimiter=task.delimiter,
        shapes=[] if inline else [shape],
        forks=[(drawn, shape) for drawn in failed] if inline else [],
        question_tokens=ask.max_question_tokens if inline else 0,
        hold_cache=config.sampling.hold_cache if inline else "never",
        mesh=mesh,
    )
    return PolicyLocalizer(sampler, inline=inline, **common)


def choose_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The config's mesh over all devices, those of this job or the given ones.

    Raises:
      ValueError: its product isn't their number, or it splits something unevenly; with the arithmetic.
    """
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    count = len(jax.devices() if devices is None else devices)
    data = config.mesh.data or max(count // (fsdp * tensor), 1)
    # Groups are split over data and fsdp, each shard taking equally many, or an equal part of one.
    for name, groups in (
        ("train.prompts_per_step", config.train.prompts_per_step),
        ("eval.batch", config.eval.batch),
    ):
        shards = data * fsdp
        if groups % shards and shards % groups:
            raise ConfigError(
                f"{name} {groups} is not divisible by mesh.data {data} × mesh.fsdp {fsdp} = {shards} "
                f"shards, nor they by it"
            )
    return make_mesh(data, fsdp, tensor, devices)


def _problems(config: Config, task: Task) -> Problems:
    data = config.data
    if isinstance(task, ChainTask):
        return chain_problems(task, train_size=data.chain_size, test_size=data.eval_size)
    assert data.path is not None  # checked by the schema
    return read_problems(data.path, data.eval_path, test_size=data.eval_size)


def _policy(config: Config, mesh: jax.sharding.Mesh | None) -> Policy:
    """The config's, its parameters where they belong on the mesh."""
    if config.model.path is not None:
        return load_policy(config.model.path, dtype=config.model.dtype, mesh=mesh)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = fresh_sizes(config, len(tokenizer))
    if mesh is not None:
        check_sizes(mesh, heads=sizes.heads, mlp=sizes.mlp, width=sizes.width)
    return _spread(new_policy(sizes, tokenizer, seed=config.seed), mesh)


def fresh_sizes(config: Config, vocab: int) -> DecoderConfig:
    """Sizes of a policy with random weights."""
    fresh = config.model.fresh
    return DecoderConfig(
        vocab=vocab,
        layers=fresh.layers,
        width=fresh.width,
        heads=fresh.heads,
        kv_heads=fresh.kv_heads,
        head_dim=fresh.width // fresh.heads,
        mlp=fresh.mlp,
        tie_embeddings=False,
        dtype=config.model.dtype,
    )
