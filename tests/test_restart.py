"""Starting again: what a process notices before it ends, and what the next one finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError, PreemptedError
from jaxreset.run import compiles
from jaxreset.run import folder as run_folder
from jaxreset.run import preemption as preemption_module
from jaxreset.run.compiles import kept_programs
from jaxreset.run.folder import RunFolder
from jaxreset.run.preemption import noticing_preemption

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
QUICKSTART, BENCHMARKS = ROOT / "configs" / "quickstart.yaml", ROOT / "benchmarks"


SIGNALS = pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)]
)


@pytest.fixture
def handlers():
    """Handlers of the two signals that are there before, and are to be there after."""
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(n, lambda *_: None) for n in numbers]
    mine = [signal.getsignal(n) for n in numbers]
    yield mine
    assert [signal.getsignal(n) for n in numbers] == mine
    for n, handler in zip(numbers, before, strict=True):
        signal.signal(n, handler)


@SIGNALS
def test_a_signal_is_noticed_once(handlers, number, name, code):
    with noticing_preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(PreemptedError, match=f"{name}; the same command starts") as caught:
            preemption.check()
        assert caught.value.code == code
        assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process


def signalled(number, reached, *, before=False):
    """What a run does that gets a signal in, or before, what can be ended at once."""
    with noticing_preemption() as preemption:
        with preemption.ending_at_once():
            reached.append("first")
        if before:
            os.kill(os.getpid(), number)
        reached.append("between")
        with preemption.ending_at_once():
            os.kill(os.getpid(), number)
            reached.append("second")


@SIGNALS
@pytest.mark.parametrize("before", [False, True])
def test_a_signal_ends_at_once_what_can_be_lost(handlers, number, name, code, before):
    reached = []
    with pytest.raises(PreemptedError, match=name) as caught:
        signalled(number, reached, before=before)
    assert caught.value.code == code
    assert reached == ["first", "between"]


def test_an_interrupt_that_is_somebody_elses_stays_one(handlers):
    with pytest.raises(KeyboardInterrupt), noticing_preemption():
        raise KeyboardInterrupt


def test_several_processes_end_at_the_same_point(handlers, monkeypatch):
    """One that got the signal must not leave the others waiting for it; they say what it got."""
    monkeypatch.setattr(preemption_module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption_module, "gather", lambda mine: [*mine, "Ctrl-C"])
    reached, asked = [], []
    monkeypatch.setattr(preemption_module, "any_process", lambda mine: asked.append(mine) or mine)
    with pytest.raises(PreemptedError, match="Ctrl-C"):
        signalled(signal.SIGINT, reached)
    assert reached == ["first", "between", "second"]
    assert asked == [False, False, False, True]
    monkeypatch.setattr(preemption_module, "any_process", lambda mine: True)  # another one
    with noticing_preemption() as preemption, pytest.raises(PreemptedError) as caught:
        preemption.check()
    assert caught.value.code == 130


def test_an_ignored_signal_stays_ignored(handlers):
    """As a shell makes it for a job in the background."""
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with noticing_preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        preemption.check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, mine)


# Python's handlers wait until the call returns; it lets other threads go on, as programs on a device do.
BUSY = """
import hashlib, threading
from jaxreset.run.preemption import noticing_preemption
with noticing_preemption():
    threading.Timer(1, print, ["ready"], {"flush": True}).start()  # from inside the call
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_signal_ends_a_process_in_the_middle_of_a_program():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C: the run ends as soon as" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()


def test_only_the_main_thread_notices():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with noticing_preemption() as preemption, preemption.ending_at_once():
            preemption.check()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.fixture
def no_cache(monkeypatch):
    """JAX was given no folder; every program is worth keeping."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compiles, "KEPT_SECONDS", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


def compile_something(size):
    jax.jit(lambda x: jnp.sin(x) + size).lower(jnp.ones(size)).compile()


def test_programs_are_kept_in_the_folder(tmp_path, no_cache):
    compile_something(5)
    with kept_programs(tmp_path / "cache"):
        compile_something(6)
    kept = {file.name for file in (tmp_path / "cache").iterdir()}
    assert any("jit" in name for name in kept)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    compile_something(7)
    assert {file.name for file in (tmp_path / "cache").iterdir()} == kept
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
    with kept_programs(tmp_path / "ours"):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "users")
    with kept_programs(None):
        pass


def folder_of(path, *overrides):
    return RunFolder(load_config(QUICKSTART, [f"run.dir={path}", *overrides]))


def test_where_programs_are_kept(tmp_path):
    assert folder_of(tmp_path).compile_cache == tmp_path / "cache"
    assert folder_of(tmp_path / "none").compile_cache is None  # evaluating makes no run folder
    assert folder_of(tmp_path, "run.compile_cache=false").compile_cache is None
    shared = folder_of(tmp_path, f"run.compile_cache={tmp_path}/shared").compile_cache
    assert shared == tmp_path / "shared"


# Entropy takes the place of the warm start: without either a policy this small would learn nothing.
SHORT = """
    objective=rrpo model.fresh.layers=1 warm_start.steps=0 loss.entropy_bonus=0.1 train.min_signal_groups=0
"""


def test_a_run_killed_interrupted_and_ended_is_the_run_that_was_not(monkeypatch, capsys):
    """The short form of `benchmarks/kill_and_resume.py`, with programs compiled in haste."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    from kill_and_resume import main

    assert main(["--series", "kit", "--steps", "6", *SHORT.split()]) == 0
    shown = capsys.readouterr().out
    assert "never interrupted" in shown
    assert ", 6 optimizer steps" in shown
    for code in (-9, 130, 75):
        assert shown.count(f"(exit code {code})") == 1
    assert "kit: the same bits, metrics and rollouts" in shown


def test_a_run_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "run")
    folder.check_writable()
    folder.check_shared()
    assert not list(folder.path.glob(".shared*"))

    def two(items):  # of which the other sees nothing
        return [items[0], False] if isinstance(items[0], bool) else items * 2

    monkeypatch.setattr(run_folder, "gather", two)
    with pytest.raises(ConfigError, match="process 1 doesn't find there what process 0 wrote"):
        folder.check_shared()


def test_one_process_writes_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "is_leader", lambda: False)
    folder = folder_of(tmp_path / "run")
    folder.check_writable()
    folder.claim()
    folder.cut_back(-1)
    folder.log({"step": 1})
    folder.complete({"step": 1, "eval/accuracy": 0.5})
    folder.save_trees(1, [{}])
    folder.save_nonfinite(1, [{}])
    assert list(tmp_path.iterdir()) == []
