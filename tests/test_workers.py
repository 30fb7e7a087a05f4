"""Reward workers: order, deadlines, crashes, and the life of the processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from jaxreset.tasks.base import Problem
from jaxreset.tasks.workers import RewardWorkers

ROOT = Path(__file__).parents[1]


def act(problem: Problem, response: str) -> float:
    """A verifier that does what the first word of the response says; `problem.answer` is a path."""
    verb, _, rest = response.partition(" ")
    if verb == "spin":
        while True:
            pass
    if verb == "power":  # one C call that holds the interpreter lock
        return float(10**10**10 > 0)
    if verb == "sleep":
        time.sleep(float(rest))
    elif verb == "allocate":
        return float(len(bytearray(2**40)))
    elif verb == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif verb == "exit":
        os._exit(3)
    elif verb == "stumble":  # dies the first time only
        tripped = Path(problem.answer)
        if not tripped.exists():
            tripped.touch()
            os._exit(3)
    elif verb == "raise":
        raise KeyError(rest)
    elif verb == "leave":
        raise SystemExit(0)
    elif verb == "recurse":
        return act(problem, response)
    elif verb == "lambda":
        raise Unpicklable(lambda: None)
    elif verb == "return":
        return eval(rest)
    elif verb == "write":  # into every pipe that is open
        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(fd, b"\0\0\0\4junk")
    elif verb == "print":
        print("a verifier that prints must not disturb the pipe")
    elif verb == "jax":
        return float("jax" in sys.modules)
    elif verb == "worker":
        return float(os.getpid())
    return float(rest or 1)


class Unpicklable(BaseException):
    """Whose text can't be made either."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def refuse_to_start() -> None:
    raise OSError("no licence for the verifier")


def items(*responses: str) -> list[tuple[Problem, str]]:
    return [(Problem(f"p{n}", "?", "!"), response) for n, response in enumerate(responses)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def workers():
    with RewardWorkers(act, processes=2, cpu_seconds=0.3, wall_seconds=1.0) as pool:
        yield pool


def test_rewards_are_in_input_order_whichever_worker_is_faster(workers):
    delays = [0.2, 0.0, 0.05, 0.0, 0.1, 0.0, 0.0, 0.15]
    scores = workers.score(items(*(f"sleep {delay}" for delay in delays)))
    assert scores.rewards.dtype == np.float64
    np.testing.assert_array_equal(scores.rewards, delays)
    assert scores.timeouts == ()


def test_no_items_start_no_process():
    with RewardWorkers(act) as pool:
        scores = pool.score([])
        assert scores.rewards.shape == (0,)
        assert scores.timeouts == ()
        assert pool._workers == []


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("spin", "0.3 CPU-seconds"),
        ("power", "0.3 CPU-seconds"),
        ("sleep 60", "1 seconds"),
        pytest.param(
            "allocate",
            "out of memory",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS"),
        ),
    ],
)
def test_a_deadline_scores_zero_and_names_the_item(workers, caplog, response, reason):
    rest = "x" * 300
    batch = items("ok 1", f"{response} {rest}" if response == "spin" else response, "ok 2", "ok 3")
    with caplog.at_level(logging.WARNING, "jaxreset.tasks.workers"):
        scores = workers.score(batch)
    np.testing.assert_array_equal(scores.rewards, [1, 0, 2, 3])
    assert scores.timeouts == (1,)
    (record,) = caplog.records
    assert reason in record.message
    assert "'p1'" in record.message
    assert repr(batch[1][1][:200]) in record.message
    assert rest not in record.message


def test_every_item_may_hit_its_deadline(workers):
    scores = workers.score(items("spin", "sleep 60", "spin", "ok 4", "spin"))
    np.testing.assert_array_equal(scores.rewards, [0, 0, 0, 4, 0])
    assert scores.timeouts == (0, 1, 2, 4)


def test_the_deadline_is_per_item():
    """Ten items of a fifth of the deadline each take twice the deadline together."""
    burn = "import time\nend = time.process_time() + 0.06\nwhile time.process_time() < end: pass"
    with RewardWorkers(exec_code, processes=1, cpu_seconds=0.3) as pool:
        scores = pool.score(items(*[burn] * 10))
    np.testing.assert_array_equal(scores.rewards, np.ones(10))


def exec_code(problem: Problem, response: str) -> float:
    exec(response, {})
    return 1.0


