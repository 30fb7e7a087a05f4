"""A run folder is one run's at a time, whoever looks at it, and however its last run ended."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError
from jaxreset.run import folder as run_folder
from jaxreset.run import lock as run_lock
from jaxreset.run.folder import RunFolder
from jaxreset.run.lock import NAME, locked, refuse_in_use

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
HOLDS = """
import sys
from pathlib import Path
from jaxreset.errors import ConfigError
from jaxreset.run.lock import locked
print("ready", flush=True)
sys.stdin.readline()
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print(error, flush=True)
"""


class Holder:
    """A process that takes the folder's lock when it is told to, and holds it until it is told again."""

    def __init__(self, folder):
        command = [sys.executable, "-c", HOLDS, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.hear() == "ready"

    def hear(self):
        return self.process.stdout.readline().strip()

    def tell(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    holders = []

    def make(folder=tmp_path):
        holders.append(Holder(folder))
        return holders[-1]

    yield make
    for holder in holders:
        holder.end()


def refused(folder):
    with pytest.raises(ConfigError) as caught, locked(folder):
        pass
    with pytest.raises(ConfigError) as looked:
        refuse_in_use(folder)
    assert str(looked.value) == str(caught.value)
    return str(caught.value)


def test_a_folder_in_use_is_refused_by_the_name_of_its_process(tmp_path, start):
    refuse_in_use(tmp_path)
    holder = start()
    holder.tell()
    assert holder.hear() == "held"
    message = refused(tmp_path)
    pid = holder.process.pid
    assert f"run.dir {tmp_path} is in use: process {pid} on host {socket.gethostname()}" in message
    assert f"end it (kill {pid} there), and start the same command again" in message
    holder.tell()
    assert holder.process.wait(30) == 0
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in refused(tmp_path)  # from this very process too


def test_a_dead_owners_lock_is_taken_over(tmp_path, start):
    holder = start()
    holder.tell()
    assert holder.hear() == "held"
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    assert json.loads((tmp_path / NAME).read_text())["process"] == holder.process.pid
    refuse_in_use(tmp_path)
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_a_number_that_another_process_has_since_is_no_owner(tmp_path):
    living = {"host": socket.gethostname(), "process": os.getppid(), "since": "long ago"}
    (tmp_path / NAME).write_text(json.dumps(living))
    refuse_in_use(tmp_path)
    with locked(tmp_path):
        pass


def test_an_owner_that_has_not_signed_yet_is_one_all_the_same(tmp_path):
    with locked(tmp_path):
        (tmp_path / NAME).write_text("")
        assert "is in use: another process runs in it" in refused(tmp_path)


def test_of_several_that_start_at_once_one_wins(tmp_path, start):
    holders = [start() for _ in range(6)]
    for holder in holders:
        holder.tell()
    heard = [holder.hear() for holder in holders]
    assert heard.count("held") == 1
    owner = holders[heard.index("held")].process.pid
    assert sum(f"process {owner} on host" in said for said in heard) == 5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_it_is_given_up_however_the_run_ends(tmp_path, error):
    for _ in range(2):
        with pytest.raises(error), locked(tmp_path):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_its_owner_has_removed_is_none(tmp_path, monkeypatch):
    """Between opening and locking: another one may hold the file that has taken its place."""
    flock, calls = fcntl.flock, []

    def removed_first(file, kind):
        calls.append(kind)
        if len(calls) == 1:
            (tmp_path / NAME).unlink()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(tmp_path):
        assert len(calls) == 2
        refused(tmp_path)


def test_who_only_looks_keeps_nobody_out(tmp_path, monkeypatch):
    (tmp_path / NAME).touch()
    looking, pauses = os.open(tmp_path / NAME, os.O_RDONLY), []
    fcntl.flock(looking, fcntl.LOCK_SH)

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            os.close(looking)

    monkeypatch.setattr(run_lock.time, "sleep", pause)
    with locked(tmp_path):
        assert len(pauses) == 2
        refused(tmp_path)


def test_a_filesystem_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def unable(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        refuse_in_use(tmp_path)
    assert caplog.text.count("filesystem can't (No locks available)") == 1


def test_a_second_run_is_refused_before_jax_is_imported(tmp_path):
    arguments = ["jaxreset", "train", str(QUICKSTART), f"run.dir={tmp_path}"]
    code = f"""
import sys
from jaxreset import cli
sys.argv = {arguments}
try:
    cli.main()
except SystemExit as ended:
    print(ended.code, "jax" in sys.modules)
"""
    with locked(tmp_path):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "2 False\n"
    assert f"is in use: process {os.getpid()} on host" in ended.stderr


def test_every_process_of_a_run_is_refused(tmp_path, monkeypatch):
    """Only process 0 locks; the others get its answer."""
    folder = RunFolder(load_config(QUICKSTART, [f"run.dir={tmp_path}/run"]))
    folder.path.mkdir()
    said = []
    monkeypatch.setattr(run_folder, "gather", lambda items: said.append(items) or [*items, None])
    with locked(folder.path), pytest.raises(ConfigError, match="is in use"), folder.locked():
        pass
    monkeypatch.setattr(run_folder, "is_leader", lambda: False)
    monkeypatch.setattr(run_folder, "gather", lambda items: [*said[0], *items])
    with pytest.raises(ConfigError, match=f"is in use: process {os.getpid()}"), folder.locked():
        pass
    assert list(folder.path.iterdir()) == []
