"""What all tests share: eight simulated CPU devices, no network, a tiny policy and its sampler."""

from __future__ import annotations

import os

# Read when jax and the Hugging Face libraries are imported, so before them.
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# Of several test processes each keeps to a core of its own: threads of two would wait for each other.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import dataclasses
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from model_helpers import random_policy
from transformers import AutoTokenizer

from jaxreset.models.block import DecoderConfig
from jaxreset.sampling.rounds import Shape, StopRules
from jaxreset.sampling.sampler import Sampler
from jaxreset.spelling import token_bytes
from jaxreset.steps import build_automaton
from jaxreset.tasks.chain import TOKENIZER

# Instead of XLA_FLAGS, which programs started by a test would inherit. Device 0 is the default.
jax.config.update("jax_num_cpu_devices", 8)

TINY = DecoderConfig(
    vocab=45,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    rope_theta=100.0,
    qkv_bias=True,
)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs between files."""
    yield
    _forget_programs(10_000)


@pytest.fixture(autouse=True)
def not_too_many_programs():
    """Forgets them in the middle of a file too, where its tests compile very many."""
    yield
    _forget_programs(30_000)


def _forget_programs(most_maps: int) -> None:
    """A program takes about 130 memory maps; past Linux's 65,530 in a process the compiler crashes."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > most_maps:
        jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_in_haste(tmp_path_factory):
    """Whole runs compile longest: it is done without most optimizations, and kept between them."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def hasty():
    """The test's programs are compiled without most optimizations, in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tokenizer():
    """The chain task's: 45 tokens, characters but for `\\boxed{`."""
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="session")
def policies(tokenizer):
    """One random policy in both precisions; its distributions are neither flat nor certain."""

    def make(dtype):
        policy = random_policy(dataclasses.replace(TINY, dtype=dtype), tokenizer, seed=3)
        # Committed to its device, as after an update: a program is compiled anew for the other kind.
        return policy.with_params(jax.device_put(policy.params, jax.devices()[0]), policy.version)

    with jax.enable_x64(True):
        return {dtype: make(dtype) for dtype in ("float32", "float64")}


@pytest.fixture(params=["float32", "float64"])
def policy(request, policies):
    """The tiny policy in each precision; the test runs in it."""
    with jax.enable_x64(request.param == "float64"):
        yield policies[request.param]


@pytest.fixture
def policy32(policies):
    """The tiny policy in float32 only."""
    return policies["float32"]


@pytest.fixture
def policy64(policies):
    """The tiny policy in float64 only; the test runs in it."""
    with jax.enable_x64(True):
        yield policies["float64"]


@pytest.fixture(scope="session")
def automaton(tokenizer):
    """Steps end at a newline, the answer is in a box, and three rare strings stop a response."""
    return build_automaton(
        token_bytes(tokenizer),
        delimiter="\n",
        answer_marker="\\boxed{",
        stop_strings=["b=", "1}", "c:"],
    )


@pytest.fixture(scope="session")
def sampler(automaton):
    """Up to 8 prompts of 12 tokens, 4 rows each; up to 200 prefixes of 36 tokens, one row each."""
    prompts, cuts = Shape(8, 4, 12, 24), Shape(200, 1, 36, 24)
    return Sampler(
        automaton,
        StopRules(max_response=24, max_steps=6, max_step_tokens=9),
        eos_ids=(1,),
        shapes=[prompts, cuts],
        forks=[(prompts, cuts), (cuts, cuts)],
    )
