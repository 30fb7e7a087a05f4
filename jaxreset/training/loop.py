"""The training loop of a run, from its config to its learning curve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxreset.config import Config
from jaxreset.errors import ConfigError
from jaxreset.groups import Group, set_advantages
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.reporting.curve import draw_curve
from jaxreset.reporting.display import Display
from jaxreset.reporting.report import write_report
from jaxreset.reporting.trackers import Trackers
from jaxreset.tasks.chain import ChainTask
from jaxreset.training.checkpoints import Checkpoints, load_params, save_params
from jaxreset.training.compiles import compiles
from jaxreset.training.evaluate import Accuracy, evaluate
from jaxreset.training.learner import Learner
from jaxreset.training.run_folder import RunFolder
from jaxreset.training.setup import Experiment, make_experiment
from jaxreset.training.update import init_state, make_optimizer
from jaxreset.training.warm_start import warm_start


class Result(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    history: list[dict[str, Any]]
    curve: Path
    policy: Policy


def train(config: Config, display: Display | None = None) -> Result:
    """Trains as the config says, going on from the run folder's latest checkpoint if there is one.

    Args:
      config: resolved, from `config.load_config`.
      display: shows progress; None shows nothing.

    Returns:
      The run's folder, its metrics, the learning curve's picture, and the trained policy.

    Raises:
      ConfigError: before anything is compiled.
      RunError: gradients stopped being finite, or a reward worker failed.
    """
    display = display or Display(quiet=True)
    folder = RunFolder(config)
    folder.check_writable()
    experiment = make_experiment(config)
    folder.claim()
    trackers = Trackers(config, folder.path)
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep)
    try:
        with display:
            learner = _prepare(experiment, checkpoints, folder, display)
            _loop(experiment, learner, checkpoints, folder, trackers, display)
    finally:
        experiment.task.close()
        trackers.close()
        checkpoints.close()
    history = folder.history()
    curve = draw_curve(history, folder.path / "learning_curve.png", title=config.objective)
    write_report(folder.path, history, curve)
    display.summary(history, folder.path, curve)
    return Result(folder.path, history, curve, learner.policy)


def _prepare(
    experiment: Experiment, checkpoints: Checkpoints, folder: RunFolder, display: Display
) -> Learner:
    """The learner at the step where the run goes on, with everything compiled."""
    config, restoring = experiment.config, checkpoints.any()
    if config.warm_start.steps and not restoring:
        policy = _warm_start(experiment, folder, display)
    else:
        policy = _start(experiment, folder)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def on_nonfinite(step: int, groups: list[Group]) -> None:
        folder.save_nonfinite(step, [_group_record(g, experiment.decode) for g in groups])

    learner = Learner(
        config,
        policy,
        optimizer,
        experiment.form,
        experiment.plan.pack,
        experiment.mesh,
        on_nonfinite,
        reference=jax.tree.map(jnp.copy, trained(policy.params)[0]) if config.loss.kl else None,
    )
    if restoring:
        learner.state, learner.progress = checkpoints.restore(learner.state)
        folder.cut_back(learner.progress.step)
        experiment.stream.position = learner.progress.data_position
    else:
        checkpoints.save(learner.state, learner.progress)
        folder.cut_back(-1)
    display.phase("compiling", None)
    learner.compile()
    experiment.compile_sampling(learner.policy)
    # One padded call, so that normalising rewards compiles now.
    set_advantages([], scale=config.loss.advantage_scale or "std", size=experiment.plan.sets)
    return learner


def _warm_start(experiment: Experiment, folder: RunFolder, display: Display) -> Policy:
    """The policy after the warm start, with its adapters."""
    config = experiment.config
    assert isinstance(experiment.task, ChainTask)  # checked by the schema
    display.phase("warm start", config.warm_start.steps)
    policy = warm_start(
        experiment.policy,
        experiment.task,
        experiment.problems.train,
        config.warm_start,
        seed=config.seed,
        inline=config.reset.localizer.mode == "inline",
        on_step=display.warm_start_step,
    )
    # Checkpoints hold only what is trained after this.
    if config.loss.kl or config.model.lora.rank:
        save_params(folder.start, policy.params)
    return experiment.adapted(policy)


def _start(experiment: Experiment, folder: RunFolder) -> Policy:
    """The policy that training started from, where that can still be told."""
    policy = experiment.policy
    if folder.start.is_dir():
        policy = policy.with_params(load_params(folder.start, policy.params), policy.version)
    return experiment.adapted(policy)


def _loop(
    experiment: Experiment,
    learner: Learner,
    checkpoints: Checkpoints,
    folder: RunFolder,
    trackers: Trackers,
    display: Display,
) -> None:
    config = experiment.config
    steps = config.train.steps
    display.phase("training", steps, done=learner.progress.step)
    if not folder.history():
        record = {"step": 0, **_evaluations(experiment, learner.policy, 0), "compiles": compiles()}
        folder.log(record)
        trackers.log(record)
        display.step(record)
    while (step := learner.progress.step + 1) <= steps:
        with _traced(step in config.run.profile_steps, folder.path / "profile"):
            record = _step(experiment, learner, folder, step)
        every = config.eval.every_steps
        if step == steps or (every and step % every == 0):
            record |= _evaluations(experiment, learner.policy, step)
        record["compiles"] = compiles()
        folder.log(record)
        if step == steps or step % config.checkpoint.every_steps == 0:
            checkpoints.save(learner.state, learner.progress)
        trackers.log(record)
        display.step(record)


def _step(experiment: Experiment, learner: Learner, folder: RunFolder, step: int) -> dict[str, Any]:
    """One step: rollouts, advantages, update. Returns its metrics."""
    config = experiment.config
    start = time.perf_counter()
    prompts = experiment.stream.next(config.train.prompts_per_step)
    collected = experiment.collector.collect(learner.policy, prompts, seed=config.seed, step=step)
    sampled = time.perf_counter()
    set_advantages(
        collected.groups,
        scale=config.loss.advantage_scale or "std",
        size=experiment.plan.sets,
        cut_penalty=config.loss.overlong_penalty,
        mask_cut=config.loss.overlong == "mask",
    )
    metrics = learner.learn(collected.groups, len(prompts))
    learner.progress = learner.progress._replace(
        step=step, data_position=experiment.stream.position
    )
    folder.save_trees(step, collected.trees)
    end = time.perf_counter()
    return {
        "step": step,
        "seconds": end - start,
        **collected.metrics,
        **metrics,
        "data/position": experiment.stream.position,
        "data/overlong_dropped": experiment.overlong.dropped,
        "optimizer_version": learner.progress.version,
        "time/sample": sampled - start,
        "time/update": end - sampled,
        "time/tokens_per_second": collected.metrics["tokens_sampled"] / (end - start),
    }


def _group_record(group: Group, decode: Callable[[np.ndarray], str]) -> dict[str, Any]:
    """All that an update knows of a group, in JSON."""
    return {
        "prompt": group.prompt,
        "reset_step": group.reset_step,
        "prefix": group.prefix.tolist(),
        "prefix_text": decode(group.prefix),
        "suffixes": [s.tolist() for s in group.suffixes],
        "suffix_texts": [decode(s) for s in group.suffixes],
        "behavior_logps": [x.tolist() for x in group.behavior_logps],
        "rewards": group.rewards.tolist(),
        "advantages": group.advantages.tolist(),
    }


def _evaluations(experiment: Experiment, policy: Policy, step: int) -> dict[str, float]:
    """Greedy and sampled accuracy on the held-out problems."""
    config = experiment.config
    prompts = experiment.test_prompts()

    def accuracy(temperature: float) -> Accuracy:
        return evaluate(
            policy,
            prompts,
            experiment.sampler,
            experiment.task,
            experiment.decode,
            batch=config.eval.batch,
            temperature=temperature,
            seed=config.seed,
            step=step,
        )

    sampled, greedy = accuracy(config.eval.temperature), accuracy(0.0)
    return {
        "eval/accuracy": sampled.mean,
        "eval/accuracy_low": sampled.low,
        "eval/accuracy_high": sampled.high,
        "eval/greedy_accuracy": greedy.mean,
        "eval/problems": float(len(prompts)),
    }


@contextmanager
def _traced(wanted: bool, path: Path) -> Iterator[None]:
    """A profiler trace of what runs inside, for TensorBoard or Perfetto."""
    if not wanted:
        yield
        return
    with jax.profiler.trace(str(path)):
        yield


def evaluate_run(config: Config) -> tuple[int, dict[str, float]]:
    """Accuracy of the run's latest checkpoint, and its step; of the starting policy without one."""
    folder = RunFolder(config)
    folder.check_same_policy()
    experiment = make_experiment(config)
    try:
        step, policy = _latest(experiment, folder)
        return step, _evaluations(experiment, policy, step)
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


def _latest(experiment: Experiment, folder: RunFolder) -> tuple[int, Policy]:
    config, policy = experiment.config, _start(experiment, folder)
    if not folder.checkpoints.is_dir():
        if config.model.path is None:
            raise ConfigError(
                f"run.dir {config.run.dir} holds no checkpoint, and model.path is null; train first"
            )
        return 0, policy
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    params, frozen = trained(policy.params)
    state, progress = checkpoints.restore(init_state(params, optimizer))
    checkpoints.close()
    params = nnx.merge_state(state.params, frozen)
    return progress.step, policy.with_params(params, progress.version)
