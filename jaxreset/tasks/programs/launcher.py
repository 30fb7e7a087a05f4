"""Runs programs that a model wrote, each in a confined process; `running` starts it as a script.

It holds nothing that a program may not see: programs, their input and their output are files in memory
that are handed through. For each test it forks a process, which gives all rights away, and only then
compiles the program, for even that can crash. What programs may import is loaded before, as they can't open
a file.
"""

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import math
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import types
from typing import Any, NamedTuple

# What programs may import of the standard library, besides what is imported above.
MODULES = (
    *(
        "abc",
        "argparse",
        "array",
        "ast",
        "base64",
        "binascii",
        "bisect",
        "calendar",
        "cmath",
        "codecs",
    ),
    *(
        "collections.abc",
        "colorsys",
        "concurrent.futures.thread",
        "contextvars",
        "copy",
        "copyreg",
        "csv",
    ),
    *("dataclasses", "datetime", "decimal", "difflib", "enum", "errno", "fileinput", "fractions"),
    *(
        "functools",
        "graphlib",
        "hashlib",
        "heapq",
        "hmac",
        "html",
        "inspect",
        "ipaddress",
        "itertools",
    ),
    *(
        "keyword",
        "linecache",
        "locale",
        "logging",
        "numbers",
        "operator",
        "optparse",
        "pathlib",
        "pickle",
    ),
    *(
        "platform",
        "pprint",
        "queue",
        "re",
        "reprlib",
        "sched",
        "secrets",
        "select",
        "selectors",
        "shutil",
    ),
    *("stat", "statistics", "string", "struct", "subprocess", "tempfile", "textwrap", "timeit"),
    *("tokenize", "traceback", "typing", "unicodedata", "uuid", "warnings", "weakref", "zlib"),
    *("_strptime", "encodings.ascii", "encodings.latin_1", "encodings.utf_8_sig"),
)
# What they need not import, as on the sites that such problems come from: all names of these, and these.
STARRED = ("typing", "collections", "heapq", "bisect", "itertools", "functools", "math", "operator")
NAMED = (
    *("bisect", "collections", "copy", "datetime", "functools", "heapq", "io", "itertools", "json"),
    *("math", "operator", "os", "random", "re", "statistics", "string", "sys", "time"),
)

RECURSION = 50_000  # calls inside one another; fits into the stack
STACK_BYTES = 128 * 2**20
OPEN_FILES = 64
THREADS = 64
TICK = 0.02  # seconds between two looks at a program that runs
NOBODY = 65534

DIE_WITH_PARENT, NO_NEW_RIGHTS, SECCOMP, FILTER = 1, 38, 22, 2  # prctl's
CAPABILITIES = 0x20080522  # the version of capset's arguments

libc = ctypes.CDLL(None, use_errno=True)


class Settings(NamedTuple):
    """The same for all programs: the system calls that they may use, bytes of memory and of output."""

    rules: bytes
    memory: int
    output: int
    names: dict[str, Any]


def main() -> None:
    """Serves requests until the other end closes."""
    given = json.loads(sys.argv[1])
    channel = socket.socket(fileno=given["channel"])
    names = load_modules()
    give_up_rights()
    die_with(given["parent"])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    settings = Settings(bytes.fromhex(given["rules"]), given["memory"], given["output"], names)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    while True:
        request, files, _, _ = socket.recv_fds(channel, 4096, 3)
        if not request:
            return
        try:
            reply = run(settings, json.loads(request), files, channel)
        except OSError as error:
            reply = {"error": str(error)}
        for file in files:
            os.close(file)
        channel.send(json.dumps(reply).encode())


def load_modules() -> dict[str, Any]:
    """Loads what programs may import; returns the names that they need not import."""
    for name in MODULES:
        importlib.import_module(name)
    names: dict[str, Any] = {}
    for module in map(importlib.import_module, STARRED):
        public = getattr(module, "__all__", None) or [n for n in dir(module) if n[0] != "_"]
        names |= {name: getattr(module, name) for name in public if not hasattr(builtins, name)}
    names |= {name: importlib.import_module(name) for name in NAMED}
    # Whatever else they import fails by its name, not with an error about files.
    del sys.meta_path[2:]
    sys.path.clear()
    os.environ.clear()
    os.chdir("/")
    return names


