"""Disks that are full or can't be written: asked before what is large, and named where a write fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxreset.errors import RunError

# No room on the disk, in the user's share of it, or in a file.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

WRITTEN_AT_ONCE = (
    2**27
)  # bytes of a checkpoint; more are not compressed before others are on the disk


def free_bytes(path: Path) -> int | None:
    """Bytes that are free on the disk where `path` is or would be; None: it can't be told."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue  # not there yet, or not to be seen
    return None


def check_room(path: Path, needed: int, what: str) -> None:
    """Raises `RunError` where the disk has less than `needed` bytes left for `what`."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise _refusal(path, os.strerror(errno.ENOSPC), what, needed, errno.ENOSPC)


@contextmanager
def writing(path: Path, what: str, needed: int | None = None) -> Iterator[None]:
    """Inside, `what` is written to `path`; what the system says against it becomes a `RunError`.

    Other errors pass, `FileExistsError` among them.

    Args:
      path: file or folder.
      what: as the message calls it.
      needed: its bytes, where they are known.
    """
    try:
        yield
    except Exception as error:
        number = system_error(error)
        if number is None or isinstance(error, FileExistsError):
            raise
        raise _refusal(path, os.strerror(number), what, needed, number) from error


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Inside, many things are done; an error that can only be a full disk becomes a `RunError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL | {errno.EROFS}:
            raise
        place = Path(os.fsdecode(error.filename)) if error.filename else path
        raise _refusal(
            place, os.strerror(error.errno), "what the run found", None, error.errno
        ) from error


def system_error(error: BaseException) -> int | None:
    """The system's number of an error, also where a library tells of it in its own words."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(
        r"\(os error (\d+)\)", str(error)
    )  # as safetensors and tokenizers, in Rust, do
    return int(told[1]) if told else None


def size_text(count: float) -> str:
    """So many bytes, to be read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def room(path: Path, needed: int | None = None) -> str:
    """What is needed and what is free, as far as either is known; else nothing."""
    free = free_bytes(path)
    parts = [] if needed is None else [f"it takes {size_text(needed)}"]
    if free is not None:
        parts.append(f"{size_text(free)} are free on the disk of {path}")
    return ", ".join(parts)


def _refusal(path: Path, reason: str, what: str, needed: int | None, number: int) -> RunError:
    known = room(path, needed) if number in FULL else ""
    remedy = "make room there" if number in FULL else "make it writable"
    return RunError(
        f"{what} can't be written to {path}: {reason}{f' ({known})' if known else ''}; {remedy}, or name "
        "another place"
    )


def refuse_existing(path: str | Path) -> Path:
    """The absolute path of a folder that doesn't exist or is empty.

    Raises:
      FileExistsError: something is there.
    """
    path = Path(path).expanduser().absolute()
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another name")
    return path


@contextmanager
def new_folder(path: str | Path, needed: int) -> Iterator[Path]:
    """A folder to write to, which stands beside `path` and in the end becomes it: whole or not at all.

    Args:
      path: a folder that does not exist or is empty.
      needed: bytes that will be written, about.

    Raises:
      FileExistsError: something is at `path`.
      RunError: the disk has no room, or can't be written.
    """
    path, what = refuse_existing(path), "the export"
    check_room(path, needed, what)
    partial = path.with_name(path.name + ".partial")
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        with writing(path, what, needed):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                _flush(file)
            if path.exists():
                path.rmdir()
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # somebody else may have begun to use it
                folder.rmdir()
        raise


def _flush(file: Path) -> None:
    """Some disks notice only here that they are full."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
