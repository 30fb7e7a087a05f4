"""What a run's checkpoints are good for once it has ended, or beside it: evaluation and export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from jaxreset.config import Config
from jaxreset.disk import refuse_existing
from jaxreset.errors import ConfigError
from jaxreset.models.adapters import rounding_loss, trained
from jaxreset.models.policy import Policy
from jaxreset.parallel.processes import is_leader, wait_for_all
from jaxreset.run.checkpoints import Checkpoints, saved_steps
from jaxreset.run.compiles import kept_programs
from jaxreset.run.evaluate import by_set
from jaxreset.run.experiment import Experiment
from jaxreset.run.folder import RunFolder
from jaxreset.run.parts import adapted
from jaxreset.run.saved_arrays import abstract, load_params
from jaxreset.run.saved_responses import saving_responses

logger = logging.getLogger(__name__)

EXPORTED = ("float32", "bfloat16", "float16")
LOSS_WORTH_A_WORD = 0.05  # of what was learnt


class Evaluated(NamedTuple):
    """What an evaluation found.

    Attributes:
      step: of the checkpoint; 0: what training starts from.
      metrics: as a run logs them.
      sets: the same for each held-out set by its name, the main one first, without prefixes.
    """

    step: int
    metrics: dict[str, float]
    sets: dict[str, dict[str, float]]


def evaluate_run(config: Config, *, save: Path | None = None) -> Evaluated:
    """Measures the run's latest checkpoint on the held-out problems; the starting policy without one.

    Args:
      config: resolved.
      save: a new file for the responses, one line of JSON a problem.

    Raises:
      ConfigError: `save` exists; or as for a run.
      RunError: the verifier failed on every response, or `save` can't be written.
    """
    folder = RunFolder(config)
    folder.check_same_policy()
    with saving_responses(save) as see:
        experiment = Experiment(folder.dated())
        try:
            with kept_programs(folder.compile_cache):
                step, policy, _ = _latest(experiment, folder)
                metrics = experiment.evaluate(policy, step, see)
        finally:
            experiment.close()
    return Evaluated(step, metrics, by_set(metrics, experiment.problems.test))


def export_run(
    config: Config, output: Path, *, adapters: bool = False, dtype: str | None = None
) -> int:
    """Writes the run's latest checkpoint as a Hugging Face folder; returns its step.

    A warning says how much of what was learnt is lost where tensors are rounded.

    Args:
      config: resolved.
      output: a folder that doesn't exist or is empty.
      adapters: write the LoRA adapters alone, as a PEFT folder.
      dtype: of the tensors; None: `model.dtype`.

    Raises:
      ConfigError: there are no adapters, or their base is in no folder; an unknown dtype; or as for a run.
      FileExistsError: something is at `output`.
      RunError: there is no room on the disk, or it can't be written; nothing is left there.
    """
    if adapters and config.model.lora.rank is None:
        raise ConfigError("model.lora.rank is null: the run has no adapters; export it whole")
    if adapters and config.model.path is None:
        raise ConfigError("model.path is null: no folder holds the adapters' base; export it whole")
    if adapters and dtype is not None:
        raise ConfigError(
            f"--dtype {dtype}: adapters are written as they are, in float32; leave it out"
        )
    target = dtype or config.model.dtype
    if target not in EXPORTED:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(EXPORTED)}")
    refuse_existing(output)
    folder = RunFolder(config)
    folder.check_same_policy()
    experiment = Experiment(folder.dated())
    try:
        rounded = not adapters and target != "float32"
        step, policy, start = _latest(experiment, folder, keep_start=rounded)
        if adapters:
            policy.export_adapters(output, base=str(config.model.path))
            return step
        if rounded:
            _warn_of_rounding(rounding_loss(policy.params, policy.config, target, start), target)
        start = None
        try:
            policy.export(output, dtype=target)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    finally:
        experiment.close()
    wait_for_all("the export is written")
    return step


def _warn_of_rounding(loss: float, dtype: str) -> None:
    if loss > LOSS_WORTH_A_WORD and is_leader():
        logger.warning(
            "rounding to %s is an error of %.0f%% of the size of what training changed; "
            "export --dtype float32 keeps all of it",
            dtype,
            100 * loss,
        )


def started_from(folder: RunFolder, policy: Policy, mesh: jax.sharding.Mesh | None) -> Policy:
    """What training started from, where that can still be told; `policy`: as its config makes it."""
    fresh = folder.config.model.path is None
    if not fresh:
        policy = adapted(folder.config, policy, mesh)
    if folder.start.is_dir():
        before, frozen = trained(policy.params)
        # A fresh one's are in its dtype, see `warm_start`; all others as they were trained.
        learnt = load_params(folder.start, abstract(before, wide=not fresh))
        policy = policy.with_params(nnx.merge_state(learnt, frozen), policy.version)
    return adapted(folder.config, policy, mesh)


def trained_to(
    folder: RunFolder, policy: Policy, *, step: int | None = None, keep: bool = False
) -> tuple[int, Policy]:
    """The policy of a checkpoint, and its step; only parameters are read.

    Args:
      folder: of the run.
      policy: that training started from; its trained parameters are let go first, as there may not be room
        for both, unless it is to be kept.
      step: of the checkpoint; None: the newest that is whole.
      keep: see `policy`.
    """
    start, frozen = trained(policy.params)
    like = abstract(start, wide=True)
    if not keep:
        for leaf in jax.tree.leaves(start):
            leaf.delete()
    checkpoints = Checkpoints(folder.checkpoints, folder.config.checkpoint)
    params, progress = checkpoints.restore_params(like, step=step)
    params = nnx.merge_state(params, frozen)
    return progress.step, policy.with_params(params, progress.version)


def _latest(
    experiment: Experiment, folder: RunFolder, *, keep_start: bool = False
) -> tuple[int, Policy, nnx.State | None]:
    """The policy of the newest whole checkpoint, its step, and what training started from.

    Of the checkpoint only parameters are read, in place of those that training started from, unless these
    are to be kept and can be told; adapters start from nothing that counts.
    """
    config = experiment.config
    policy = started_from(folder, experiment.start_policy, experiment.mesh)
    if not saved_steps(folder.checkpoints):
        if config.model.path is None:
            raise ConfigError(
                f"run.dir {config.run.dir} holds no checkpoint, and model.path is null; train first"
            )
        return 0, policy, None
    fresh = config.model.path is None
    known = not fresh or not config.warm_start.steps or folder.start.is_dir()
    keep = keep_start and known and policy.config.lora is None
    start = trained(policy.params)[0] if keep else None
    return *trained_to(folder, policy, keep=keep), start
