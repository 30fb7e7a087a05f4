"""Disks without room: what is said, what is cleaned up, and what is left alone."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import TINY
from model_helpers import random_policy

from jaxreset import disk
from jaxreset.disk import check_room, free_bytes, naming_full_disk, system_error, writing
from jaxreset.errors import RunError
from jaxreset.models import huggingface

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def full(monkeypatch):
    """A disk with 1000 bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))


def limited(size):
    """Files can't be longer than this, as a disk is full in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def whole(tokenizer):
    return random_policy(TINY, tokenizer)


@pytest.mark.parametrize(
    ("size", "adapters"), [(100, False), (1000, False), (20_000, False), (1000, True)]
)
def test_a_disk_that_is_full_in_the_middle_of_an_export_is_named_and_cleaned(
    tmp_path, whole, adapters, size
):
    """In the first file, in the weights, or in the tokenizer, by whichever library."""
    policy = whole.with_lora(8, 8.0, targets=("q",)) if adapters else whole
    path = tmp_path / "new" / "models" / "mine"
    (tmp_path / "new").mkdir()
    restore = limited(size)
    try:
        with pytest.raises(RunError) as refused:
            policy.export_adapters(path, base="b") if adapters else policy.export(path)
    finally:
        restore()
    assert f"the export can't be written to {path}: File too large (it takes " in str(refused.value)
    assert f" are free on the disk of {path}); make room there" in str(refused.value)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    policy.export_adapters(path, base="b") if adapters else policy.export(path)
    assert [f.name for f in path.parent.iterdir()] == ["mine"]


def test_room_is_asked_for_before_anything_is_written(tmp_path, whole, full):
    kept = tmp_path / "mine"
    kept.mkdir()
    with pytest.raises(
        RunError, match=r"No space left on device \(it takes .*, 1000.0 B are free on"
    ):
        whole.export(kept)
    assert list(tmp_path.iterdir()) == [kept]


def test_the_room_that_is_asked_for_is_what_tensors_take(tmp_path, whole):
    folder = whole.export(tmp_path / "model")
    file = folder / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert huggingface.bytes_of(whole.config) == file.stat().st_size - 8 - header


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO]
)
@pytest.mark.parametrize("function", ["mkdir", "rename"])
def test_whatever_the_system_has_against_an_export_is_said(
    tmp_path, whole, monkeypatch, number, function
):
    real = getattr(Path, function)

    def refuse(path, *args, **kwargs):
        if path.name.endswith(".partial"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, function, refuse)
    with pytest.raises(
        RunError, match=f"can't be written to {tmp_path}/a/model: {os.strerror(number)}"
    ):
        whole.export(tmp_path / "a" / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path, whole):
    for make in (
        Path.touch,
        lambda p: (p.mkdir(), (p / "notes").touch()),
        lambda p: p.symlink_to("?"),
    ):
        path = tmp_path / "there"
        make(path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match="there exists and is not an empty folder"):
            whole.export(path)
        assert sorted(tmp_path.rglob("*")) == before
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="Not a directory"):
        whole.export(tmp_path / "file" / "model")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, whole, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        whole.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_errors_of_libraries_are_the_systems():
    assert system_error(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert system_error(Exception("I/O error: No space left on device (os error 28)")) == 28
    assert system_error(ValueError("28")) is None
    with pytest.raises(ValueError, match="mine"), writing(Path("x"), "it"):
        raise ValueError("mine")
    with (
        pytest.raises(RunError, match="it can't be written to x: No space left"),
        writing(Path("x"), "it"),
    ):
        raise Exception("(os error 28)")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError(errno.ENOSPC, "", "/there"),
            RunError,
            "to /there: No space .* free on the disk of /there",
        ),
        (OSError(errno.EDQUOT, ""), RunError, "to /run: Disk quota exceeded"),
        (FileNotFoundError(errno.ENOENT, "gone"), FileNotFoundError, "gone"),
    ],
)
def test_what_can_only_be_a_full_disk_is_called_so(error, kind, words):
    with pytest.raises(kind, match=words), naming_full_disk(Path("/run")):
        raise error


def test_free_room(tmp_path, monkeypatch):
    assert free_bytes(tmp_path / "not" / "there") > 0
    check_room(tmp_path, 1, "it")

    def unknown(path):
        raise OSError

    monkeypatch.setattr(disk.shutil, "disk_usage", unknown)
    assert free_bytes(tmp_path) is None
    check_room(tmp_path, 2**60, "it")
