"""Errors that are meant for the user: the command line prints their message without a traceback."""

# Exit codes of a run that was ended in order, by what ended it: EX_TEMPFAIL, try again; a shell's own.
ENDED_BY = {"SIGTERM": 75, "Ctrl-C": 130}
PREEMPTED, INTERRUPTED = ENDED_BY.values()


class ConfigError(ValueError):
    """A config that can't be run; the message names field, value, expectation and remedy."""


class RunError(RuntimeError):
    """A run that can't go on; what it saved so far stays, and the message says what to change."""


class CallbackError(RunError):
    """A callback that raised; the step that it was called after is finished, and saved."""


class PreemptedError(RunError):
    """A run that was asked to end, and has saved itself; the same command goes on.

    Args:
      by: what asked, of `ENDED_BY`.
      saved: the step from which the same command goes on, if there is one.
    """

    def __init__(self, by: str, saved: int | None = None):
        goes_on = f"step {saved} is saved, the same command goes on from there"
        super().__init__(
            f"ended by {by}; {'the same command starts again' if saved is None else goes_on}"
        )
        self.by, self.code = by, ENDED_BY[by]
