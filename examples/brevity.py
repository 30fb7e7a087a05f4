"""A batched reward: it gets a round's responses at once, as a reward model would.

task: {reward: {correct: task, brief: {function: "brevity:brief", weight: 0.1}}}
"""

from __future__ import annotations

import numpy as np


def brief(problems, responses):
    """From 1 for the shortest of these responses down to 0 for the longest."""
    lengths = np.array([len(text) for text in responses], float)
    spread = max(np.ptp(lengths), 1)
    return 1 - (lengths - lengths.min()) / spread
