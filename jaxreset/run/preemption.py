"""SIGTERM, which clouds send shortly before they take a machine away, and SIGINT, which Ctrl-C sends."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from jaxreset.errors import PreemptedError
from jaxreset.parallel.processes import any_process, gather

logger = logging.getLogger(__name__)

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Preemption:
    """Whether this process was asked to end, and by what."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._at_once = False

    def check(self) -> None:
        """Called by every process at the same points, where a run may end.

        Raises:
          PreemptedError: in all of them, where any was asked to end.
        """
        if any_process(self.asked is not None):
            raise PreemptedError(next(by for by in gather([self.asked]) if by is not None))

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Inside, nothing is computed that could be lost, and it may take minutes (reading, compiling):
        being asked ends it right there. Several processes wait for its end: one must not leave the others.

        Raises:
          PreemptedError: asked to end before.
        """
        self.check()
        self._at_once = jax.process_count() == 1
        try:
            yield
        finally:
            self._at_once = False
        self.check()

    def notice(self, number: int, frame: Any) -> None:
        """Handles a signal, in the main thread; the next one of its kind ends the process at once."""
        self.asked = self.asked or NAMES[signal.Signals(number)]
        signal.signal(number, signal.SIG_DFL)
        if self._at_once:
            raise KeyboardInterrupt  # which all libraries let through


@contextmanager
def noticing_preemption() -> Iterator[Preemption]:
    """Inside, SIGTERM and SIGINT are only noticed; a second one ends the process at once.

    Raises:
      PreemptedError: noticed where nothing is lost by it.

    A signal that is ignored, as in a job in the background, stays so. Other threads than the main one
    can't handle signals: there nothing is noticed.
    """
    preemption = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {n: signal.getsignal(n) for n in NAMES}
    noticed = [n for n in NAMES if before[n] is not signal.SIG_IGN]
    with _watching(noticed):
        for number in noticed:
            signal.signal(number, preemption.notice)
        try:
            yield preemption
        except KeyboardInterrupt:
            if preemption.asked is None:
                raise
            raise PreemptedError(preemption.asked) from None
        finally:
            for number in noticed:
                # None: it was not a Python program's, and can't be put back.
                handler = before[number]
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _watching(numbers: list[signal.Signals]) -> Iterator[None]:
    """Inside, a thread says at once that a signal came, and ends the process at the second one.

    Python's handlers wait for the main thread, which may be inside a program of minutes; the number of a
    signal is written to a pipe as it comes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, numbers), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # which ends the thread
        watch.join()
        os.close(reader)


def _watch(reader: int, numbers: list[signal.Signals]) -> None:
    seen = set()
    while came := os.read(reader, 1):
        if (number := came[0]) not in numbers:
            continue
        if number in seen:
            os._exit(128 + number)
        seen.add(number)
        logger.warning(
            "%s: the run ends as soon as nothing is lost by it; a second one ends it at once",
            NAMES[signal.Signals(number)],
        )
