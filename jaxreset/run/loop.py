"""The training loop of a run, from its config to its learning curve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreset.config import Config
from jaxreset.disk import naming_full_disk
from jaxreset.errors import CallbackError, ConfigError, PreemptedError
from jaxreset.groups import Group
from jaxreset.learning.learner import Learner
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.parallel.processes import any_process, is_leader, wait_for_all
from jaxreset.planning.footprint import check_room, here
from jaxreset.reporting.alarms import Alarms
from jaxreset.reporting.curve import draw_curve
from jaxreset.reporting.display import Display
from jaxreset.reporting.report import write_report
from jaxreset.reporting.trackers import Trackers
from jaxreset.run.callbacks import call_back
from jaxreset.run.checkpoints import ACCURACY, Checkpoints, saved_steps
from jaxreset.run.compiles import LARGE_PROCESS, compiles, kept_programs, trim
from jaxreset.run.endings import explained, is_out_of_memory, save_finished
from jaxreset.run.evaluate import SetResponses
from jaxreset.run.experiment import Experiment
from jaxreset.run.finished import started_from
from jaxreset.run.folder import RunFolder, read_metrics
from jaxreset.run.objects import with_objects
from jaxreset.run.preemption import Preemption, noticing_preemption
from jaxreset.run.saved_arrays import abstract, save_params

logger = logging.getLogger(__name__)


class Result(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    history: list[dict[str, Any]]
    curve: Path
    policy: Policy


def train(
    config: Config,
    display: Display | None = None,
    *,
    only_warm_start: bool = False,
    **objects: Any,
) -> Result:
    """Trains as the config says, going on from the run folder's latest checkpoint if there is one.

    Args:
      config: resolved, from `config.load_config`.
      display: shows progress; None shows nothing.
      only_warm_start: takes the supervised steps alone, and measures accuracy before them too; without it
        the same config goes on from there.
      **objects: in place of what the config names, see `experiment.Experiment`. A run that goes on needs
        those that can't be imported by their names again.

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
    config = with_objects(config, **objects)
    if only_warm_start and not config.warm_start.steps:
        raise ConfigError(
            "warm_start.steps=0: there are no supervised steps to take; name how many, such as "
            "warm_start.steps=200"
        )
    folder = RunFolder(config)
    with (
        explained(config, folder.checkpoints),
        naming_full_disk(folder.path),
        noticing_preemption() as preemption,
        folder.locked(),
    ):
        folder.check_writable()
        folder.check_shared()
        return _train(folder.dated(), folder, preemption, display, only_warm_start)


def _train(
    config: Config,
    folder: RunFolder,
    preemption: Preemption,
    display: Display,
    only_warm_start: bool,
) -> Result:
    """`train` in a folder that is its own."""
    with kept_programs(folder.compile_cache):
        with preemption.ending_at_once():
            if (doubt := check_room(here(config))) is not None:
                logger.warning(doubt)
            experiment = Experiment(config)
            if config.warm_start.steps and not saved_steps(folder.checkpoints):
                _ = experiment.lessons  # what is wrong with them is said before anything is written

        def between_rounds() -> None:
            preemption.check()
            trim(LARGE_PROCESS)

        experiment.collector = replace(
            experiment.collector,
            interrupt=between_rounds,
            keep_errors=folder.save_verifier_errors,
        )
        folder.keep_data(experiment.problems.portions)
        display.changed(folder.claim())
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        going_on = checkpoints.any()
        sent = folder.history() if going_on else []
        trackers = Trackers(config, folder.path, sent, anew=not going_on)
        try:
            with display:
                learner = _prepare(
                    experiment, checkpoints, folder, preemption, display, only_warm_start
                )
                trackers.go_on(learner.progress.step if going_on else -1)
                steps = learner.progress.step if only_warm_start else config.train.steps
                _loop(experiment, learner, checkpoints, folder, trackers, display, steps)
        finally:
            experiment.close()
            trackers.close()
            checkpoints.close()
    wait_for_all("the metrics are written")
    history = folder.history()
    curve = folder.path / "learning_curve.png"
    if is_leader():
        with naming_full_disk(folder.path):
            draw_curve(history, curve, title=config.objective)
            threshold = config.task.threshold
            write_report(folder.path, history, curve, failed_below=threshold)
        display.summary(history, folder.path, curve, before=read_metrics(folder.warm_start)[:1])
    return Result(folder.path, history, curve, learner.policy)


