"""Starting again: what a process notices before it ends, and what the next one finds."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError, PreemptedError
from jaxreset.training import compiles, run_folder
from jaxreset.training.compiles import kept_programs
from jaxreset.training.preemption import noticing_preemption
from jaxreset.training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
QUICKSTART, BENCHMARKS = ROOT / "configs" / "quickstart.yaml", ROOT / "benchmarks"


def test_sigterm_is_noticed_once():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    mine = signal.getsignal(signal.SIGTERM)
    with noticing_preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(PreemptedError, match="the same command starts again"):
            preemption.check()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, before)


def test_only_the_main_thread_notices():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with noticing_preemption() as preemption:
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


def test_a_run_killed_twice_and_ended_once_is_the_run_that_was_not(monkeypatch, capsys):
    """The short form of `benchmarks/kill_and_resume.py`, with programs compiled in haste."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    from kill_and_resume import main

    assert main(["--series", "kkt", "--steps", "6", *SHORT.split()]) == 0
    shown = capsys.readouterr().out
    assert "never interrupted" in shown
    assert ", 6 optimizer steps" in shown
    assert shown.count("(exit code -9)") == 2
    assert shown.count("(exit code 75)") == 1
    assert "kkt: the same bits, metrics and rollouts" in shown


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
