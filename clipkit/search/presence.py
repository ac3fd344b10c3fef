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


class Present:
    """Which rows of an index have their file; each is looked up once, and only if it is asked for.

    Args:
        paths: one a row.
        root: the folder that was indexed.
        index: the index file, for messages.
        needed: whether files that are gone are to be left out.

    Raises:
        DataError: files are needed, and there is no such folder.
    """

    def __init__(self, paths: Sequence[Path], root: Path | None, index: Path | None, *, needed: bool) -> None:
        self.paths, self.needed = paths, needed
        self._known: dict[int, bool] = {}
        if needed:
            require_root(root, index)

    def __getitem__(self, row: int) -> bool:
        if row not in self._known:
            self._known[row] = os.path.exists(self.paths[row])  # noqa: PTH110 (raises nothing)
        return self._known[row]

    def tell(self) -> None:
        """Says what was left out."""
        gone = [row for row, there in self._known.items() if not there]
        if self.needed and gone:
            asked = option("missing", python="missing=True")
            log.warning(
                "left out: %d files that are no longer there, such as %s (update the index; %s shows them)",
                len(gone), show(self.paths[gone[0]]), asked,
            )  # fmt: skip


def require_root(root: Path | None, index: Path | None) -> None:
    """Refuses a folder that is not there: it moved, or its disk is not mounted.

    Raises:
        DataError: so it is.
    """
    if root is None or root.is_dir():
        return
    now = option("root", "FOLDER", python="EmbeddingIndex.open(path, root=FOLDER)")
    raise DataError(
        f"the folder that was indexed is not there: {show(root)}",
        where=None if index is None else show(index),
        fix=f"mount it; or, if it moved, say where it is now: {now}",
    )


def moved_to(catalogue: Catalogue, root: Path, index: Path) -> Catalogue:
    """The same index, of the same files below another folder.

    Raises:
        UsageError: it is an index of a list of files, which have no common folder.
        DataError: none of its files is there.
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
