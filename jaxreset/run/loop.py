"""The training loop of a run, from its config to its learning curve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreset.config import Config
from jaxreset.disk import naming_full_disk
from jaxreset.errors import PreemptedError
from jaxreset.groups import Group, set_advantages
from jaxreset.learning.learner import Learner
from jaxreset.learning.update import make_optimizer
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.parallel.processes import any_process, is_leader, wait_for_all
from jaxreset.planning.footprint import check_room, here
from jaxreset.reporting.curve import draw_curve
from jaxreset.reporting.display import Display
from jaxreset.reporting.report import write_report
from jaxreset.reporting.trackers import Trackers
from jaxreset.run.alarms import Alarms
from jaxreset.run.checkpoints import Checkpoints, abstract, save_params
from jaxreset.run.compiles import compiles, kept_programs, trim
from jaxreset.run.endings import explained, is_out_of_memory, save_finished
from jaxreset.run.evaluate import evaluations
from jaxreset.run.experiment import Experiment, make_experiment
from jaxreset.run.finished import started_from
from jaxreset.run.folder import RunFolder
from jaxreset.run.preemption import Preemption, noticing_preemption
from jaxreset.run.warm_start import warm_start
from jaxreset.tasks.chain import ChainTask

logger = logging.getLogger(__name__)

LARGE_PROCESS = 2 * 2**30  # bytes, from which memory goes back to the system between phases


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
      PreemptedError: after SIGTERM or Ctrl-C, with the last finished step saved.
      RunError: gradients stopped being finite, the verifier failed on every response, or a checkpoint
        or something else could not be written, or none of the checkpoints read; the devices' memory
        didn't suffice, or the disk.
    """
    if display is None or not is_leader():
        display = Display(quiet=True)
    folder = RunFolder(config)
    with (
        explained(config, folder.checkpoints),
        naming_full_disk(folder.path),
        noticing_preemption() as preemption,
        folder.locked(),
    ):
        folder.check_writable()
        folder.check_shared()
        return _train(folder.dated(), folder, preemption, display)


def _train(config: Config, folder: RunFolder, preemption: Preemption, display: Display) -> Result:
    """`train` in a folder that is its own."""
    with kept_programs(folder.compile_cache):
        with preemption.ending_at_once():
            if (doubt := check_room(here(config))) is not None:
                logger.warning(doubt)
            experiment = make_experiment(config)

        def between_rounds() -> None:
            preemption.check()
            trim(LARGE_PROCESS)

        experiment.collector = replace(
            experiment.collector,
            interrupt=between_rounds,
            keep_errors=folder.save_verifier_errors,
        )
        display.changed(folder.claim())
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        going_on = checkpoints.any()
        sent = folder.history() if going_on else []
        trackers = Trackers(config, folder.path, sent, anew=not going_on)
        try:
            with display:
                learner = _prepare(experiment, checkpoints, folder, preemption, display)
                trackers.go_on(learner.progress.step if going_on else -1)
                _loop(experiment, learner, checkpoints, folder, trackers, display)
        finally:
            experiment.task.close()
            trackers.close()
            checkpoints.close()
    wait_for_all("the metrics are written")
    history = folder.history()
    curve = folder.path / "learning_curve.png"
    if is_leader():
        with naming_full_disk(folder.path):
            draw_curve(history, curve, title=config.objective)
            write_report(folder.path, history, curve)
        display.summary(history, folder.path, curve)
    return Result(folder.path, history, curve, learner.policy)


def _prepare(
    experiment: Experiment,
    checkpoints: Checkpoints,
    folder: RunFolder,
    preemption: Preemption,
    display: Display,
) -> Learner:
    """The learner at the step where the run goes on, with everything compiled."""
    config, restoring = experiment.config, checkpoints.any()
    if config.warm_start.steps and not restoring:
        with preemption.ending_at_once():
            policy = _warm_start(experiment, folder, display)
    else:
        policy = started_from(experiment, folder)
    optimizer = make_optimizer(config.optimizer, config.optimizer_steps)

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
    # The learner's are trained from here on.
    del policy
    experiment.policy = experiment.policy.without_params()
    if restoring:
        like = abstract(learner.state)
        for leaf in jax.tree.leaves(learner.state):
            leaf.delete()  # there may not be room for two states
        learner.state, learner.progress = checkpoints.restore(like, set_aside=True)
        folder.cut_back(learner.progress.step)
        experiment.stream.position = learner.progress.data_position
    else:
        _save(checkpoints, learner)
        folder.cut_back(-1)
    wait_for_all("the metrics are cut back")
    display.phase("compiling", None)
    with preemption.ending_at_once():
        learner.compile()
        experiment.compile_sampling(learner.policy)
        # One padded call, so that normalising rewards compiles now.
        set_advantages([], scale=config.loss.advantage_scale or "std", size=experiment.plan.sets)
        trim()
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
        interrupt=experiment.collector.interrupt,
        mesh=experiment.mesh,
    )
    # Checkpoints hold only what is trained after this.
    if config.loss.kl or config.model.lora.rank:
        save_params(folder.start, policy.params)
    return experiment.adapted(policy)


