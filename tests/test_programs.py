"""Running programs: what they may do, what hostile ones can't, and what is left of them: nothing."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from jaxreset.tasks.base import Problem
from jaxreset.tasks.code import CodeTask
from jaxreset.tasks.programs import filters, running
from jaxreset.tasks.programs.records import ProgramTest, packed
from jaxreset.tasks.programs.running import Launcher, Outcome, memory_file

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux alone")


BUSY_THREADS = """
import threading
for _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()
"""
DEAF = """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""
THREAD_BOMB = """
import threading, time
threading.stack_size(2**15)
def bomb():
    while True:
        try: threading.Thread(target=bomb).start()
        except RuntimeError: time.sleep(0.01)
bomb()
"""


@pytest.fixture(scope="module")
def launcher():
    one = Launcher(2**30)
    yield one
    one.close()


@pytest.fixture
def run(launcher):
    """A program's outcome; its text may be indented."""

    def run(program: str, given: str = "", function: str = "", cpu=1.0, wall=5.0) -> Outcome:
        with memory_file(textwrap.dedent(program).encode()) as file:
            return launcher.run(
                file, given.encode(), function=function, cpu_seconds=cpu, wall_seconds=wall
            )

    return run


# What programs may do


@pytest.mark.parametrize(
    ("program", "given", "printed"),
    [
        ("print(sum(map(int, input().split())))", "1 2 39\n", "42\n"),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd", "ba\ndc\n"),
        ("print(len(open(0).read()))", "x" * 300_000, "300000\n"),
        ("import os\nprint(len(os.read(0, os.fstat(0).st_size)))", "x" * 999, "999\n"),
        ("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())", "été", "été"),
        ("if __name__ == '__main__': print('main')", "", "main\n"),
        ("import sys\nprint('early')\nsys.exit(3)\nprint('late')", "", "early\n"),
        ("import os\nprint('flushed', flush=True)\nos._exit(0)", "", "flushed\n"),
        ("import sys, io\nsys.stdout = io.StringIO()\nprint(1)\nsys.__stdout__.write('2')", "", "2"),
        (
            "import atexit, io, os, sys\nsys.stdout = held = io.StringIO()\n"
            "atexit.register(lambda: os.write(1, held.getvalue().encode()))\nprint('at the end')",
            "",
            "at the end\n",
        ),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**28)\n"
            "def deep(n): return n and 1 + deep(n - 1)\n"
            "threading.Thread(target=lambda: print(deep(60_000))).start()",
            "",
            "60000\n",
        ),
        (
            "import threading\n"
            "def last(): print('last')\n"
            "def first(): threading.Timer(0.05, last).start()\n"
            "threading.Thread(target=first).start()",
            "",
            "last\n",
        ),
        ("@functools.cache\ndef f(n): return n and 1 + f(n - 1)\nprint(f(400))", "", "400\n"),
        ("import dataclasses\n@dataclasses.dataclass\nclass P: x: int\nprint(P(1))", "", "P(x=1)\n"),
        ("print(gcd(12, 18), deque([1]), math.pi > 3, heapq)", "", None),
        ("import datetime\nprint(datetime.datetime.strptime('2024', '%Y').year)", "", "2024\n"),
        ("a: List[int] = [1]\nprint(pow(2, 10, 1000), Counter('aab')['a'])", "", "24 2\n"),
    ],
)  # fmt: skip
def test_what_a_program_prints(run, program, given, printed):
    outcome = run(program, given)
    assert outcome.status == 0, outcome
    assert printed is None or outcome.output.decode() == printed


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("class Solution:\n def add(self, a: List[int], b): return [*a, b]", "[1, 2, 3]"),
        ("def add(a, b):\n    print('ignored')\n    return (*a, b)", "[1, 2, 3]"),
        ("def add(a, b): return {'n': len(a), 'x': b / 2}", '{"n": 2, "x": 1.5}'),
        ("def add(a, b): return True\nif __name__ == '__main__': add = None", "true"),
        (f"{BUSY_THREADS}\ndef add(a, b): return 5", "5"),
    ],
)  # fmt: skip
def test_what_a_function_returns(run, program, result):
    outcome = run(program, "[1,2]\n3\n", "add")
    assert (outcome.status, outcome.output.decode()) == (0, result)