def give_up_rights() -> None:
    """Becomes nobody where it is root, and drops all capabilities."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory runs out, this is what the kernel ends
    if os.getuid() == 0:
        # A container may have no other user, or not let root change: the filter holds all the same.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    checked("capset", libc.capset(header, nothing))


def die_with(parent: int) -> None:
    """Ends this process when its parent ends."""
    checked("prctl", libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def checked(call: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def run(
    settings: Settings, request: dict[str, Any], files: list[int], channel: socket.socket
) -> dict[str, Any]:
    """How a program ended: its `status`, the `limit` that it met, or an `error` that isn't its own.

    Args:
      settings: of all programs.
      request: `function` ("": it is a whole program), `cpu` and `wall` seconds.
      files: the program, its input and its output.
      channel: that a program must not have.
    """
    report, reporting = os.pipe()
    launcher = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with(launcher)
            program = os.pread(files[0], os.fstat(files[0]).st_size, 0).decode()
            os.dup2(files[1], 0)
            os.dup2(1, 2)  # the launcher's output is nowhere
            # What is printed is the output, or, of a function, nothing.
            output = files[2] if request["function"] else os.dup2(files[2], 1)
            for fd in {channel.fileno(), report, *files} - {output}:
                os.close(fd)
            prepare_interpreter()
            confine(settings, request["cpu"])
        except BaseException as error:
            os.write(reporting, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os.close(reporting)
        status = 1
        with contextlib.suppress(BaseException):
            status = run_program(program, request["function"], settings.names, output)
        os._exit(status)
    os.close(reporting)
    reply = supervise(child, request["cpu"], request["wall"])
    with open(report, "rb") as pipe:
        failure = pipe.read()
    return {"error": failure.decode(errors="replace")} if failure else reply


def prepare_interpreter() -> None:
    """Streams, signals and chance as in an interpreter that has just started."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        raw = open(fd, "wb" if fd else "rb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="replace")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv[:] = ["program.py"]
    sys.setrecursionlimit(RECURSION)
    random.seed(0)  # so that a verdict can be repeated


def confine(settings: Settings, cpu_seconds: float) -> None:
    """Takes from this process, for good, all that a program must not have."""
    limits = {
        resource.RLIMIT_AS: settings.memory,
        resource.RLIMIT_CPU: math.ceil(cpu_seconds + 0.5),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: settings.output,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_STACK: STACK_BYTES,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    rules = ctypes.create_string_buffer(settings.rules, len(settings.rules))
    program = SocketFilter(len(rules) // 8, ctypes.addressof(rules))
    checked("prctl", libc.prctl(NO_NEW_RIGHTS, 1, 0, 0, 0))
    checked("seccomp", libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0))


class SocketFilter(ctypes.Structure):
    """The kernel's `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def run_program(text: str, function: str, names: dict[str, Any], output: int) -> int:
    """Runs it here; returns the exit status. A function gets JSON, a line each, and returns JSON."""
    arguments = [json.loads(line) for line in sys.stdin if line.strip()] if function else []
    # A whole program is the main one; behind a function such a part must not run.
    module = types.ModuleType("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    space = vars(module)
    # Behind the program's own names, so that it can't be taken to define them.
    space["__builtins__"] = vars(builtins) | names
    with contextlib.suppress(SystemExit):
        exec(compile(text, "program.py", "exec", dont_inherit=True), space)
    if function:
        place = space["Solution"]() if "Solution" in space else module
        result = json.dumps(getattr(place, function)(*arguments)).encode()
        while result:
            result = result[os.write(output, result) :]
        return 0
    end_interpreter()
    return 0


def end_interpreter() -> None:
    """What an interpreter does at its end: threads come to theirs, and what waits to be printed is."""
    own = threading.current_thread()
    while left := [t for t in threading.enumerate() if t is not own and not t.daemon]:
        left[0].join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def supervise(child: int, cpu_seconds: float, wall_seconds: float) -> dict[str, Any]:
    """Waits until it has ended, or ends it where it takes too much."""
    end = time.monotonic() + wall_seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            exitcode = os.waitstatus_to_exitcode(status)
            killed = exitcode == -signal.SIGKILL  # by the kernel, which counts CPU time too
            return {"limit": "killed"} if killed else {"status": exitcode}
        limit = ""
        if used_cpu(child) > cpu_seconds:
            limit = "cpu"
        elif time.monotonic() > end:
            limit = "wall"
        elif threads_of(child) > THREADS:
            limit = "threads"
        if limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"limit": limit}
        signal.sigtimedwait({signal.SIGCHLD}, TICK)


def used_cpu(process: int) -> float:
    """Seconds, of all its threads."""
    with contextlib.suppress(OSError):  # it ended just now
        return time.clock_gettime(~process << 3 | 2)  # CPUCLOCK_SCHED of a process
    return 0.0


def threads_of(process: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[17])
    return 0


if __name__ == "__main__":
    main()
