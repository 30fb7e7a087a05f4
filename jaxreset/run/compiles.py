"""The programs that XLA compiles: how many in this process, and where they are kept for the next."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

LARGE_PROCESS = 2 * 2**30  # bytes, from which memory goes back to the system between phases
KEPT_SECONDS = 0.2  # of compiling, from which a program is kept

_count = 0


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    global _count
    if event == "/jax/core/compile/backend_compile_duration":
        _count += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles() -> int:
    """Programs compiled (or read from the compilation cache) since this module was imported."""
    return _count


def trim(least: int = 0) -> None:
    """Gives back to the system what was freed, where the process holds `least` bytes.

    Linux's C library keeps it, and what one phase has freed is of no use to the next one's larger arrays.
    """
    resident = Path("/proc/self/statm")
    if not resident.is_file():
        return
    pages = int(resident.read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") >= least:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def kept_programs(path: Path | None) -> Iterator[None]:
    """Inside, compiled programs are written to the folder `path`, and read from it.

    None, or a folder that JAX was given otherwise (JAX_COMPILATION_CACHE_DIR), changes nothing.
    """
    if path is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    settings = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": KEPT_SECONDS,
    }
    before = {name: jax.config.values[name] for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # it looks at the settings once
