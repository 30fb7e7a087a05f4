"""Errors that are meant for the user: the command line prints their message without a traceback."""

PREEMPTED = 75  # exit code of a run that SIGTERM ended in order: EX_TEMPFAIL, try again


class ConfigError(ValueError):
    """A config that can't be run; the message names field, value, expectation and remedy."""


class RunError(RuntimeError):
    """A run that can't go on; what it saved so far stays, and the message says what to change."""


class PreemptedError(RunError):
    """A run that was asked to end, and has saved itself; the same command goes on."""
