"""SIGTERM, which clouds and schedulers send shortly before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxreset.errors import PreemptedError
from jaxreset.parallel.processes import any_process


class Preemption:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Called by every process at the same points, where a run may end.

        Raises:
          PreemptedError: in all of them, where any was asked to end.
        """
        if any_process(self.asked):
            raise PreemptedError("ended by SIGTERM; the same command starts again")


@contextmanager
def noticing_preemption() -> Iterator[Preemption]:
    """Inside, SIGTERM is only noticed; a second one ends the process at once.

    Other threads than the main one can't handle signals: there nothing is noticed.
    """
    preemption = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return

    def notice(number: int, frame: Any) -> None:
        preemption.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield preemption
    finally:
        # None: it was not a Python program's, and can't be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
