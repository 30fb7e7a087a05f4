"""Two processes of two devices each, started as a user would, beside one process of four."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreset.errors import ConfigError
from jaxreset.parallel import fetch, gather, own_share, processes, put, rows_sharding
from jaxreset.parallel.mesh import make_mesh
from jaxreset.parallel.processes import start

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
# Nothing has been learnt, so the reward is scripted: a response is right where its text has an even
# length. A process with LEAVES_AT in its environment gets SIGTERM in the nth round that it scores.
SCRIPTED = """
import os, signal
import numpy as np
from jaxreset import cli
from jaxreset.tasks.base import Scores
from jaxreset.tasks.chain import ChainTask
calls, leaves_at = [], int(os.environ.get("LEAVES_AT", 0))
def even_length(task, items):
    calls.append(len(items))
    if len(calls) == leaves_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return Scores(np.array([len(text) % 2 == 0 for _, text in items], np.float64), ())
ChainTask.score = even_length
cli.main()
"""
TINY = """
    model.fresh.layers=1 model.fresh.width=32 model.fresh.heads=2 model.fresh.kv_heads=2 model.fresh.mlp=64
    task.min_terms=3 task.max_terms=5 sampling.max_prompt_tokens=18 sampling.max_response_tokens=16
    sampling.max_step_tokens=8 reset.localizer.max_tokens=5 reset.localizer.max_question_tokens=80
    warm_start.steps=0 train.prompts_per_step=4 train.microbatch_tokens=1500 train.min_signal_groups=0
    data.eval_size=16 eval.batch=16 eval.every_steps=null mesh.fsdp=2
"""
EXEMPT = ("time/", "seconds", "compiles", "eval/")  # the shorter run ends with an evaluation


class Process:
    """`jaxreset train` with so many simulated devices, its output in a file."""

    def __init__(self, log, devices, *options, leaves_at=0):
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "LEAVES_AT": str(leaves_at),
        }
        command = [sys.executable, "-c", SCRIPTED, "train", str(QUICKSTART), *TINY.split()]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.log = log

    def wait(self, seconds):
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            print(self.log.read_text()[-3000:])
            self.process.kill()


def metrics(folder):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def pair_of(folder, port, *, leaves_at=0):
    """Two processes of one run, of which the second gets SIGTERM."""
    job = f"run.dir={folder} train.steps=5000 --processes 2 --coordinator localhost:{port}".split()
    return [
        Process(
            folder.with_suffix(f".{n}.{leaves_at}.log"),
            2,
            *job,
            "--process",
            str(n),
            leaves_at=leaves,
        )
        for n, leaves in enumerate((0, leaves_at))
    ]


def test_two_processes_do_what_one_does_and_end_together(tmp_path):
    """They are preempted after a step (two evaluations, two rounds, and one of the next step), start
    again, and are killed after some more."""
    alone = Process(tmp_path / "alone.log", 4, f"run.dir={tmp_path}/alone", "train.steps=3")
    pair = pair_of(tmp_path / "pair", free_port(), leaves_at=5)
    running = [alone, *pair]
    try:
        assert alone.wait(600) == 0
        assert [process.wait(600) for process in pair] == [75, 75]
        for process in pair:
            assert "ended by SIGTERM; step 1 is saved" in process.log.read_text()
        assert [line["step"] for line in metrics(tmp_path / "pair")] == [0, 1]
        pair = pair_of(tmp_path / "pair", free_port())
        running += pair
        end = time.monotonic() + 600
        while len(metrics(tmp_path / "pair")) < 5 and time.monotonic() < end:
            assert all(p.process.poll() is None for p in pair), pair[0].log.read_text()[-3000:]
            time.sleep(0.2)
        pair[1].process.send_signal(signal.SIGKILL)
        # By a connection that broke, or, where it waits for nothing just then, by missing heartbeats.
        assert pair[0].wait(60) in (1, -signal.SIGABRT)
    finally:
        for process in running:
            process.process.kill()
    message = pair[0].log.read_text()
    assert re.search("other processes broke off|tasks are unhealthy", message)

    expected, ours = metrics(tmp_path / "alone"), metrics(tmp_path / "pair")
    for line, other in zip(ours[:4], expected, strict=True):
        line, other = (
            {key: x for key, x in record.items() if not key.startswith(EXEMPT)}
            for record in (line, other)
        )
        assert line.keys() == other.keys()
        for key, value in line.items():
            np.testing.assert_allclose(value, other[key], rtol=1e-5, atol=1e-6, err_msg=key)
    for line in expected[1:]:
        assert 0.2 < line["reward/mean"] < 0.8
        assert line["optimizer_steps"] == 1
        assert line["grad_norm"] > 0
    assert len({line["compiles"] for line in ours[2:]}) == 1


class Service:
    """Of the job's key-value store, what another process has said; None: nothing."""

    def __init__(self, said):
        self.said = said

    def key_value_try_get(self, key):
        if self.said is None:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return self.said


def test_an_orderly_end_leaves_no_thread_that_watches_the_others(monkeypatch):
    monkeypatch.setattr(processes, "_client", lambda: Service(None))
    monkeypatch.setattr(processes, "WATCH_SECONDS", 0.01)
    before = set(threading.enumerate())
    with processes.ending_together():
        [watch] = set(threading.enumerate()) - before
        time.sleep(0.1)
        assert watch.is_alive()  # another process that said nothing is still there
    assert not watch.is_alive()


def test_a_process_that_failed_ends_the_others_with_its_message(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(processes, "_client", lambda: Service("process 1: RunError: it broke"))
    monkeypatch.setattr(processes, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", codes.append)
    with processes.ending_together():
        while not codes:
            time.sleep(0.01)
    assert codes[0] == 1
    assert "error: ended by process 1: RunError: it broke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("localhost:1", None, 0), "--processes missing"),
        (("localhost:1", 2, 2), "--process 2: expected 0 to 1"),
        ((None, 2, 0), "--coordinator missing"),
    ],
)
def test_flags_that_belong_together_are_asked_for(arguments, words):
    with pytest.raises(ConfigError, match=words):
        start(*arguments)


def test_one_process_has_it_all():
    assert gather(["a", ("b", 3)]) == ["a", ("b", 3)]
    assert own_share(5) == range(5)
    mesh = make_mesh(8, 1, 1)
    tree = {"x": np.arange(16.0), "y": np.ones((8, 2))}
    placed = put(tree, rows_sharding(mesh))
    assert placed["y"].sharding.shard_shape((8, 2)) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, fetch(placed), tree)
