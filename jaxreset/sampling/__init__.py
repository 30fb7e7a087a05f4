"""Drawing rollouts: `sampler.Sampler.sample` from prompts, `resume` from snapshots."""