def _prepare(
    experiment: Experiment,
    checkpoints: Checkpoints,
    folder: RunFolder,
    preemption: Preemption,
    display: Display,
    only_warm_start: bool,
) -> Learner:
    """The learner at the step where the run goes on, with everything compiled."""
    config, restoring = experiment.config, checkpoints.any()
    if config.warm_start.steps and not restoring:
        with preemption.ending_at_once():
            policy = _warm_start(experiment, folder, display, measured=only_warm_start)
    else:
        policy = started_from(folder, experiment.start_policy, experiment.mesh)

    def on_nonfinite(step: int, groups: list[Group]) -> None:
        folder.save_nonfinite(step, [_group_record(g, experiment.decode) for g in groups])

    learner = experiment.begin(policy, on_nonfinite)
    del policy  # its parameters are the learner's, and trained from here on
    if restoring:
        like = abstract(learner.state)
        for leaf in jax.tree.leaves(learner.state):
            leaf.delete()  # there may not be room for two states
        learner.state, learner.progress = checkpoints.restore(like, set_aside=True)
        folder.cut_back(learner.progress.step)
        experiment.source.position = learner.progress.data_position
    else:
        _save(checkpoints, learner)
        folder.cut_back(-1)
    wait_for_all("the metrics are cut back")
    if only_warm_start:  # an evaluation compiles what it needs
        return learner
    display.phase("compiling", None)
    with preemption.ending_at_once():
        experiment.compile()
        trim()
    return learner


def _warm_start(
    experiment: Experiment, folder: RunFolder, display: Display, *, measured: bool
) -> Policy:
    """The policy after the warm start, with its adapters; `measured`: its accuracy before it is logged."""
    config = experiment.config
    folder.begin_warm_start()
    if measured:
        display.phase("evaluating", None)
        before = experiment.evaluate(experiment.adapted(experiment.start_policy), step=0)
        folder.log_warm_start({"step": 0, **before})

    def note(record: dict[str, float]) -> None:
        folder.log_warm_start(record)
        display.warm_start_step(int(record["step"]), record["loss"])

    display.phase("warm start", config.warm_start.steps)
    policy = experiment.warm_started(note)
    # Checkpoints hold only what is trained after this: not what it is kept near to, nor adapters' base.
    if config.loss.kl or (config.model.lora.rank and config.model.path is None):
        save_params(folder.start, trained(policy.params)[0])
    return experiment.adapted(policy)


def _loop(
    experiment: Experiment,
    learner: Learner,
    checkpoints: Checkpoints,
    folder: RunFolder,
    trackers: Trackers,
    display: Display,
    steps: int,
) -> None:
    """All steps that are left of `steps`; asked to end, it saves the last finished one."""
    config = experiment.config
    display.phase("training", steps, done=learner.progress.step)
    alarms = Alarms(config, experiment.task, folder.alarms, folder.history(), display.alarm)
    alarms.start(learner.policy.eos_ids)
    finished = learner.state, learner.progress
    try:
        ended = folder.history()[-1:]
        experiment.stopped = ended[0].get("stopped") if ended else None
        if late := _evaluate_late(experiment, learner, folder, trackers, display):
            record, response = late
            alarms.note(record, response=response)
        while learner.progress.step < steps and experiment.stopped is None:
            experiment.collector.interrupt()
            step = learner.progress.step + 1
            with _traced(step in config.run.profile_steps, folder.path / "profile"):
                record, trees = experiment.step_with_trees()
            folder.save_trees(step, trees)
            finished = learner.state, learner.progress
            try:
                if _evaluated(config, step):
                    record |= experiment.evaluate(learner.policy, step)
                call_back(experiment, record)
                if experiment.stopped is not None and ACCURACY not in record:
                    record |= experiment.evaluate(learner.policy, step)
            finally:
                record["compiles"] = compiles()
                folder.log(record)
                trackers.log(record)
                display.step(record)
            alarms.note(record, trees)
            if _saved(config, step) or experiment.stopped is not None:
                _save(checkpoints, learner, record)
    except PreemptedError:
        checkpoints.save(learner.state, learner.progress)
        raise
    except CallbackError:
        save_finished(checkpoints, *finished)
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
) -> tuple[dict[str, Any], str] | None:
    """Evaluates the step that the run starts or goes on from, if that is still to be done.

    Returns its metrics and a response.
    """
    step = learner.progress.step
    due = _evaluated(experiment.config, step) or experiment.stopped is not None
    missing = due and is_leader() and not folder.evaluated(step)
    if not any_process(missing):
        return None
    sets: list[SetResponses] = []
    record = {"step": step, **experiment.evaluate(learner.policy, step, see=sets.append)}
    record["compiles"] = compiles()
    folder.complete(record)
    trackers.log(record)
    display.step(record)
    return record, sets[0].sampled.texts[0][0]


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
        "token_advantages": group.token_advantages
        and [values.tolist() for values in group.token_advantages],
    }


@contextmanager
def _traced(wanted: bool, path: Path) -> Iterator[None]:
    """A profiler trace of what runs inside, for TensorBoard or Perfetto."""
    if not wanted:
        yield
        return
    with jax.profiler.trace(str(path)):
        yield
