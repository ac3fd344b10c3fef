"""The index that stands where one is to be built: whether it is that of the same folder."""

from __future__ import annotations

import os
from pathlib import Path

from clipkit.errors import UsageError, option
from clipkit.paths import show
from clipkit.search.index import EmbeddingIndex

_MARK = b"SQLite format 3\0"


def index_of_folder(path: Path, folder: Path) -> EmbeddingIndex | None:
    """The index at `path`, to be updated; None if there is nothing.

    A folder that moved is known by its files: the old one is gone, and most of them are below the new one.

    Raises:
        UsageError: it is an index of something else.
        CorruptArtefact: it is none, or damaged.
    """
    if not path.exists():
        return None
    if not path.is_file() or not _is_database(path):
        raise UsageError(
            "there is something at this path that is no index", where=show(path), fix="choose another path"
        )
    index = EmbeddingIndex.open(path)
    if index.root is not None and _same(index.root, folder):
        return index
    if index.root is not None and not index.root.exists() and folder.is_dir() and _holds_most_of(index, folder):
        return EmbeddingIndex.open(path, root=folder)
    of = "a list of files" if index.root is None else f"another folder: {show(index.root)}"
    again = option("overwrite", python="overwrite=True")
    fix = f"write to another file; or {again} replaces this index by one of {show(folder)}"
    raise UsageError(f"at this path is an index of {of}", where=show(path), fix=fix)


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK


def _same(root: Path, folder: Path) -> bool:
    try:
        return root.absolute() == folder.absolute() or root.samefile(folder)
    except OSError:
        return False


def _holds_most_of(index: EmbeddingIndex, folder: Path) -> bool:
    assert index.root is not None
    there = [os.path.exists(folder / path.relative_to(index.root)) for path in index.paths]  # noqa: PTH110
    return 2 * sum(there) > len(there)
