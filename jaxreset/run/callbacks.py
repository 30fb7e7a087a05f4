"""Callbacks: functions of a step's record and the experiment, called after every step.

    def stop_when_solved(record, experiment):
        if record.get("eval/accuracy", 0) > 0.9:
            experiment.stop("solved")

What one adds to the record is logged. In a job of several processes all call it; process 0's word counts
on whether the run ends.
"""

from __future__ import annotations

from typing import Any

from jaxreset import extensions
from jaxreset.errors import CallbackError, RunError
from jaxreset.parallel.processes import gather
from jaxreset.run.experiment import Experiment


def call_back(experiment: Experiment, record: dict[str, Any]) -> None:
    """Calls all callbacks; where one ended the run, the record says so.

    Raises:
      CallbackError: a callback raised; it is named.
    """
    for callback in experiment.callbacks:
        try:
            callback(record, experiment)
        except RunError:  # it used the experiment, which has its own word on what went wrong
            raise
        except Exception as error:
            raise CallbackError(
                f"the callback {extensions.path_of(callback)} raised {type(error).__name__} after step "
                f"{record['step']}: {error}. Mend it, and start the same command again"
            ) from error
    if experiment.callbacks:
        experiment.stopped = gather([experiment.stopped])[0]
    if experiment.stopped is not None:
        record["stopped"] = experiment.stopped
