"""One writer for the folder of a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from clipkit.errors import UsageError

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder while the block runs. The system lets go of it when the process ends, however it ends.

    Raises:
        UsageError: another process holds it; it is named.
    """
    path = folder / NAME
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"another process is writing here: {file.read().strip() or 'unknown'}",
                where=folder,
                fix="wait for it, stop it, or choose another output_dir",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}@{socket.gethostname()}\n")
        file.flush()
        yield
