"""A run folder that goes on: with which other keys, after an older or newer version, and broken files."""

from __future__ import annotations

import errno
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from jaxreset.config import MAY_CHANGE, Config
from jaxreset.config_file import DUMPED, load_config
from jaxreset.errors import ConfigError, RunError
from jaxreset.reporting.display import Display
from jaxreset.run.folder import RunFolder
from jaxreset.tasks.fingerprint import Portion

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
OLDER = Path(__file__).parent / "fixtures" / "older_config.yaml"  # as the first version wrote it


PROBLEMS = Portion("data.path", "train.jsonl", 40, "0123456789abcdef", records=40)


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def folder_of(path, *overrides, config=QUICKSTART):
    return RunFolder(load_config(config, [f"run.dir={path}", *overrides]))


@pytest.fixture
def run(tmp_path):
    """A folder whose run has been saved at step 3."""
    folder = folder_of(tmp_path)
    folder.check_writable()
    folder.keep_data([PROBLEMS])
    folder.claim()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def changed(values, key, value):
    """Nested values with one other; None: without that key."""
    first, _, rest = key.partition(".")
    if rest:
        return values | {first: changed(values[first], rest, value)}
    others = {k: v for k, v in values.items() if k != first}
    return others if value is None else others | {first: value}


def edit(path, changes):
    """Changes keys of a saved config; None removes one."""
    saved = path / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    for key, value in changes.items():
        values = changed(values, key, value)
    saved.write_text(f"{DUMPED}\n{yaml.safe_dump(values)}")


def test_every_key_that_may_change_is_one():
    known = {key for key, _ in leaves(Config().model_dump())}
    for key, why in MAY_CHANGE.items():
        assert why
        assert any(k == key or k.startswith(f"{key}.") for k in known), key


def test_what_may_change_is_all_that_may_change(run):
    """For each key, a run that was saved with another value."""
    folder = folder_of(run)
    values = folder.config.model_dump(mode="json")
    for key, value in leaves(values):
        other = "another" if not isinstance(value, int | float) else value + 1
        folder.saved.write_text(
            f"{DUMPED}\n{json.dumps(changed(values, key, other))}"
        )  # it is YAML
        # No date is asked for: the run's own is taken.
        free = key == "task.date" or any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)
        if free:
            folder.check_writable()
        else:
            refusal = re.escape(f"another config's run ({key}: {other!r} there, ")
            with pytest.raises(ConfigError, match=refusal):
                folder.check_writable()


AFTER_OUT_OF_MEMORY = [
    "train.remat=true",
    "train.microbatch_tokens=4096",
    "sampling.slots=16",
    "sampling.hold_cache=never",
    "task.processes=1",
]


def test_a_change_is_written_down(run):
    assert folder_of(run).claim() == {}
    assert not (run / "changes.jsonl").exists()
    asked = [*AFTER_OUT_OF_MEMORY, "train.steps=90", "mesh.fsdp=2", "eval.every_steps=7"]
    folder = folder_of(run, *asked)
    folder.check_writable()
    changes = folder.claim()
    assert changes["train.remat"] == (False, True)
    assert changes["sampling.slots"] == (None, 16)
    assert changes.keys() == {key.partition("=")[0] for key in asked}
    [line] = [json.loads(line) for line in (run / "changes.jsonl").open()]
    assert line["step"] == 3
    assert line["changed"] == {key: list(values) for key, values in changes.items()}
    assert load_config(run / "config.yaml") == folder.config
    shown = io.StringIO()
    Display(Console(file=shown)).changed({"run.profile_steps": ([], [2])} | changes)
    assert "going on with run.profile_steps=[2], so far []\n" in shown.getvalue()
    assert "going on with train.remat=True, so far False\n" in shown.getvalue()


def test_how_far_a_run_goes_is_fixed_where_the_learning_rate_depends_on_it(run):
    folder_of(run, "train.steps=90").check_writable()
    edit(run, {"optimizer.schedule": "cosine"})
    with pytest.raises(ConfigError, match=r"train.steps: \d+ there, 90 asked"):
        folder_of(run, "optimizer.schedule=cosine", "train.steps=90").check_writable()