@pytest.mark.parametrize(
    "program",
    [
        "",
        "def other(a, b): return 1",
        "def add(a): return 1",
        "def add(a, b): return {1, 2}",
        "def add(a, b): raise ValueError",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "class Solution:\n    pass",
    ],
)
def test_a_function_that_gives_nothing(run, program):
    assert run(program, "[1,2]\n3\n", "add").output == b""


def test_a_name_that_is_at_hand_is_not_the_programs_own(run):
    """An empty program doesn't solve "write gcd"."""
    assert run("", "12\n18", "gcd").status != 0
    assert run("from math import gcd", "12\n18", "gcd").output == b"6"


@pytest.mark.parametrize(
    "program",
    [
        *("1 / 0", "def", "x = " + "(" * 50_000, "\0", "import numpy", "import xml.dom", "exit("),
        "import sys\nsys.stdout.close()\nprint(1)",
    ],
)
def test_programs_that_fail(run, program):
    outcome = run(program)
    assert outcome.status not in (0, None)
    assert outcome.output == b""


def test_a_verdict_can_be_repeated(run):
    """Chance and the order of sets are the same each time."""
    program = "import random\nprint(random.random(), hash('a'), {'a', 'b', 'c', 'd'})"
    first = run(program).output
    assert first
    assert run(program).output == first


# What they can't


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd')",
        "open('/proc/self/maps')",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "open('/dev/shm/left', 'w')",
        "open('left', 'w')",
        "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
        "os.listdir('.')",
        "os.stat('/etc')",
        "os.mkdir('/tmp/left')",
        "os.unlink('/etc/passwd')",
        "os.chdir('/tmp')",
        "os.chmod(0, 0o777)",
        "os.memfd_create('left')",
        "os.mkfifo('/tmp/left')",
        "os.fork()",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        "os.execv('/bin/sh', ['sh'])",
        "subprocess.run(['true'])",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getpid(), 9)",
        "os.killpg(0, 9)",
        "os.setsid()",
        "os.setuid(0)",
        "os.nice(-1)",
        "os.sched_setaffinity(0, {0})",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair()",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(os.pipe()[0], 1031, 2**20)",
        "fcntl.ioctl(0, 0x5412, b'x')",
    ],
)
def test_what_is_refused(run, attempt):
    imports = "import os, sys, socket, subprocess, resource, fcntl"
    outcome = run(f"{imports}\ntry:\n    {attempt}\nexcept (OSError, ValueError): print('refused')")
    assert outcome == Outcome(0, None, b"refused\n")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ptrace", "0, 0, 0, 0"),
        ("process_vm_readv", "os.getppid(), 0, 0, 0, 0, 0"),
        ("unshare", "0x10000000"),
        ("mount", "0, 0, 0, 0, 0"),
        ("prctl", "22, 0, 0, 0, 0"),
        ("shmget", "0, 4096, 0o1600"),
        ("msgget", "0, 0o1600"),
        ("inotify_init", ""),
        ("syscall", "425, 1, 0"),  # io_uring_setup
        ("syscall", "435, 0, 0"),  # clone3
        ("syscall", "424, 0, 9, 0, 0"),  # pidfd_send_signal
    ],
)
def test_what_is_refused_to_c(run, name, arguments):
    program = f"""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.{name}({arguments}), ctypes.get_errno() in (1, 38))
    """
    assert run(program) == Outcome(0, None, b"-1 True\n")


def test_a_program_has_no_open_file_but_its_own(run):
    program = """
        import fcntl, os
        def is_open(fd):
            try:
                return fcntl.fcntl(fd, fcntl.F_GETFD) >= 0
            except OSError:
                return False
        def open_files(*_): return [fd for fd in range(4096) if is_open(fd)]
        if __name__ == "__main__": print(open_files(), dict(os.environ), os.getcwd())
    """
    assert run(program).output == b"[0, 1, 2] {} /\n"
    assert run(program, "1", "open_files").output.count(b",") == 3  # and where its result goes


def test_it_is_nobody_where_we_are_root(run):
    expected = 65534 if os.getuid() == 0 else os.getuid()
    assert run("import os\nprint(os.getuid(), os.geteuid())").output == b"%d %d\n" % (
        expected,
        expected,
    )


