"""Drawing rollouts: `Sampler.sample` from prompts, `Sampler.resume` from snapshots."""

from jaxreset.sampling.rounds import Round, Snapshot, StopReason, Stream
from jaxreset.sampling.sampler import Sampler, Shape, StopRules

__all__ = ["Round", "Sampler", "Shape", "Snapshot", "StopReason", "StopRules", "Stream"]
