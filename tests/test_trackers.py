"""TensorBoard and W&B, as far as they can be had without either: one run, though it goes on."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxreset.config_file import load_config
from jaxreset.reporting import trackers
from jaxreset.reporting.trackers import Trackers

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


class Server:
    """What W&B keeps, and how it takes steps: in ascending order, what belongs to one together."""

    def __init__(self, *, tells_step=True):
        self.runs, self.deleted, self.warnings, self.asked = {}, set(), [], []
        self.tells_step, self.offline = tells_step, False

    def init(self, *, id, resume, project, **settings):
        self.asked.append((id, resume))
        if id in self.deleted:
            raise ConnectionError(f"run {id} was previously created and deleted")
        rows = self.runs.setdefault(id, {})
        return _Run(self, rows, settings)


class _Run:
    def __init__(self, server, rows, settings):
        self.server, self.rows, self.settings = server, rows, settings
        self.next = 0 if server.offline else max(rows, default=-1) + 1
        if server.tells_step:
            self.step = self.next
        self.ended = False

    def log(self, record, step=None):
        assert not self.ended
        if step < self.next:
            self.server.warnings.append(step)
            return
        self.rows.setdefault(step, {}).update(record)
        self.next = step

    def finish(self):
        self.ended = True


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def settings(*overrides):
    return load_config(QUICKSTART, ["run.wandb_project=p", *overrides])


def line(step, **more):
    return {"step": step, "reward/mean": step / 10, "seconds": 1.0, **more}


def session(folder, history, records, *, done=-1, config=None, anew=None):
    """One process of a run."""
    anew = done < 0 if anew is None else anew
    ours = Trackers(config or settings(), folder, history, anew=anew)
    ours.go_on(done)
    for record in records:
        ours.log(record)
    ours.close()


def test_a_run_that_goes_on_is_the_same_run(tmp_path, server):
    session(tmp_path, [], [line(0), line(1), line(2)])
    session(tmp_path, [line(0), line(1), line(2)], [line(3), line(4)], done=2)
    [(name, rows)] = server.runs.items()
    assert server.asked == [(name, "allow")] * 2
    assert rows == {n: line(n) for n in range(5)}
    assert server.warnings == []


@pytest.mark.parametrize("tells_step", [True, False])
def test_steps_that_are_done_again_are_not_sent_again(tmp_path, server, tells_step):
    server.tells_step = tells_step
    first = [line(n) for n in range(6)]
    session(tmp_path, [], first)
    again = [line(n, seconds=2.0) for n in range(3, 9)]
    session(tmp_path, first, again, done=2)
    [rows] = server.runs.values()
    assert server.warnings == []
    assert rows == {n: line(n, seconds=1.0 if n < 6 else 2.0) for n in range(9)}


def test_a_step_that_was_lost_on_the_way_is_sent_again(tmp_path, server):
    """Killed between the run folder and W&B, which knows how far it came."""
    session(tmp_path, [], [line(0), line(1)])
    session(tmp_path, [line(n) for n in range(3)], [line(2), line(3)], done=1)
    [rows] = server.runs.values()
    assert sorted(rows) == [0, 1, 2, 3]


def test_an_evaluation_made_up_for_is_sent(tmp_path, server):
    session(tmp_path, [], [line(0), line(1)])
    late = {"step": 1, "eval/accuracy": 0.5, "seconds": 3.0}
    session(tmp_path, [line(0), line(1)], [late, line(2)], done=1)
    [rows] = server.runs.values()
    assert server.warnings == []
    assert rows[1] == line(1)
    assert rows[2] == {"eval/accuracy": 0.5} | line(2)


def test_a_run_that_was_deleted_makes_room_for_another(tmp_path, server, caplog):
    session(tmp_path, [], [line(0)])
    [old] = server.runs
    server.deleted.add(old)
    with caplog.at_level(logging.WARNING):
        session(tmp_path, [line(0)], [line(1)], done=0)
    assert f"W&B run {old} can't go on (ConnectionError: run {old} was previously" in caplog.text
    [new] = set(server.runs) - {old}
    assert server.runs[new] == {1: line(1)}
    session(tmp_path, [line(0), line(1)], [line(2)], done=1)
    assert server.runs[new] == {1: line(1), 2: line(2)}


def test_where_there_is_no_network_the_id_is_kept(tmp_path, server, monkeypatch, caplog):
    session(tmp_path, [], [line(0)])
    kept = (tmp_path / "wandb_run.json").read_text()

    def unreachable(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(server, "init", unreachable)
    session(tmp_path, [line(0)], [line(1)], done=0)
    assert "run.wandb_project is switched off: ConnectionError: no route to host" in caplog.text
    assert (tmp_path / "wandb_run.json").read_text() == kept


def test_offline_a_run_starts_at_step_0_again(tmp_path, server):
    """With the same id, so that what is synchronised later becomes one run."""
    server.offline = True
    session(tmp_path, [], [line(0), line(1)])
    session(tmp_path, [line(0), line(1)], [line(2)], done=1)
    assert len(server.runs) == 1
    assert server.warnings == []


@pytest.mark.parametrize("what", ["another project", "anew", "damaged"])
def test_what_is_another_run_gets_an_id_of_its_own(tmp_path, server, what):
    session(tmp_path, [], [line(0)])
    if what == "damaged":
        (tmp_path / "wandb_run.json").write_text('{"id"')
    config = settings("run.wandb_project=q") if what == "another project" else None
    session(tmp_path, [], [line(0)], done=0, config=config, anew=what == "anew")
    assert len(server.runs) == 2
    assert json.loads((tmp_path / "wandb_run.json").read_text())["id"] == server.asked[-1][0]


def test_one_process_tracks(tmp_path, server, monkeypatch):
    monkeypatch.setattr(trackers, "is_leader", lambda: False)
    session(tmp_path, [], [line(0)])
    assert server.runs == {}
    assert list(tmp_path.iterdir()) == []


class Events:
    """tensorboardX's writer: what is shown of all that was written, by (name, step)."""

    def __init__(self):
        self.shown, self.made, self.twice = {}, [], []

    def writer(self, folder, purge_step=None):
        self.made.append(purge_step)
        Path(folder).mkdir(exist_ok=True)
        if purge_step is not None:
            self.shown = {key: x for key, x in self.shown.items() if key[1] < purge_step}

        def add_scalar(name, value, step):
            if (name, step) in self.shown:
                self.twice.append((name, step))
            self.shown[name, step] = value

        return SimpleNamespace(add_scalar=add_scalar, close=lambda: None)


@pytest.fixture
def events(monkeypatch):
    made = Events()
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=made.writer))
    return made


def test_tensorboard_hides_what_is_done_again(tmp_path, events):
    config = load_config(QUICKSTART, ["run.tensorboard=true"])
    first = [line(n) for n in range(6)]
    session(tmp_path, [], first, config=config)
    late = {"step": 2, "seconds": 4.0, "eval/accuracy": 0.5}
    again = [late, *(line(n, seconds=2.0) for n in range(3, 8))]
    session(tmp_path, first, again, done=2, config=config)
    assert events.made == [None, 3]
    assert events.twice == []
    assert events.shown["seconds", 2] == 1.0
    assert events.shown["eval/accuracy", 2] == 0.5
    assert [events.shown["seconds", n] for n in range(3, 8)] == [2.0] * 5
    session(tmp_path, [], [line(0)], config=config)  # anew, in a folder that has events
    assert events.made == [None, 3, 0]
    assert {step for _, step in events.shown} == {0}
