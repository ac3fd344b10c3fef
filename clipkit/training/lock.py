"""One writer for each run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clipkit import distributed
from clipkit.errors import UsageError, option
from clipkit.files import resource_errors

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
