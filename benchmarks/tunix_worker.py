"""google-tunix's sampler and its GRPO train step, in a virtual environment of their own.

Driven by `common.Tunix`: reads one JSON object a line, a case, and answers with one: the seconds of one
call. The first call of a case compiles.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from importlib.metadata import version

import jax
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl.algo_core import grpo_loss_fn
from tunix.rl.common import TrainExample
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig


class Ids:
    """A tokenizer whose texts are token ids, so that prompts are exact."""

    def encode(self, text, **_):
        return [int(t) for t in text.split()]

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return None

    def eos_id(self):
        return 0

    def pad_id(self):
        return 0

    def dedup_bos_ids(self, ids):
        return ids


@functools.cache
def model(layers, width, heads, kv_heads, mlp, vocab):
    config = ModelConfig(
        num_layers=layers,
        vocab_size=vocab,
        embed_dim=width,
        hidden_dim=mlp,
        num_heads=heads,
        head_dim=width // heads,
        num_kv_heads=kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    return config, Qwen2(config, rngs=nnx.Rngs(0))


@functools.cache
def sampler(cache_size, **sizes):
    config, network = model(**sizes)
    # The exact length: a longer cache would be attended to for nothing.
    cache = CacheConfig(cache_size, config.num_layers, config.num_kv_heads, config.head_dim)
    return Sampler(network, Ids(), cache)


def draw(prompts, new, seed, sizes):
    """Seconds to draw `new` tokens after each of `prompts`, none of which ends before."""
    longest = max(map(len, prompts))
    drawer = sampler(longest + new, **sizes)
    texts = [" ".join(map(str, p)) for p in prompts]
    start = time.perf_counter()
    out = drawer(
        texts,
        max_generation_steps=new,
        max_prompt_length=longest,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],
        seed=seed,
    )
    seconds = time.perf_counter() - start
    assert {len(np.asarray(t)) for t in out.tokens} == {new}
    return seconds


@functools.cache
def train_step(**sizes):
    """GRPO's step as the trainer runs it, without a KL term."""
    _, network = model(**sizes)
    trainer = PeftTrainer(network, optax.adamw(1e-6), TrainingConfig(eval_every_n_steps=10**9))
    grpo = GRPOConfig(num_generations=8, beta=0.0)
    grpo.temperature = 1.0  # which the learner copies from the rollouts' settings

    def loss(network, train_example):
        return grpo_loss_fn(network, train_example, grpo, pad_id=0, eos_id=-1)

    trainer.with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    return trainer.jit_train_and_eval_step(cache_nnx_graph=True)[0]


def update(prompts, completions, seed, sizes):
    """Seconds of a train step on rows of equal lengths."""
    step = train_step(**sizes)
    prompts, completions = np.asarray(prompts, np.int32), np.asarray(completions, np.int32)
    rng = np.random.default_rng(seed)
    example = TrainExample(
        prompt_ids=prompts,
        prompt_mask=np.ones_like(prompts),
        completion_ids=completions,
        completion_mask=np.ones_like(completions),
        advantages=rng.normal(size=len(prompts)).astype(np.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    start = time.perf_counter()
    jax.block_until_ready(step(example))
    return time.perf_counter() - start


CASES = {"draw": draw, "update": update}


def main():
    """Answers cases until the input ends."""
    logging.disable(logging.WARNING)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    print(
        json.dumps({"tunix": version("google-tunix"), "jax": jax.__version__}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(CASES[case.pop("kind")](**case)), file=answers, flush=True)


if __name__ == "__main__":
    main()
