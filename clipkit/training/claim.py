"""Whose a run folder is: claimed before a run, tidied where one was killed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

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
