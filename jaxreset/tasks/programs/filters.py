"""What a program may ask of the kernel: a list of system calls, as a seccomp filter.

Everything else is refused: opening any file or folder, sockets, signals to others, processes (threads are
allowed), looking into other processes, and every name or limit that others could see. A filter can't be
taken off again, holds for all threads, and needs no rights, so it is the same as root, as anybody, and in
a container.
"""

from __future__ import annotations

import platform
import struct
import sys
from collections.abc import Sequence

_EPERM, _ENOSYS = 1, 38
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_…
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_…
# Numbers from here on are asked for first and replaced by older calls where they are missing.
_REPLACEABLE = 424

# (x86_64, aarch64); None: not there.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "pipe": (22, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "getcwd": (79, 17),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "setrlimit": (160, 164),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "getrandom": (318, 278),
    "rseq": (334, 293),
}
# Allowed where the argument of this index is one of these.
_ALLOWED_WITH: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "ioctl": (16, 29, 1, (0x5401, 0x5451)),  # TCGETS: is it a terminal; FIOCLEX
    "fcntl": (
        72,
        25,
        1,
        (0, 1, 2, 3, 4, 1030),
    ),  # copies and flags; no owner, who would get signals
    "prlimit64": (302, 261, 0, (0,)),  # its own limits
}
# Allowed where the argument of this index has this bit.
_ALLOWED_FLAGGED: dict[str, tuple[int, int, int, int]] = {
    "clone": (56, 220, 0, 0x10000),  # CLONE_THREAD: no process
    "newfstatat": (262, 79, 3, 0x1000),  # AT_EMPTY_PATH: how the C library asks about an open file
}

_Instruction = tuple[int, int, int, int]


def syscall_filter(machine: str | None = None) -> bytes:
    """The filter as an array of BPF instructions (`struct sock_filter`), for this machine.

    Raises:
      ValueError: it isn't Linux, or a kind of processor that we have no list for.
    """
    machine = machine or platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise ValueError(
            "the task code runs the programs that a model writes, and only Linux on "
            f"{' or '.join(_ARCHITECTURES)} lets it confine them; this is {sys.platform} on {machine}"
        )
    which = list(_ARCHITECTURES).index(machine)
    allow, refuse = [_return(_ALLOW)], _return(_REFUSE | _EPERM)
    program = [_loaded(4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), _return(_KILL), _loaded(0)]
    for numbers in _ALLOWED.values():
        if (number := numbers[which]) is not None:
            program += _if(_EQUAL, number, allow)
    for *both, argument, values in _ALLOWED_WITH.values():
        checks = [check for value in values for check in _if(_EQUAL, value, allow)]
        program += _if(_EQUAL, both[which], [_argument(argument), *checks, refuse])
    for *both, argument, bit in _ALLOWED_FLAGGED.values():
        checks = _if(_ANY_BIT, bit, allow)
        program += _if(_EQUAL, both[which], [_argument(argument), *checks, refuse])
    program += _if(_AT_LEAST, _REPLACEABLE, [_return(_REFUSE | _ENOSYS)])
    program.append(refuse)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _loaded(offset: int) -> _Instruction:
    """Takes a word of `struct seccomp_data`: the call's number at 0, the architecture at 4."""
    return _LOAD, 0, 0, offset


def _argument(index: int) -> _Instruction:
    """Takes the lower half of an argument; processors here have it first."""
    return _loaded(16 + 8 * index)


def _return(verdict: int) -> _Instruction:
    return _RETURN, 0, 0, verdict


def _if(test: int, value: int, then: Sequence[_Instruction]) -> list[_Instruction]:
    """Goes through `then` where what was taken passes the test, and behind it otherwise."""
    return [(test, 0, len(then), value), *then]
