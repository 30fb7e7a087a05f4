"""What a run's checkpoints are good for once it has ended, or beside it: evaluation and export."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from jaxreset.config import Config
from jaxreset.errors import ConfigError
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.training.checkpoints import Checkpoints, load_params
from jaxreset.training.compiles import kept_programs
from jaxreset.training.evaluate import evaluations
from jaxreset.training.run_folder import RunFolder
from jaxreset.training.setup import Experiment, make_experiment
from jaxreset.training.update import init_state, make_optimizer


def evaluate_run(config: Config) -> tuple[int, dict[str, float]]:
    """Accuracy of the run's latest checkpoint, and its step; of the starting policy without one."""
    folder = RunFolder(config)
    folder.check_same_policy()
    experiment = make_experiment(config)
    try:
        with kept_programs(folder.compile_cache):
            step, policy = _latest(experiment, folder)
            return step, evaluations(experiment, policy, step)
    finally:
        experiment.task.close()


def export_run(config: Config, output: Path, *, adapters: bool = False) -> int:
    """Writes the run's latest checkpoint as a Hugging Face folder; returns its step.

    Args:
      config: resolved.
      output: a folder that doesn't exist or is empty.
      adapters: write the LoRA adapters alone, as a PEFT folder.

    Raises:
      ConfigError: there are no adapters, or their base is in no folder; or as for a run.
      FileExistsError: something is at `output`.
    """
    if adapters and config.model.lora.rank is None:
        raise ConfigError("model.lora.rank is null: the run has no adapters; export it whole")
    if adapters and config.model.path is None:
        raise ConfigError("model.path is null: no folder holds the adapters' base; export it whole")
    folder = RunFolder(config)
    folder.check_same_policy()
    experiment = make_experiment(config)
    step, policy = _latest(experiment, folder)
    if adapters:
        policy.export_adapters(output, base=str(config.model.path))
    else:
        policy.export(output)
    return step


def started_from(experiment: Experiment, folder: RunFolder) -> Policy:
    """The policy that training started from, where that can still be told."""
    policy = experiment.policy
    if folder.start.is_dir():
        policy = policy.with_params(load_params(folder.start, policy.params), policy.version)
    return experiment.adapted(policy)


def _latest(experiment: Experiment, folder: RunFolder) -> tuple[int, Policy]:
    """The policy of the newest whole checkpoint, and its step."""
    config, policy = experiment.config, started_from(experiment, folder)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if not checkpoints.any():
        if config.model.path is None:
            raise ConfigError(
                f"run.dir {config.run.dir} holds no checkpoint, and model.path is null; train first"
            )
        return 0, policy
    optimizer = make_optimizer(config.optimizer, config.optimizer_steps)
    params, frozen = trained(policy.params)
    state, progress = checkpoints.restore(init_state(params, optimizer))
    params = nnx.merge_state(state.params, frozen)
    return progress.step, policy.with_params(params, progress.version)
