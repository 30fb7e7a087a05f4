"""Rewards of a round's rows, verified by all processes, each its share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxreset.parallel import gather, own_share
from jaxreset.tasks.base import Problem, Scores, Task


def score_together(task: Task, items: Sequence[tuple[Problem, str]]) -> Scores:
    """`task.score(items)`, the same in every process; each must call it with the same items."""
    share = own_share(len(items))
    own = task.score(items[share.start : share.stop])
    timeouts = gather([share[i] for i in own.timeouts])
    return Scores(np.asarray(gather(own.rewards.tolist())), tuple(timeouts))
