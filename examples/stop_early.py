"""A callback that ends a run early: called after every step, with its metrics and the experiment.

run: {callbacks: ["stop_early:when_solved"]}
"""

from __future__ import annotations

ENOUGH = 0.95
MOST_STEPS = 3  # without any reward


def when_solved(record, experiment):
    """Ends the run where nearly every response is right, or none is after a few steps."""
    record["solved"] = record.get("reward/correct", record["reward/mean"])
    if record["solved"] >= ENOUGH:
        experiment.stop(f"{record['solved']:.0%} of the responses are right")
    elif record["step"] >= MOST_STEPS and record["solved"] == 0:
        experiment.stop(f"no reward in {MOST_STEPS} steps")
