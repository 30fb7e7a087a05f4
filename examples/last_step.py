"""A reset rule: where to go back to.

reset: {rule: "last_step:last_step"}
"""

from __future__ import annotations


def last_step(failures):
    """Before the last step: most of the attempt is kept."""
    return [len(failure.steps) for failure in failures]
