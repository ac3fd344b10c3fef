"""Whose a run folder is: claimed before a run, tidied where one was killed."""

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

IDENTITY = "identity.json"  # what makes the run in a folder that run


def what_stands(folder: Path) -> list[str]:
    """What a run has left in a folder that is worth keeping."""
    return [name for name in ("metrics.jsonl", "model", "checkpoints") if (folder / name).exists()]


def claim_folder(folder: Path, *, may_resume: bool = False) -> Path:
    """Create the folder of a run, on every process of a launcher.

    Args:
        folder: the run's `output_dir`.
        may_resume: whether a run that stands there already may go on.

    Raises:
        UsageError: another run, another model, or a file stands there.
        ResourceError: it cannot be written.
    """
    distributed.on_main(lambda: _claim(folder, may_resume))
    return folder


def _claim(folder: Path, may_resume: bool) -> None:
    taken = what_stands(folder)
    if folder.is_file():
        raise UsageError("the output folder is a file", where=folder, fix=f"choose another {option('output_dir')}")
    if taken and not may_resume and (folder / IDENTITY).is_file():
        raise UsageError(
            "the output folder holds another run",
            where=folder / taken[0],
            fix=f"{option('resume', 'auto')} goes on with it; else choose another {option('output_dir')}",
        )
    if taken and not (folder / IDENTITY).is_file():
        raise UsageError(
            f"the output folder holds {taken[0]!r}, and is no run that could go on: it has no {IDENTITY}",
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
    """Remove what a killed process left half written in a run folder; a model that was being replaced comes back."""
    for place in (folder, folder / "checkpoints"):
        for room in [*place.glob(".*.tmp"), *place.glob(".*.trash")]:
            target = place / room.name[1:].rpartition(".")[0].rpartition(".")[0]
            if (room / "old").exists() and not target.exists():
                (room / "old").rename(target)
            shutil.rmtree(room, ignore_errors=True)


NAME = ".lock"


@dataclass
class _Held:
    file: TextIO
    times: int = 0


_held: dict[tuple[int, Path], _Held] = {}  # by process and folder: a forked child does not hold what its parent does


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; rank 0 does so for all. A lock ends with its process, however that ends.

    It is a POSIX record lock: worker processes do not inherit it, and it holds over NFS. A process that holds it may
    take it again.

    Raises:
        UsageError: another process holds it; names that process.
    """
    key = os.getpid(), folder.resolve()
    distributed.on_main(lambda: _take(key, folder))
    try:
        yield
    finally:
        if distributed.is_main():
            _give_back(key)


def _take(key: tuple[int, Path], folder: Path) -> None:
    if key not in _held:
        _held[key] = _Held(_lock(folder))
    _held[key].times += 1


def _lock(folder: Path) -> TextIO:
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "its name is not known"
        file.close()
        raise UsageError(
            f"another process writes to this folder: {holder}",
            where=folder,
            fix=f"wait for it or stop it, or choose another {option('output_dir')}",
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _give_back(key: tuple[int, Path]) -> None:
    held = _held[key]
    held.times -= 1
    if not held.times:
        _held.pop(key).file.close()
