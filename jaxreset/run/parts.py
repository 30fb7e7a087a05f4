"""Parts of an experiment that are more than a line of its config: policy, problems, localizer."""

from __future__ import annotations

from typing import Any

import jax

from jaxreset.config import Config
from jaxreset.models.placement import param_shardings
from jaxreset.models.policy import Policy, load_policy, new_policy
from jaxreset.parallel import check_sizes, gather, put
from jaxreset.planning.shapes import RunShapes, fresh_sizes
from jaxreset.resets.localize import Localizer, PolicyLocalizer, ScoringLocalizer
from jaxreset.sampling.rounds import StopRules
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Task
from jaxreset.tasks.chain import TOKENIZER
from jaxreset.tasks.fingerprint import Portion, differences, hashed_values
from jaxreset.tasks.pipeline import Problems, own_problems, read_problems


def spread(policy: Policy, mesh: jax.sharding.Mesh | None) -> Policy:
    """With its parameters where they belong on the mesh, if there is one."""
    if mesh is None:
        return policy
    params = put(policy.params, param_shardings(mesh, policy.params))
    return policy.with_params(params, policy.version)


def adapted(config: Config, policy: Policy, mesh: jax.sharding.Mesh | None) -> Policy:
    """The policy with the adapters that the config asks for; itself where it has them."""
    if (lora := config.model.lora.make()) is None or policy.config.lora is not None:
        return policy
    policy = policy.with_lora(lora.rank, lora.alpha, targets=lora.targets, seed=config.seed)
    return spread(policy, mesh)


def make_localizer(
    config: Config,
    shapes: RunShapes,
    asking: Asking,
    policy: Policy,
    mesh: jax.sharding.Mesh | None,
) -> Localizer:
    """What answers the localisation question, for rules that ask."""
    ask, shape = config.reset.localizer, shapes.localize
    assert shape is not None
    common: dict[str, Any] = {
        "batch": shape.groups,
        "question_limit": ask.max_question_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k,
    }
    if ask.mode == "score":
        return ScoringLocalizer(asking, most_steps=config.sampling.max_steps, **common)
    inline = ask.mode == "inline"
    failed = sorted({parent for parent, _ in shapes.forks})  # rounds whose rollouts are asked about
    sampler = Sampler.for_policy(
        policy,
        StopRules(ask.max_tokens),
        delimiter=asking.task.delimiter,
        shapes=[] if inline else [shape],
        forks=[(drawn, shape) for drawn in failed] if inline else [],
        question_tokens=ask.max_question_tokens if inline else 0,
        hold_cache=config.sampling.hold_cache if inline else "never",
        mesh=mesh,
    )
    return PolicyLocalizer(sampler, asking, inline=inline, **common)


def read_or_make_problems(config: Config, task: Task) -> Problems:
    """What is trained on and what is held out, the same in every process.

    Raises:
      ValueError: what a file holds is refused, or another process reads something else.
    """
    data = config.data
    if data.path is None:
        sizes = {"train_size": data.chain_size, "test_size": data.eval_size}
        asked = {"name": config.task.name, "options": config.task.options, **sizes}
        made = Portion("task", config.task.name, data.chain_size, hashed_values(asked))
        return own_problems(task, **sizes)._replace(portions=(made,))
    problems = read_problems(
        data.selections(), data.eval_selections(), test_size=data.eval_size, read=task.read_record
    )
    first, *others = gather([problems.portions])
    for number, portions in enumerate(others, start=1):
        if found := differences(first, portions, words=("in process 0", f"in process {number}")):
            raise ValueError(f"{found[0]}; name files that are the same for all processes")
    return problems


def starting_policy(config: Config, mesh: jax.sharding.Mesh | None) -> Policy:
    """The config's, its parameters where they belong on the mesh."""
    if config.model.path is not None:
        return load_policy(config.model.path, dtype=config.model.dtype, mesh=mesh)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = fresh_sizes(config, len(tokenizer))
    if mesh is not None:
        check_sizes(mesh, heads=sizes.heads, mlp=sizes.mlp, width=sizes.width)
    return spread(new_policy(sizes, tokenizer, seed=config.seed), mesh)