def test_a_crash_is_tried_once_more(workers, tmp_path):
    batch = items("ok 1", "stumble 5", "ok 2")
    batch[1] = (Problem("p1", "?", str(tmp_path / "tripped")), "stumble 5")
    scores = workers.score(batch)
    np.testing.assert_array_equal(scores.rewards, [1, 5, 2])
    assert scores.timeouts == ()


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("kill", "process died: SIGSEGV"),
        ("exit", "process died: exit status 3"),
        ("write", "process died"),
        ("raise this key", "KeyError: 'this key'"),
        ("raise " + "x" * 10**5, "Traceback"),
        ("leave", "SystemExit"),
        ("recurse", "RecursionError"),
        ("lambda", "Unpicklable"),
        ("return None", "TypeError: the verifier returned None"),
        ("return '1.0'", "TypeError: the verifier returned '1.0'"),
        ("return 1j", "TypeError"),
        ("return [1.0]", "TypeError"),
        ("return 10**400", "OverflowError"),
        ("return 1e39", "OverflowError: the verifier returned 1e\\+39: more than float32"),
        ("ok nan", "nan: expected a finite number"),
        ("ok -inf", "-inf: expected a finite number"),
    ],
    ids=lambda value: value[:12],
)
def test_a_verifier_that_fails_costs_the_response_its_reward_alone(workers, response, reason):
    scores = workers.score(items("ok 1", response, "ok 2"))
    np.testing.assert_array_equal(scores.rewards, [1, 0, 2])
    assert (scores.errors, scores.timeouts) == ((1,), ())
    (text,) = scores.reasons
    assert re.search(reason, text)
    assert len(text) < 5000
    # Nothing of the failed items is left over for the next call.
    np.testing.assert_array_equal(workers.score(items("ok 7", "ok 8")).rewards, [7, 8])


@pytest.mark.parametrize("value", ["True", "0", "__import__('numpy').float32(0.5)", "-1e38"])
def test_any_number_is_a_reward(workers, value):
    scores = workers.score(items(f"return {value}"))
    assert scores.errors == ()
    np.testing.assert_allclose(scores.rewards, [float(eval(value))])


def test_a_worker_ended_between_two_calls_is_replaced(workers):
    (pid,) = workers.score(items("worker")).rewards
    os.kill(int(pid), signal.SIGKILL)
    rewards = workers.score(items(*["worker"] * 4)).rewards
    assert pid not in rewards
    assert (rewards > 0).all()


def test_workers_are_kept_between_calls_and_end_with_close():
    pool = RewardWorkers(act, processes=1)
    (first,) = pool.score(items("worker")).rewards
    (second,) = pool.score(items("worker")).rewards
    assert first == second
    pool.close()
    assert not alive(int(first))
    (third,) = pool.score(items("worker")).rewards
    assert third != first
    pool.close()


def test_output_of_a_verifier_does_not_disturb_it(workers, capfd):
    np.testing.assert_array_equal(workers.score(items("print 2", "print 3")).rewards, [2, 3])
    assert "disturb" not in capfd.readouterr().out


def test_workers_ignore_the_interrupt_of_the_terminal(workers):
    (pid,) = workers.score(items("worker")).rewards
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(pid), interrupt)
    assert alive(int(pid))
    assert pid in workers.score(items(*["worker"] * 20)).rewards


def test_workers_do_not_load_jax(workers):
    np.testing.assert_array_equal(workers.score(items("jax 1", "jax 1")).rewards, [0, 0])
    probe = "import sys, jaxreset.tasks.workers, jaxreset.tasks.math; print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_their_parent(tmp_path, end):
    """Also in a script without a main guard, which workers must not run again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            from test_workers import RewardWorkers, act, items
            pool = RewardWorkers(act)
            print(int(pool.score(items("worker")).rewards[0]), flush=True)
            {end}
            """
        )
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    (pid,) = map(int, run.stdout.split())
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)
    assert run.stderr == ""


def test_a_worker_that_cannot_start_says_why():
    with (
        RewardWorkers(act, prepare=refuse_to_start) as pool,
        pytest.raises(RuntimeError, match=r"(?s)while starting.*no licence for the verifier"),
    ):
        pool.score(items("ok"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 0}, r"processes=0: expected a positive, finite number"),
        ({"cpu_seconds": -1.0}, r"cpu_seconds=-1.0: expected a positive"),
        ({"cpu_seconds": float("nan")}, r"cpu_seconds=nan: expected a positive"),
        ({"wall_seconds": float("inf")}, r"wall_seconds=inf: expected a positive, finite"),
        ({"memory_bytes": 0}, r"memory_bytes=0: expected a positive"),
        ({"score_one": lambda problem, response: 1.0}, r"score_one=.*lambda.*top level"),
        ({"prepare": lambda: None}, r"prepare=.*lambda.*top level"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardWorkers(**({"score_one": act} | settings))


def test_a_worker_lives_through_what_ctrl_c_sends_to_all(monkeypatch):
    """From its first instruction on: its parent is to finish what it does."""

    class Disturbed(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for number in (signal.SIGINT, signal.SIGTERM):
                self.send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Disturbed)
    with RewardWorkers(act, processes=2) as workers:
        scores = workers.score([(Problem("p", "", ""), f"add {n}") for n in (2, 3, 4)])
    assert scores.rewards.tolist() == [2, 3, 4]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint({signal.SIGINT, signal.SIGTERM})
