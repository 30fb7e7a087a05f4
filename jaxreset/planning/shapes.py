"""The shapes that a run compiles, from the limits in its config, and the mesh that they lie on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxreset.config import Config
from jaxreset.errors import ConfigError
from jaxreset.learning.microbatches import PackShape, pack_shapes
from jaxreset.models.block import DecoderConfig
from jaxreset.parallel import make_mesh
from jaxreset.resets.objectives import Objective
from jaxreset.sampling.rounds import Shape


@dataclass(frozen=True)
class RunShapes:
    """The shapes that a run compiles; nothing else is compiled once it trains.

    Attributes:
      base: shapes of `sample`, the first the base round's.
      forks: (parent, child) shapes of `resume`.
      written: shapes of `sample` from behind steps that a rule writes in.
      localize: shape of localisation, None where no policy is asked.
      evaluate: shape of evaluation.
      pack: microbatch shapes of the update.
      sets: (most sets normalised apart in a step, most rollouts in one).
    """

    base: tuple[Shape, ...]
    forks: tuple[tuple[Shape, Shape], ...]
    written: tuple[Shape, ...]
    localize: Shape | None
    evaluate: Shape
    pack: tuple[PackShape, ...]
    sets: tuple[int, int]


def run_shapes(
    config: Config, objective: Objective, *, shards: int = 1, tensor: int = 1
) -> RunShapes:
    """All shapes of a run, from the limits of its config; `shards` and `tensor`: of its mesh, those that
    groups lie on and those that share one."""
    s, o, prompts = config.sampling, objective, config.train.prompts_per_step
    prompt, response = s.max_prompt_tokens, s.max_response_tokens
    base = [Shape(prompts, o.first_draw, prompt, response)]
    if o.drop_seeds and o.max_draws > o.first_draw:
        base.append(Shape(prompts, o.max_draws - o.first_draw, prompt, response))
    forks, written, localize, longest = [], [], None, prompt
    if o.rule is not None:
        child = Shape(prompts * o.resets, o.branches, prompt + response, response)
        forks = [(parent, child) for parent in base]
        if o.rungs > 1:
            forks.append((child, child))
        longest = child.prefix
        written = [child] if "write" in o.needs else []
    if "ask" in o.needs:
        ask = config.reset.localizer
        attempt = prompt + response if ask.mode == "inline" else 0
        localize = Shape(prompts, 1, attempt + ask.max_question_tokens, ask.max_tokens)
    return RunShapes(
        base=tuple(base),
        forks=tuple(forks),
        written=tuple(written),
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
