"""A reward worker's side of running programs: hands over a program and its input, judges its output."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxreset.tasks.programs.filters import syscall_filter
from jaxreset.tasks.programs.records import ProgramTest
from jaxreset.tasks.programs.verdicts import same_output, same_value

OUTPUT_BYTES = 16 * 2**20
SLOWEST = 4  # seconds for each second of CPU time, on a machine that is busy
_SCRIPT = Path(__file__).with_name("launcher.py")
# Without site packages, compiled files, or a path of its own; UTF-8 whatever the locale.
_PYTHON = (sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8")
# Sets are in the same order each time. The others are what an interpreter may need to find itself.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
_KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME")


class ProgramLimits(NamedTuple):
    """What a program may take: seconds on one test, seconds on all of them, bytes of address space."""

    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int


class Outcome(NamedTuple):
    """How a program ended: its exit status, or the limit that it met (cpu, wall, threads, killed)."""

    status: int | None
    limit: str | None
    output: bytes


_launcher: Launcher | None = None  # this worker's


def start_launcher(limits: ProgramLimits) -> None:
    """What a reward worker does before its first program."""
    global _launcher
    _launcher = Launcher(limits.memory_bytes)


def count_passed(
    limits: ProgramLimits, program: str, cases: Sequence[ProgramTest], function: str = ""
) -> int:
    """How many tests a program passes; once it has met a limit of time it fails the others.

    Args:
      limits: its own.
      program: its text.
      cases: the tests, run one after another.
      function: that it must define; "": it is a whole program.
    """
    assert _launcher is not None, "start_launcher comes first"
    same = same_value if function else same_output
    end = time.monotonic() + limits.wall_seconds
    passed = 0
    with memory_file(program.encode(errors="replace")) as file:
        for case in cases:
            left = min(end - time.monotonic(), SLOWEST * limits.cpu_seconds)
            if left <= 0:
                break
            outcome = _launcher.run(
                file,
                case.given.encode(),
                function=function,
                cpu_seconds=limits.cpu_seconds,
                wall_seconds=left,
            )
            if outcome.limit is not None:
                break
            passed += outcome.status == 0 and same(outcome.output, case.expected)
    return passed


class Launcher:
    """Runs programs of a model, one at a time, each in a confined process of its own; see `launcher`.

    Args:
      memory_bytes: address space that a program may take.

    Raises:
      ValueError: nothing here can confine programs.
      RuntimeError: the same, found out when it was tried.
    """

    def __init__(self, memory_bytes: int):
        self._rules, self._memory = syscall_filter(), memory_bytes
        self._start()
        with memory_file(b"") as program:
            self.run(program, b"", cpu_seconds=10.0, wall_seconds=60.0)

    def run(
        self,
        program: IO[bytes],
        given: bytes,
        *,
        function: str = "",
        cpu_seconds: float,
        wall_seconds: float,
    ) -> Outcome:
        """Runs it once.

        Args:
          program: its text, in a file of memory.
          given: its input.
          function: to be called with the lines of `given`, JSON each; "": it is a whole program.
          cpu_seconds, wall_seconds: that it may take.

        Raises:
          RuntimeError: it could not be run, and that isn't the program's fault.
        """
        request = {"function": function, "cpu": cpu_seconds, "wall": wall_seconds}
        with memory_file(given) as stdin, memory_file(b"") as stdout:
            files = [program.fileno(), stdin.fileno(), stdout.fileno()]
            reply = self._ask(request, files) or self._ask_another(request, files)
            if "error" in reply:
                raise RuntimeError(f"a program can't be run: {reply['error']}")
            size = os.fstat(stdout.fileno()).st_size
            output = os.pread(stdout.fileno(), size, 0)
        return Outcome(reply.get("status"), reply.get("limit"), output)

    def close(self) -> None:
        """Ends it, and the program that it runs."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "channel": theirs.fileno(),
            "parent": os.getpid(),
            "rules": self._rules.hex(),
            "memory": self._memory,
            "output": OUTPUT_BYTES,
        }
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [*_PYTHON, str(_SCRIPT), json.dumps(settings)],
                env=_ENVIRONMENT | kept,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C isn't for it
            )

    def _ask(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any] | None:
        """Its reply; None: it has ended."""
        os.lseek(files[1], 0, os.SEEK_SET)
        try:
            socket.send_fds(self._channel, [json.dumps(request).encode()], files)
            reply = self._channel.recv(65536)
        except ConnectionError:
            return None
        return json.loads(reply) if reply else None

    def _ask_another(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        """Its reply, when the first has been ended from outside, as where memory runs out."""
        self.close()
        ended = self._process.returncode
        self._start()
        os.ftruncate(files[2], 0)
        os.lseek(files[2], 0, os.SEEK_SET)
        reply = self._ask(request, files)
        return reply or {"error": f"its launcher ends, with exit status {ended}"}


def memory_file(content: bytes) -> IO[bytes]:
    """An open file without a name, in memory, at its beginning."""
    file = os.fdopen(os.memfd_create("program"), "w+b")
    file.write(content)
    file.seek(0)
    return file