def test_a_run_of_an_older_version_goes_on(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(OLDER.read_text())
    folder = folder_of(tmp_path, config=OLDER)
    folder.check_writable()
    folder.check_same_policy()
    folder.claim()
    assert load_config(tmp_path / "config.yaml") == folder.config
    with pytest.raises(ConfigError, match=r"optimizer.b1: 0.9 there, 0.8 asked"):
        folder_of(tmp_path, "optimizer.b1=0.8", config=OLDER).check_writable()


@pytest.mark.parametrize(
    "missing", ["train.remat", "sampling.top_k", "mesh", "loss.importance_cap", "model.lora"]
)
def test_a_key_that_was_added_since_has_its_default(run, missing):
    edit(run, {missing: None})
    folder_of(run).check_writable()
    assert folder_of(run).claim() == {}


def test_a_key_that_was_added_since_is_compared_with_its_default(run):
    edit(run, {"sampling.top_k": None, "loss.kl": None})
    with pytest.raises(ConfigError, match=r"sampling.top_k: 0 there, 5 asked"):
        folder_of(run, "sampling.top_k=5").check_writable()


def test_a_run_of_a_newer_version_is_refused_by_its_keys(run):
    edit(run, {"train.warp": 9, "reset.localizer.haste": True, "novelty": {"x": 1}})
    before = (run / "config.yaml").read_text()
    for check in (RunFolder.check_writable, RunFolder.check_same_policy):
        with pytest.raises(ConfigError) as caught:
            check(folder_of(run))
        message = str(caught.value)
        assert message.startswith(f"{run}/config.yaml is a newer version's: this one doesn't know")
        for key in ("train.warp", "reset.localizer.haste", "novelty"):
            assert key in message
        assert message.endswith("update jaxreset, or name another run.dir")
    assert (run / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("steps", "asked"), [(0, []), (9, ["optimizer=muon", "learning_rate=0.02"])]
)
def test_an_older_warm_start_was_muons(tmp_path, steps, asked):
    """Without one, its rate is none of the run's business."""
    settings = "model.path=x", f"warm_start.steps={steps}", *(f"warm_start.{a}" for a in asked)
    folder = folder_of(tmp_path, *settings)
    folder.check_writable()
    folder.claim()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    older = {
        "warm_start.optimizer": None,
        "warm_start.path": None,
        "warm_start.learning_rate": 0.02,
    }
    edit(tmp_path, older)
    folder.check_writable()
    other = folder_of(tmp_path, *settings, "warm_start.learning_rate=0.3")
    if not steps:
        other.check_writable()
        return
    with pytest.raises(ConfigError, match=r"warm_start.learning_rate: .* there, 0.3 asked"):
        other.check_writable()


def test_what_an_older_version_allowed_is_compared_too(run):
    edit(run, {"train.epochs": 2, "mesh": None})  # without loss.clip that is refused by now
    with pytest.raises(ConfigError, match=r"run \(train.epochs: 2 there, 1 asked\)"):
        folder_of(run).check_writable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "isn't a run's"),
        ("objective: grpo\n", "isn't a run's"),
        (f"{DUMPED}\n", "isn't a run's config"),
        (f"{DUMPED}\nobjective: [", "config.yaml can't be read: .*bring it back from a backup"),
    ],
)
def test_a_broken_config_is_named(run, text, words):
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        folder_of(run).check_writable()


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", "\0\0\0\0", "\xff"])
def test_a_line_that_a_kill_cut_short_is_left_out(run, torn):
    folder = folder_of(run)
    for step in range(2):
        folder.log({"step": step})
    with folder.metrics.open("a") as file:
        file.write(torn)
    assert folder.history() == [{"step": 0}, {"step": 1}]
    folder.cut_back(1)
    folder.log({"step": 2})
    assert [line["step"] for line in folder.history()] == [0, 1, 2]


def test_another_line_that_is_broken_is_named(run):
    folder = folder_of(run)
    folder.metrics.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2 isn't JSON"):
        folder.history()


@pytest.fixture
def full_disk(monkeypatch):
    """What is opened for writing has a beginning of what is written, and no more."""
    opened = Path.open

    class Full(io.TextIOWrapper):
        def write(self, text):
            super().write(text[:5])
            self.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_on_it(path, mode="r", *args, **kwargs):
        full = mode in ("a", "w")
        return Full(opened(path, f"{mode}b")) if full else opened(path, mode, *args, **kwargs)

    def fill():
        monkeypatch.setattr(Path, "open", open_on_it)

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("config.yaml", RunFolder.claim),
        ("metrics.jsonl", lambda folder: folder.log({"step": 1})),
        ("metrics.jsonl", lambda folder: folder.complete({"step": 0, "eval/accuracy": 1.0})),
        ("rollouts/step_000001.jsonl", lambda folder: folder.save_trees(1, [{}])),
        ("nonfinite/step_000001.jsonl", lambda folder: folder.save_nonfinite(1, [{}])),
    ],
)
def test_a_full_disk_is_named_and_spoils_nothing(run, full_disk, name, write):
    folder = folder_of(run)
    folder.log({"step": 0})
    before = folder.saved.read_text()
    full_disk()
    full = re.escape(f"can't be written to {run}/{name}: No space left on device")
    with pytest.raises(RunError, match=full):
        write(folder)
    assert folder.saved.read_text() == before
    assert folder.history() == [{"step": 0}]
