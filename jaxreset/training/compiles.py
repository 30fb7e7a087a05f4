"""Counts the programs that XLA compiles in this process."""

from __future__ import annotations

from typing import Any

import jax

_count = 0


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    global _count
    if event == "/jax/core/compile/backend_compile_duration":
        _count += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles() -> int:
    """Programs compiled (or read from the compilation cache) since this module was imported."""
    return _count
