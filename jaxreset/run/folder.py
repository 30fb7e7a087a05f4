"""A run's folder: resolved config, metrics, rollouts; where it starts again, and what is refused."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from jaxreset.config import MAY_CHANGE, SAME_DATA, Config
from jaxreset.config_file import DUMPED, dump_config, run_path, saved_values
from jaxreset.disk import writing
from jaxreset.errors import ConfigError, RunError
from jaxreset.json_text import dumps, loads
from jaxreset.parallel.processes import gather, is_leader
from jaxreset.run.checkpoints import ACCURACY, saved_steps
from jaxreset.run.lock import locked
from jaxreset.tasks.fingerprint import Portion, differences
from jaxreset.tasks.scoring import Record, keep_errors

DATE = "task.date"
WARM_STEPS = "warm_start.steps"


class RunFolder:
    """`config.yaml`, `data.json`, `metrics.jsonl`, `rollouts/`, `checkpoints/`, `nonfinite/` under one
    folder; `changes.jsonl`, where a run went on with another config; `warm_start.jsonl`, of a warm start.

    Of several processes one writes; what it wrote is there for the others after they waited for it.

    Args:
      config: resolved; its `run.dir` names the folder.
    """

    def __init__(self, config: Config):
        self.config = config
        self.path = run_path(config.run.dir)
        self.saved = self.path / "config.yaml"
        self.changes = self.path / "changes.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.nonfinite = self.path / "nonfinite"
        self.data = self.path / "data.json"
        self.alarms = self.path / "alarms.jsonl"
        self.verifier_errors = self.path / "verifier_errors.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.warm_start = self.path / "warm_start.jsonl"
        self.start = self.path / "start"  # parameters of a warm start that are needed later
        self._limit = int(config.run.rollouts_mb * 2**20)

    @property
    def compile_cache(self) -> Path | None:
        """Where compiled programs are kept; None: nowhere, or there is no run yet."""
        wanted = self.config.run.compile_cache
        if isinstance(wanted, str):
            return Path(wanted).expanduser().absolute()
        return self.path / "cache" if wanted and self.path.is_dir() else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, the folder, which is made if need be, is this run's and no other's.

        Raises:
          ConfigError: in every process, where it is another's or can't be written.
        """
        with ExitStack() as stack:

            def lock() -> None:
                with self._writing():
                    self.path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self.path))

            _of_the_leader(lock)
            yield

    def check_writable(self) -> None:
        """Makes what is in the folder if need be.

        Raises:
          ConfigError: in every process, where it can't be written, or holds another config's run or
            somebody's `config.yaml`.
        """
        _of_the_leader(self._check_writable)

    def _check_writable(self) -> None:
        with self._writing():
            self.rollouts.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        if self.saved.exists() and not self.saved.read_text().startswith(DUMPED):
            raise ConfigError(
                f"run.dir {self.path} holds a config.yaml that isn't a run's; name another folder"
            )
        # A run of an older version has no fingerprint of its problems: only their path says which they are.
        known = self.data.exists()
        free = tuple(key for key, why in MAY_CHANGE.items() if known or why is not SAME_DATA)
        if self.config.optimizer.schedule != "constant":  # it ends with the last step
            free = tuple(key for key in free if key != "train.steps")
        self._refuse_other_run(free=free)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is written inside may fail."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"run.dir {self.path} can't be written: {error.strerror}; name another folder"
            ) from error

    def check_shared(self) -> None:
        """Returns when the folder is there for every process.

        Raises:
          ConfigError: in all of them, where some look at a folder of their own.
        """
        mark = self.path / f".shared_{uuid4().hex}"
        if is_leader():
            mark.touch()
        mark = self.path / gather([mark.name])[0]  # the leader's, which is there by now
        blind = [n for n, sees in enumerate(gather([mark.exists()])) if not sees]
        if is_leader():
            mark.unlink()
        if blind:
            raise ConfigError(
                f"run.dir {self.path}: process {blind[0]} doesn't find there what process 0 wrote; name a "
                "folder that all processes share"
            )

    def dated(self) -> Config:
        """The config with its `task.date`: where it says none, the day on which the folder's run started.

        Every process gets the leader's answer.
        """
        if self.config.task.date is None:
            task = self.config.task.model_copy(update={"date": gather([self._start_day()])[0]})
            self.config = self.config.model_copy(update={"task": task})
        return self.config

    def _start_day(self) -> datetime.date | None:
        """Of the run that the folder holds; without a checkpoint there is none, and it starts today."""
        if not is_leader():
            return None
        saved = None
        if self.saved.exists() and saved_steps(self.checkpoints):
            saved = _flat(saved_values(self.saved)).get(DATE)
        return datetime.date.fromisoformat(str(saved)) if saved else datetime.date.today()

    def check_same_policy(self) -> None:
        """Raises `ConfigError` where the folder's checkpoints are of another policy or optimizer."""
        self._refuse_other_run(only=("model", "optimizer"))

    def keep_data(self, portions: Sequence[Portion]) -> None:
        """Notes which problems the run has, before it is claimed.

        Raises:
          ConfigError: in every process, where the run in the folder has others.
        """

        def keep() -> None:
            if self.data.exists() and saved_steps(self.checkpoints):
                found = differences(_portions(self.data), portions)
                if found:
                    raise ConfigError(
                        f"run.dir {self.path} holds a run on other problems ({', '.join(found[:3])}); "
                        "bring them back, or name another run.dir"
                    )
            lines = ",\n".join(dumps(portion._asdict()) for portion in portions)
            _write(self.data, f"[{lines}]\n")

        _of_the_leader(keep)

    def claim(self) -> dict[str, tuple[Any, Any]]:
        """Writes the resolved config: from now on the folder is this run's.

        Returns:
          The keys that differ from those of the run that goes on, before and now: they are noted in
          `changes.jsonl` too.
        """
        if not is_leader():
            return {}
        changed = self._changed()
        if changed:
            step = saved_steps(self.checkpoints)[-1]
            time = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            line = dumps({"step": step, "time": time, "changed": changed})
            _append(self.changes, line + "\n")
        _write(self.saved, dump_config(self.config))
        return changed

    def _changed(self) -> dict[str, tuple[Any, Any]]:
        """Keys whose value differs from that of the run in the folder; both values."""
        # Before the first checkpoint there is nothing to go on from: a mended config may start anew.
        if not self.saved.exists() or not saved_steps(self.checkpoints):
            return {}
        before = _flat(saved_values(self.saved))
        now = _flat(self.config.model_dump(mode="json"))
        keys = sorted({*before, *now})
        if not before.get(WARM_STEPS) and not now.get(WARM_STEPS):
            keys = [key for key in keys if not _below(key, ("warm_start",))]  # there is none
        return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}

    def _refuse_other_run(
        self, *, only: tuple[str, ...] = ("",), free: tuple[str, ...] = ()
    ) -> None:
        differing = [
            f"{key}: {before!r} there, {now!r} asked"
            for key, (before, now) in self._changed().items()
            if _below(key, only)
            and not _below(key, free)
            and not (key == DATE and None in (before, now))  # not asked for: the run's own is taken
        ]
        if differing:
            raise ConfigError(
                f"run.dir {self.path} holds another config's run ({', '.join(differing[:3])}); name "
                "another run.dir, or delete it"
            )

    def cut_back(self, step: int) -> None:
        """Drops what was written after `step`: those steps will be run again."""
        if not is_leader():
            return
        kept = [line for line in self.history() if line["step"] <= step]
        _write(self.metrics, "".join(dumps(line) + "\n" for line in kept))
        evaluated = self.evaluated(step)
        _cut(self.alarms, lambda alarm: alarm["step"] <= step)
        _cut(
            self.verifier_errors,  # an evaluation that wasn't finished will be done again
            lambda e: (
                e["step"] < step or (e["step"] == step and (evaluated or not e["evaluation"]))
            ),
        )
        for file in [*self.rollouts.glob("step_*"), *self.nonfinite.glob("step_*")]:
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    def history(self) -> list[dict[str, Any]]:
        """The metrics so far, see `read_metrics`."""
        return read_metrics(self.metrics)

    def log(self, metrics: dict[str, Any]) -> None:
        """Appends one step's metrics."""
        if is_leader():
            _append(self.metrics, dumps(metrics) + "\n")

    def begin_warm_start(self) -> None:
        """Drops what an interrupted warm start has logged: it starts from the beginning."""
        if is_leader():
            self.warm_start.unlink(missing_ok=True)

    def log_warm_start(self, record: dict[str, Any]) -> None:
        """Appends a supervised step's metrics; those of step 0 are of the policy before it."""
        if is_leader():
            _append(self.warm_start, dumps(record) + "\n")

    def evaluated(self, step: int) -> bool:
        """Whether the metrics hold this step's accuracy."""
        return any(line["step"] == step and ACCURACY in line for line in self.history())

    def complete(self, metrics: dict[str, Any]) -> None:
        """Adds to the metrics of the step that they name, which is the last."""
        if not is_leader():
            return
        lines = {line["step"]: line for line in self.history()}
        lines[metrics["step"]] = lines.get(metrics["step"], {}) | metrics
        _write(self.metrics, "".join(dumps(line) + "\n" for line in lines.values()))

    def save_nonfinite(self, step: int, groups: Sequence[dict[str, Any]]) -> None:
        """Writes groups for which a step's update was skipped."""
        if not is_leader():
            return
        file = self.nonfinite / f"step_{step:06d}.jsonl"
        text = "".join(dumps({"step": step, **group}) + "\n" for group in groups)
        _append(file, text)  # a step may have several minibatches

    def save_verifier_errors(self, errors: Sequence[Record]) -> None:
        """Keeps responses that the verifier failed on, and how."""
        if is_leader():
            keep_errors(self.verifier_errors, errors)

    def save_trees(self, step: int, trees: Sequence[dict[str, Any]]) -> None:
        """Writes a step's reset trees, and drops the oldest files over the disk limit."""
        if self._limit == 0 or not is_leader():
            return
        text = "".join(dumps({"step": step, **tree}) + "\n" for tree in trees)
        _write(self.rollouts / f"step_{step:06d}.jsonl", text)
        files = sorted(self.rollouts.glob("step_*.jsonl"))
        total = sum(file.stat().st_size for file in files)
        while total > self._limit and files:
            oldest = files.pop(0)
            total -= oldest.stat().st_size
            oldest.unlink()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`, one a step; a last line cut short by a crash is left out.

    Raises:
      RunError: another line isn't JSON.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            found.append(loads(line))
        except ValueError as error:
            raise RunError(
                f"{file}, line {number} isn't JSON: {error}. Bring the file back from a "
                "backup, or delete the line, and start the same command again"
            ) from error
    return found


def _portions(file: Path) -> list[Portion]:
    """What `data.json` says; raises `ConfigError` where it says nothing."""
    try:
        return [Portion(**values) for values in loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} isn't a run's ({error}); bring it back from a backup, or delete it: then nobody "
            "checks that the run goes on with the same problems"
        ) from error


def _of_the_leader(check: Callable[[], None]) -> None:
    """Does it in the leader; what it refuses is refused in every process, so that none waits for it."""
    refused = None
    if is_leader():
        try:
            check()
        except ConfigError as error:
            refused = str(error)
    if (refused := gather([refused])[0]) is not None:
        raise ConfigError(refused)


def _cut(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops a JSONL file's other objects, and a line cut short by a crash; nothing left: the file."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if line.endswith("\n") and keep(loads(line))]
    if kept:
        _write(file, "".join(kept))
    else:
        file.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Replaces a file at once, so that a kill, or a full disk, leaves the old or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with writing(path, path.name):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a machine that is cut off may leave an empty one
            os.replace(temporary, path)
        except OSError:  # of a full disk, say, which half a file makes no better
            temporary.unlink(missing_ok=True)
            raise


def _append(path: Path, text: str) -> None:
    with writing(path, path.name):
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(text)


def _below(key: str, sections: tuple[str, ...]) -> bool:
    """Whether `key` is one of `sections` or inside one; "" holds every key."""
    return any(not s or key == s or key.startswith(f"{s}.") for s in sections)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
