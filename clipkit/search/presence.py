"""Whether the files of an index are still where it says, and what to do if they are not."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipkit.errors import DataError, UsageError, option
from clipkit.paths import show
from clipkit.search.index_file import Catalogue

log = logging.getLogger("clipkit")


class FilePresence:
    """Which rows of an index have their file; each is looked up once, and only on request.

    Args:
        paths: one a row.
        root: the folder that was indexed.
        index: the index file, for messages.
        required: whether missing files are to be left out.

    Raises:
        DataError: files are required, and the folder does not exist.
    """

    def __init__(self, paths: Sequence[Path], root: Path | None, index: Path | None, *, required: bool) -> None:
        self.paths, self.required = paths, required
        self._known: dict[int, bool] = {}
        if required:
            require_root(root, index)

    def exists(self, row: int) -> bool:
        """Whether the file of a row exists."""
        if row not in self._known:
            self._known[row] = os.path.exists(self.paths[row])  # noqa: PTH110 (raises nothing)
        return self._known[row]

    def log_missing(self) -> None:
        """Log how many files were left out."""
        missing = [row for row, exists in self._known.items() if not exists]
        if self.required and missing:
            log.warning(
                "left out: %d files that are no longer there, such as %s (update the index; %s shows them)",
                len(missing), show(self.paths[missing[0]]), option("missing", python="missing=True"),
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


def relocated(catalogue: Catalogue, root: Path, index: Path) -> Catalogue:
    """Return the same catalogue, with its files below another folder.

    Raises:
        UsageError: it is an index of a list of files, which have no common folder.
        DataError: none of its files is below `root`.
    """
    if catalogue.root is None:
        fix = "leave the folder out, or index the folder"
        raise UsageError("this is an index of a list of files, not of a folder", where=show(index), fix=fix)
    moved = replace(catalogue, root=root.absolute())
    if catalogue.entries and not any(os.path.exists(moved.path_of(entry)) for entry in catalogue.entries):  # noqa: PTH110
        raise DataError(
            f"none of the {len(catalogue.entries):,} files of the index is below this folder",
            where=show(root),
            fix=f"give the folder that was {show(catalogue.root)}",
        )
    return moved
