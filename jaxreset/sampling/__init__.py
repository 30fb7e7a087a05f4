"""Drawing rollouts: `Sampler.sample` from prompts, `Sampler.resume` from snapshots."""

from jaxreset.sampling.rounds import Round, Shape, Snapshot, StopReason, StopRules, Stream
from jaxreset.sampling.sampler import Sampler

__all__ = ["Round", "Sampler", "Shape", "Snapshot", "StopReason", "StopRules", "Stream"]