def _loop(
    experiment: Experiment,
    learner: Learner,
    checkpoints: Checkpoints,
    folder: RunFolder,
    trackers: Trackers,
    display: Display,
) -> None:
    """All steps that are left; asked to end, it saves the last finished one."""
    config = experiment.config
    display.phase("training", config.train.steps, done=learner.progress.step)
    marker = experiment.task.answer_marker
    alarms = Alarms(config, marker, folder.alarms, folder.history(), display.alarm)
    alarms.start(learner.policy.eos_ids)
    finished = learner.state, learner.progress
    try:
        if late := _evaluate_late(experiment, learner, folder, trackers, display):
            alarms.note(late)
        while learner.progress.step < config.train.steps:
            experiment.collector.interrupt()
            step = learner.progress.step + 1
            with _traced(step in config.run.profile_steps, folder.path / "profile"):
                record, trees = _step(experiment, learner, folder, step)
            finished = learner.state, learner.progress
            try:
                if _evaluated(config, step):
                    record |= evaluations(experiment, learner.policy, step)
            finally:
                record["compiles"] = compiles()
                folder.log(record)
                trackers.log(record)
                display.step(record)
            alarms.note(record, trees)
            if _saved(config, step):
                _save(checkpoints, learner, record)
    except PreemptedError:
        checkpoints.save(learner.state, learner.progress)
        raise
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            save_finished(checkpoints, *finished)
        raise


def _evaluate_late(
    experiment: Experiment,
    learner: Learner,
    folder: RunFolder,
    trackers: Trackers,
    display: Display,
) -> dict[str, Any] | None:
    """Evaluates the step that the run starts or goes on from, if that is still to be done."""
    step = learner.progress.step
    missing = _evaluated(experiment.config, step) and is_leader() and not folder.evaluated(step)
    if not any_process(missing):
        return None
    record = {"step": step, **evaluations(experiment, learner.policy, step)}
    record["compiles"] = compiles()
    folder.complete(record)
    trackers.log(record)
    display.step(record)
    return record


def _evaluated(config: Config, step: int) -> bool:
    """Whether the step ends with an evaluation; step 0 is the start."""
    every = config.eval.every_steps
    return step in (0, config.train.steps) or (every is not None and step % every == 0)


def _save(checkpoints: Checkpoints, learner: Learner, record: dict[str, Any] | None = None) -> None:
    """Saves the last finished step. What a CPU writes lies in the memory that a step wants: it waits."""
    trim(LARGE_PROCESS)
    checkpoints.save(learner.state, learner.progress, record)
    if jax.default_backend() == "cpu":
        checkpoints.wait()


def _saved(config: Config, step: int) -> bool:
    """Whether the step ends with a checkpoint."""
    best = config.checkpoint.keep_best > 0 and _evaluated(config, step)
    return step == config.train.steps or step % config.checkpoint.every_steps == 0 or best


def _step(
    experiment: Experiment, learner: Learner, folder: RunFolder, step: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One step: rollouts, advantages, update. Returns its metrics and its reset trees."""
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
    trim(LARGE_PROCESS)
    metrics = learner.learn(collected.groups, len(prompts))
    learner.progress = learner.progress._replace(
        step=step, data_position=experiment.stream.position
    )
    folder.save_trees(step, collected.trees)
    end = time.perf_counter()
    metrics = {
        "step": step,
        "seconds": end - start,
        **collected.metrics,
        **metrics,
        "data/position": experiment.stream.position,
        "data/overlong_dropped": experiment.overlong.dropped,
        "data/ungradable_dropped": experiment.problems.ungradable,
        "optimizer_version": learner.progress.version,
        "time/sample": sampled - start,
        "time/update": end - sampled,
        "time/tokens_per_second": collected.metrics["tokens_sampled"] / (end - start),
    }
    return metrics, collected.trees


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


@contextmanager
def _traced(wanted: bool, path: Path) -> Iterator[None]:
    """A profiler trace of what runs inside, for TensorBoard or Perfetto."""
    if not wanted:
        yield
        return
    with jax.profiler.trace(str(path)):
        yield
