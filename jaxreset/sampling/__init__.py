"""Drawing rollouts: `Sampler.sample` from prompts, `Sampler.resume` from snapshots."""

from jaxreset.sampling.rounds import Round, Shape, Snapshot, StopReason, Stream
from jaxreset.sampling.sampler import Sampler, StopRules

__all__ = ["Round", "Sampler", "Shape", "Snapshot", "StopReason", "StopRules", "Stream"]