@pytest.mark.parametrize(
    ("program", "limit", "seconds"),
    [
        ("while True: pass", "cpu", 0.3),
        ("print(10 ** 10 ** 10)", "cpu", 0.3),
        (DEAF, "cpu", 0.3),
        (BUSY_THREADS, "cpu", 0.3),
        ("import time\ntime.sleep(60)", "wall", 1.0),
        ("import threading\nthreading.Event().wait()", "wall", 1.0),
        ("import signal\nsignal.pause()", "wall", 1.0),
        (THREAD_BOMB, "threads", 5.0),
    ],
    ids=["loop", "one-call", "deaf", "busy-threads", "sleep", "deadlock", "pause", "thread-bomb"],
)  # fmt: skip
def test_limits(run, program, limit, seconds):
    start = time.perf_counter()
    outcome = run(
        program, cpu=0.3 if limit == "cpu" else 5.0, wall=60.0 if limit == "cpu" else seconds
    )
    assert outcome == Outcome(None, limit, b"")
    if limit == "wall":
        assert seconds <= time.perf_counter() - start


def test_the_kernel_counts_cpu_time_too(monkeypatch):
    """Should the launcher look away: here it looks every ten minutes."""
    script = Path(running._SCRIPT).read_text().replace("TICK = 0.02", "TICK = 600")
    monkeypatch.setattr(running, "_PYTHON", (*running._PYTHON, "-c"))
    monkeypatch.setattr(running, "_SCRIPT", script)
    one = Launcher(2**30)
    try:
        with memory_file(b"while True: pass") as program:
            outcome = one.run(program, b"", cpu_seconds=0.1, wall_seconds=600)
    finally:
        one.close()
    assert outcome == Outcome(None, "killed", b"")


@pytest.mark.parametrize(
    ("program", "bytes_written"),
    [
        ("bytearray(50 * 2**30)", 0),
        ("x = []\nwhile True: x.append(bytes(2**24))", 0),
        ("while True: print('x' * 4095)", running.OUTPUT_BYTES),
        ("import os\nos.ftruncate(1, 2**40)", 0),
        ("import os\nos.lseek(1, 2**40, 0)\nos.write(1, b'x')", 0),
        ("import os\nos.write(0, bytes(2 * 16 * 2**20))\nos.write(0, b'x')", 0),
        ("import ctypes\nctypes.string_at(0)", 0),
        ("import os\nos.abort()", 0),
        ("sys.setrecursionlimit(2**31 - 1)\nf = lambda: sorted([0], key=lambda _: f())\nf()", 0),
    ],
)
def test_memory_and_output_are_limited(run, program, bytes_written):
    outcome = run(program, cpu=5.0, wall=30.0)
    assert outcome.status not in (0, None), outcome.limit
    assert len(outcome.output) == bytes_written


def test_outputs_never_pass_through_the_launcher():
    """A program of the same problem would inherit what an earlier one has found out."""
    one = Launcher(2**30)
    try:
        with memory_file(b"print(''.join(chr(ord(c) + 1) for c in input()) * 2)") as program:
            outcome = one.run(program, b"onsuhlrbrsdmedqhls", cpu_seconds=5, wall_seconds=20)
        assert outcome.output == b"potvimscstenferimt" * 2 + b"\n"
        memory = memory_of(one._process.pid)
    finally:
        one.close()
    assert b"cpu" in memory  # it is the launcher's, and holds the request
    for text in (b"potvimsc", b"onsuhlrb", b"ord(c) + 1"):
        assert text not in memory


def memory_of(pid: int) -> bytes:
    parts = []
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end, kind = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
            if kind.startswith("rw"):
                memory.seek(int(start, 16))
                parts.append(memory.read(int(end, 16) - int(start, 16)))
    return b"".join(parts)


# The launcher


def test_a_launcher_that_was_ended_is_replaced(run, launcher):
    assert run("print(1)").output == b"1\n"
    launcher._process.kill()
    launcher._process.wait()
    assert run("print(2)").output == b"2\n"


