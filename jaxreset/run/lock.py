"""A run folder is one run's at a time: a lock that the run's process holds, and that ends with it.

It is the kernel's (`flock`), on a file that says who holds it. So a process that was killed holds none,
whatever other process has its number since; and of several that start at once one gets it. On NFS it
holds between machines as well, where the server locks.

Nothing here imports JAX, which takes seconds: who comes second is told so before.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxreset.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "run.lock"
TRIES, PAUSE_SECONDS = 10, 0.02  # one who only looks holds the lock for a moment
TAKEN = {errno.EAGAIN, errno.EACCES}
UNABLE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def refuse_in_use(folder: Path) -> None:
    """Raises `ConfigError` where a run is in the folder; it may be there a moment later all the same."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY)
    except OSError:  # nobody's; what else may be wrong with it shows when it is taken
        return
    try:
        if not _lock(file, fcntl.LOCK_SH):
            raise _in_use(folder, file)
    finally:
        os.close(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, the folder is this process's.

    Raises:
      ConfigError: it is another run's, with who runs it.
      OSError: the folder isn't there, or can't be written.
    """
    file = _take(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # a file that stays locks nothing
            if _is_at(file, folder / NAME):
                # Before the lock is given up: who waits for this file finds that it is none any more.
                os.unlink(folder / NAME)
        os.close(file)


def _take(folder: Path) -> int:
    """The lock's file, open and locked, with our name in it."""
    path, tries = folder / NAME, 0
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(file, fcntl.LOCK_EX):
                if _is_at(file, path):
                    _sign(file)
                    return file
            elif (tries := tries + 1) == TRIES:
                raise _in_use(folder, file)
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        time.sleep(PAUSE_SECONDS)


def _lock(file: int, kind: int) -> bool:
    """Whether the lock is ours now; it is too where the filesystem has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        if error.errno not in UNABLE:
            raise
        if kind == fcntl.LOCK_EX:
            logger.warning(
                "run.dir isn't locked, as its filesystem can't (%s): start no other run in it",
                error.strerror,
            )
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: who held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(file: int) -> None:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    name = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(name).encode(), 0)


def _in_use(folder: Path, file: int) -> ConfigError:
    name = _owner(file)
    who, end = "another process runs in it", "end it"
    if name is not None:
        who = (
            f"process {name['process']} on host {name['host']} has run in it since {name['since']}"
        )
        end = f"end it (kill {name['process']} there)"
    return ConfigError(
        f"run.dir {folder} is in use: {who}. Wait for its end, or {end}, and start the same command "
        "again; or name another run.dir"
    )


def _owner(file: int) -> dict[str, Any] | None:
    """Who signed; it may be about to. None: nobody does."""
    for _ in range(TRIES):
        try:
            name = json.loads(os.pread(file, 4096, 0))
        except ValueError:
            time.sleep(PAUSE_SECONDS)
            continue
        return dict(name)
    return None
