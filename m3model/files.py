"""Files that outlive a crash: whole or not there, on disk before anything relies on them, written by one process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["flush", "free_room", "locked", "whole_file", "write_whole"]


@contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """A file to write that appears under its name when the block ends well, and then survives a loss of power.

    Args:
        writer: part of the temporary name .NAME[.WRITER].new, where several processes may write files of one name.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file of that name is untouched then.
    """
    fresh = path.with_name(".".join(["", path.name, *([writer] if writer else []), "new"]))
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    flush(path.parent)


def write_whole(path: Path, content: bytes | str, writer: str = "") -> None:
    """Write bytes, or text as UTF-8, by `whole_file`."""
    with whole_file(path, writer) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Write a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_room(path: Path) -> str:
    """How much a disk still takes, for messages of writers that do not name a full disk as such (torch.save)."""
    path = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return f"{shutil.disk_usage(path).free / 2**20:.1f} MiB are free there"


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock that the file `path` stands for; it falls with the process, however that ends.

    Raises:
        RuntimeError: another process holds it; says `taken`.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(taken) from error
        yield
