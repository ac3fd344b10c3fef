"""The ownership of a run folder: it is claimed before a run, locked during it, and cleaned up after a kill."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clipkit import distributed
from clipkit.errors import UsageError, option
from clipkit.files import resource_errors

IDENTITY = "identity.json"  # the fingerprint of the run in a folder
NAME = ".lock"


def what_stands(folder: Path) -> list[str]:
    """Return the names of the files and folders that a run has left in a folder."""
    return [name for name in ("metrics.jsonl", "model", "checkpoints") if (folder / name).exists()]


def claim_folder(folder: Path, *, may_resume: bool = False) -> Path:
    """Create the folder of a run, on every process of a launcher.

    Args:
        folder: the run's `output_dir`.
        may_resume: whether a run that the folder contains may be resumed.

    Raises:
        UsageError: the path is a file, or the folder contains another run or a model.
        ResourceError: the folder cannot be written.
    """
    distributed.on_main(lambda: _claim(folder, may_resume))
    return folder


def _claim(folder: Path, may_resume: bool) -> None:
    contents = what_stands(folder)
    if folder.is_file():
        raise UsageError("the output folder is a file", where=folder, fix=f"choose another {option('output_dir')}")
    if contents and not may_resume and (folder / IDENTITY).is_file():
        raise UsageError(
            "the output folder holds another run",
            where=folder / contents[0],
            fix=f"{option('resume', 'auto')} goes on with it; else choose another {option('output_dir')}",
        )
    if contents and not (folder / IDENTITY).is_file():
        raise UsageError(
            f"the output folder holds {contents[0]!r}, but not a run that could be resumed: it has no {IDENTITY}",
            where=folder,
            fix=f"choose another {option('output_dir')}",
        )
    with resource_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileNotFoundError, FileExistsError) as error:
            message = f"the output folder cannot be made: {error.strerror}"
            raise UsageError(message, where=error.filename, fix=f"choose another {option('output_dir')}") from error
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")


def clean_up(folder: Path) -> None:
    """Remove what a killed process left half written in a run folder; restore a model that was being replaced."""
    for parent in (folder, folder / "checkpoints"):
        for leftover in [*parent.glob(".*.tmp"), *parent.glob(".*.trash")]:
            target = parent / leftover.name[1:].rpartition(".")[0].rpartition(".")[0]
            if (leftover / "old").exists() and not target.exists():
                (leftover / "old").rename(target)
            shutil.rmtree(leftover, ignore_errors=True)


@dataclass
class _Lock:
    file: TextIO
    times: int = 0  # that this process took it


_locks: dict[tuple[int, Path], _Lock] = {}  # by process and folder: a forked child does not have its parent's locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder; rank 0 does so for all. A lock ends with its process, however that ends.

    It is a POSIX record lock: worker processes do not inherit it, and it works over NFS. A process that has it may
    take it again.

    Raises:
        UsageError: another process has locked it; names that process.
    """
    key = os.getpid(), folder.resolve()
    distributed.on_main(lambda: _acquire(key, folder))
    try:
        yield
    finally:
        if distributed.is_main():
            _release(key)


def _acquire(key: tuple[int, Path], folder: Path) -> None:
    if key not in _locks:
        _locks[key] = _Lock(_lock_file(folder))
    _locks[key].times += 1


def _lock_file(folder: Path) -> TextIO:
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "its name is not known"
        file.close()
        raise UsageError(
            f"another process writes to this folder: {owner}",
            where=folder,
            fix=f"wait for it or stop it, or choose another {option('output_dir')}",
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _release(key: tuple[int, Path]) -> None:
    lock = _locks[key]
    lock.times -= 1
    if lock.times == 0:
        _locks.pop(key).file.close()
