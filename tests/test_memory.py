"""What is said of memory, against the arrays that live at the worst moments of a run."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreset.config_file import load_config
from jaxreset.learning import learner
from jaxreset.parallel.compiling import SideBySide
from jaxreset.planning import footprint
from jaxreset.run.loop import train
from jaxreset.sampling import programs, schedule
from jaxreset.tasks.base import Scores
from jaxreset.tasks.chain import ChainTask

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
# Caches are larger than parameters, and some rows draw far longer than most: lanes become fewer.
LONG = """
    model.fresh.layers=1 model.fresh.width=32 model.fresh.heads=2 model.fresh.kv_heads=2 model.fresh.mlp=64
    task.min_terms=3 task.max_terms=5 sampling.max_prompt_tokens=18 reset.localizer.max_tokens=5
    sampling.max_response_tokens=96 sampling.max_step_tokens=96 reset.localizer.max_question_tokens=160
    objective=srpo warm_start.steps=0 train.steps=1 train.prompts_per_step=8 train.microbatch_tokens=3000
    data.eval_size=16 eval.batch=16 eval.every_steps=null
"""


class Watch:
    """The most bytes of a device that arrays took, by phase; those that were there before don't count."""

    def __init__(self):
        gc.collect()
        self._before = jax.live_arrays()  # held: no new array takes the place of one of them
        self._known = _places(self._before)
        self.most = {}

    def look(self, phase, coming=()):
        """`coming`: arguments of a program, which it has on the devices while it runs."""
        held = Counter()
        for (device, _), size in _places(jax.live_arrays()).items() - self._known.items():
            held[device] += size
        most = max(held.values(), default=0)
        most += sum(x.nbytes for x in jax.tree.leaves(coming) if isinstance(x, np.ndarray))
        if most > self.most.get(phase, 0):
            self.most[phase] = most

    def watching(self, function, phase):
        """The function, before and after which it is looked."""

        def watched(*args, **static):
            self.look(phase, args)
            result = function(*args, **static)
            self.look(phase)
            return result

        if hasattr(function, "lower"):

            def lower(*args, **static):
                self.look("compiling")
                return function.lower(*args, **static)

            watched.lower = lower
        return watched


def _places(arrays):
    """Bytes by device and place: two arrays may be one."""
    places = {}
    for array in arrays:
        with suppress(RuntimeError):  # it was given away
            for shard in array.addressable_shards:
                at = shard.device, shard.data.unsafe_buffer_pointer()
                places[at] = max(places.get(at, 0), shard.data.nbytes)
    return places


@pytest.fixture
def watch(monkeypatch, compiled_in_haste):
    watch = Watch()
    monkeypatch.setattr(schedule, "MIN_WINDOW", 24)  # else such responses would have one
    monkeypatch.setattr(programs, "run", watch.watching(programs.run, "sampling"))
    making = SideBySide.__call__
    monkeypatch.setattr(SideBySide, "__call__", watch.watching(making, "compiling"))
    for name in ("accumulate", "apply", "measure"):
        monkeypatch.setattr(learner, name, watch.watching(getattr(learner, name), "update"))
    for name in ("PROCESS", "DECODE_LAYER", "OTHER_LAYER"):
        monkeypatch.setattr(footprint, name, 0)
    return watch


def even_length(task, items):
    return Scores(np.array([len(text) % 2 == 0 for _, text in items], np.float64), ())


@pytest.mark.parametrize(
    ("devices", "overrides", "least"),
    [
        (1, [], 0.7),
        # Rows seldom wait in their places and on pages at once.
        (1, ["sampling.hold_cache=never", "model.lora.rank=4"], 0.4),
        (1, ["model.dtype=bfloat16", "loss.kl=0.1", "sampling.slots=16"], 0.75),
        # A decoding program's copies of prefixes and narrow windows, which count, aren't seen here.
        (8, ["mesh.data=4", "mesh.tensor=2"], 0.75),
    ],
)
def test_a_run_holds_what_is_said(devices, overrides, least, watch, monkeypatch, tmp_path):
    """`least`: of what is said of sampling, whose worst moment depends on when rows end.

    An update of few groups takes a smaller microbatch than the one that is counted.
    """
    there = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda *_: there)
    monkeypatch.setattr(ChainTask, "score", even_length)
    config = load_config(QUICKSTART, [*LONG.split(), f"run.dir={tmp_path / 'run'}", *overrides])
    case = footprint.here(config)
    said = {name: phase.total for name, phase in footprint.phases(case, []).items()}
    train(config)
    tables = 16_000  # of steps, of where rows go
    assert watch.most.keys() == {"compiling", "sampling", "update"}
    for phase, most in watch.most.items():
        assert most <= said[phase] + tables, phase
        share = {"compiling": 0.9, "sampling": least, "update": 0.45}[phase]
        assert most >= share * said[phase], phase