def test_it_ends_with_the_process_that_started_it_and_so_does_its_program():
    script = """
        import sys, threading
        from jaxreset.tasks.programs.running import Launcher, memory_file
        one = Launcher(2**30)
        print(one._process.pid, flush=True)
        with memory_file(b"import time; time.sleep(600)") as program:
            one.run(program, b"", cpu_seconds=600, wall_seconds=600)
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=ROOT
    )
    own = int(worker.stdout.readline())
    wait_until(lambda: len(tree_below(own)) == 1)
    (program,) = tree_below(own)
    worker.kill()
    worker.wait()
    worker.stdout.close()
    wait_until(lambda: not alive(own) and not alive(program))


def test_nothing_runs_where_the_kernel_does_not_take_the_filter(monkeypatch):
    monkeypatch.setattr(running, "syscall_filter", lambda: struct.pack("=HBBI", 0, 0, 0, 0))
    with pytest.raises(RuntimeError, match=r"can't be run: OSError: .*seccomp"):
        Launcher(2**30)


def test_without_being_root():
    """In a user namespace where this process is nobody, and has files as before."""
    script = """
        import ctypes, os, sys
        if ctypes.CDLL(None).unshare(0x10000000) != 0:  # CLONE_NEWUSER
            sys.exit(77)
        from jaxreset.tasks.programs.running import Launcher, memory_file
        one = Launcher(2**30)
        text = b"import os, socket\\nprint(os.getuid(), end=' ', flush=True)\\nsocket.socket()"
        with memory_file(text) as program:
            print(os.getuid(), one.run(program, b"", cpu_seconds=5, wall_seconds=20))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode == 77:
        pytest.skip("no user namespaces here")
    uid = re.match(r"(\d+) ", done.stdout)[1]
    assert uid != "0", done.stderr
    assert done.stdout == f"{uid} Outcome(status=1, limit=None, output=b'{uid} ')\n"


