"""Whether the files of an index are still where it says, and what to do if they are not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from clipkit.errors import DataError, UsageError, option
from clipkit.paths import show
from clipkit.search.index_file import Header, look_up

log = logging.getLogger("clipkit")


class FilePresence:
    """Which files of an index exist; each is looked up once.

    Args:
        paths: the paths of some rows.
        required: whether missing files are to be left out.
    """

    def __init__(self, paths: Callable[[Iterable[int]], Mapping[int, Path]], *, required: bool) -> None:
        self.required = required
        self._read_paths = paths
        self._paths: dict[int, Path] = {}
        self._exists: dict[int, bool] = {}

    def add(self, rows: Iterable[int]) -> None:
        """Look up the files of these rows."""
        new = self._read_paths(set(rows) - self._paths.keys())
        self._paths.update(new)
        self._exists.update({row: os.path.exists(path) for row, path in new.items()})  # noqa: PTH110 (raises nothing)

    def path(self, row: int) -> Path:
        return self._paths[row]

    def exists(self, row: int) -> bool:
        return self._exists[row]

    def log_missing(self) -> None:
        """Log how many files were left out."""
        missing = [row for row, exists in self._exists.items() if not exists]
        if self.required and missing:
            log.warning(
                "left out: %d files that are no longer there, such as %s (update the index; %s shows them)",
                len(missing), show(self._paths[min(missing)]), option("missing", python="missing=True"),
            )  # fmt: skip


def require_root(root: Path | None, index: Path | None) -> None:
    """Refuse a folder that does not exist: it moved, or its disk is not mounted.

    Args:
        root: the folder that was indexed; None for a list of files, which is not refused.
        index: the index file, for the message.

    Raises:
        DataError: the folder does not exist.
    """
    if root is None or root.is_dir():
        return
    new_root = option("root", "FOLDER", python="EmbeddingIndex.open(path, root=FOLDER)")
    raise DataError(
        f"the folder that was indexed is not there: {show(root)}",
        where=None if index is None else show(index),
        fix=f"mount it; or, if it moved, say where it is now: {new_root}",
    )


def relocated(header: Header, root: Path, index: Path) -> Header:
    """Return the same header, with its files below another folder.

    Raises:
        UsageError: it is an index of a list of files, which have no common folder.
        DataError: none of its files is below `root`.
    """
    if header.root is None:
        fix = "leave the folder out, or index the folder"
        raise UsageError("this is an index of a list of files, not of a folder", where=show(index), fix=fix)
    moved = replace(header, root=root.absolute())
    for start in range(0, header.rows, 1000):
        entries = look_up(index, header.generation, range(start, min(start + 1000, header.rows)))
        if any(os.path.exists(moved.path_of(entry)) for entry in entries.values()):  # noqa: PTH110
            return moved
    raise DataError(
        f"none of the {header.rows:,} files of the index is below this folder",
        where=show(root),
        fix=f"give the folder that was {show(header.root)}",
    )
