"""Errors that are meant for the user: the command line prints their message without a traceback."""


class ConfigError(ValueError):
    """A config that can't be run; the message names field, value, expectation and remedy."""


class RunError(RuntimeError):
    """A run that can't go on; what it saved so far stays, and the message says what to change."""