# The filter


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def verdict(rules: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would make of a system call: its BPF machine, as far as the filter uses it."""
    arguments += (0,) * (6 - len(arguments))
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments)
    at, taken = 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", rules, 8 * at)
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (taken,) = struct.unpack_from("=I", data, value)
            continue
        passed = {0x15: taken == value, 0x35: taken >= value, 0x45: taken & value != 0}[code]
        at += yes if passed else no


@pytest.mark.parametrize(("machine", "which"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_allows_what_is_listed_and_nothing_else(machine, which):
    rules = filters.syscall_filter(machine)
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    listed = {numbers[which] for numbers in filters._ALLOWED.values()} - {None}
    with_argument = {row[which]: (row[2], set(row[3])) for row in filters._ALLOWED_WITH.values()}
    flagged = {row[which]: (row[2], row[3]) for row in filters._ALLOWED_FLAGGED.values()}
    for number in range(600):
        found = verdict(rules, architecture, number)
        assert verdict(rules, 0x40000003, number) == KILL  # 32-bit calls have other numbers
        if number in listed:
            assert found == ALLOW
        elif number in with_argument:
            index, values = with_argument[number]
            for value in range(2000):
                arguments = [7] * index + [value]
                expected = ALLOW if value in values else EPERM
                if value < 0x5401:
                    assert verdict(rules, architecture, number, *arguments) == expected
        elif number in flagged:
            index, bit = flagged[number]
            assert verdict(rules, architecture, number, *[~bit & 0xFFFFFFFF] * 6) == EPERM
            assert verdict(rules, architecture, number, *[0] * index, bit) == ALLOW
        else:
            assert found == (ENOSYS if number >= 424 else EPERM), number
    assert verdict(rules, architecture, 0x40000000) == ENOSYS  # x32's read


@pytest.mark.parametrize(
    ("header", "which", "pattern"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0, r"#define __NR_(\w+)\s+(\d+)"),
        ("/usr/include/asm-generic/unistd.h", 1, r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_the_numbers_are_the_kernels(header, which, pattern):
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    numbers = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    numbers.setdefault("newfstatat", numbers.get("fstatat"))
    tables = filters._ALLOWED | filters._ALLOWED_WITH | filters._ALLOWED_FLAGGED
    assert {n: row[which] for n, row in tables.items()} == {n: numbers.get(n) for n in tables}


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_where_nothing_confines_programs_the_task_is_refused(monkeypatch, platform, machine):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(filters.platform, "machine", lambda: machine)
    with pytest.raises(
        ValueError, match=f"only Linux on x86_64 or aarch64.*{platform} on {machine}"
    ):
        CodeTask()


# A batch


SUM = Problem(
    "sum",
    "?",
    "",
    extra={
        "tests": packed([ProgramTest("1 2\n", "3\n"), ProgramTest("-5 5", "0")]),
        "function": "",
    },
)
BIGGEST = Problem(
    "biggest",
    "?",
    "",
    extra={
        "tests": packed([ProgramTest("[3, 9, 4]", "9"), ProgramTest("[0.5]", "0.5")]),
        "function": "biggest",
    },
)
RIGHT = "print(sum(map(int, input().split())))"
HONEST = [
    (SUM, RIGHT, 1.0),
    (SUM, "a, b = map(int, input().split())\nprint(a + b if a > 0 else 'no')", 0.5),
    (SUM, "print(1", 0.0),
    (BIGGEST, "class Solution:\n    def biggest(self, numbers): return max(numbers)", 1.0),
    (BIGGEST, "def biggest(numbers): return max(numbers[1:] or [0])", 0.5),
    (SUM, None, 0.0),
]
HOSTILE = {
    "loop": "while True: pass",
    "sleep": "import time\nwhile True: time.sleep(100)",
    "fork-bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "allocate": "x = bytearray(50 * 2**30)\n" + RIGHT,
    "write": "open('{folder}/left', 'w').write('x')\n" + RIGHT,
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 22))\n" + RIGHT,
    "print": "while True:\n    try: print('3' * 1000)\n    except OSError: pass",
    "exit": "import os\nos._exit(0)",
    "crash": RIGHT + "\nimport ctypes\nctypes.string_at(0)",
    "leave": "import sys\nsys.exit(0)",
    "read": "import glob\nfor f in ['{folder}/answers', *glob.glob('/proc/*/mem')]: print(open(f).read())",
    "cheat": (
        "import builtins, sys, os\n"
        "class Equal(str):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = str.__hash__\n"
        "builtins.print = builtins.str = Equal\n"
        "class Out: flush = lambda self: Equal()\n"
        "sys.stdout = sys.__stdout__ = Out()\n"
        "sys.modules['json'] = sys.modules['__main__'] = None\n"
        "import atexit\natexit.register(os._exit, 0)"
    ),
    "murder": "import os\nfor p in (os.getppid(), 0, -1): os.kill(p, 9)\n" + RIGHT,
}  # fmt: skip


def test_a_batch_with_hostile_programs(tmp_path):
    """256 responses, 5% hostile: all others are judged right, in time, and nothing is left."""
    tmp_path.chmod(0o777)
    (tmp_path / "answers").write_text("3\n")
    items, expected = [], []
    for n in range(256):
        problem, program, reward = HONEST[n % len(HONEST)]
        items.append((problem, response(program)))
        expected.append(reward)
    for place, program in zip(range(7, 256, 19), HOSTILE.values(), strict=False):
        items[place] = (SUM, response(program.format(folder=tmp_path)))
        expected[place] = 0.0
    assert len(HOSTILE) == 13

    deadline = 10.0
    before = tree_below(os.getpid())
    task = CodeTask(processes=4, cpu_seconds=0.5, wall_seconds=deadline)
    try:
        np.testing.assert_array_equal(
            task.score(items[:4]).rewards, expected[:4]
        )  # all have started
        below = tree_below(os.getpid()) - before
        start = time.perf_counter()
        scores = task.score(items)
        seconds = time.perf_counter() - start
        workers = [worker.process.pid for worker in task._workers._workers]
        launchers = [pid for worker in workers for pid in tree_below(worker)]
        assert not [pid for pid in launchers if tree_below(pid)], "a program has survived its test"
        below |= tree_below(os.getpid()) - before
    finally:
        task.close()
    np.testing.assert_array_equal(scores.rewards, expected)
    assert scores.errors == ()
    assert scores.timeouts == ()
    assert len(workers) == len(launchers) == 4
    assert below >= {*workers, *launchers}
    assert seconds < 2 * deadline
    wait_until(lambda: not any(map(alive, below)))
    assert [file.name for file in tmp_path.iterdir()] == ["answers"]


def response(program: str | None) -> str:
    return (
        "No idea." if program is None else f"So:</thought>\n```python\n{program}\n```\n</thought>"
    )


def tree_below(pid: int) -> set[int]:
    """All processes that a process started, directly or not, those that have ended left out."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, order = set(), [pid]
    for one in order:  # grows while we walk it
        found |= set(children.get(one, []))
        order += children.get(one, [])
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
