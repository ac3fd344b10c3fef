"""The index that already exists at the path to write: whether it is one of the same folder."""

from __future__ import annotations

import os
from pathlib import Path

from clipkit.errors import UsageError, option
from clipkit.paths import show
from clipkit.search.index import EmbeddingIndex

_SQLITE_HEADER = b"SQLite format 3\0"


def open_existing(path: Path, folder: Path) -> EmbeddingIndex | None:
    """Return the index at `path`, to be updated; None if nothing is there.

    A folder that moved is recognised by its files: the old folder is gone, and most of the files are below the new one.

    Raises:
        UsageError: `path` holds an index of something else, or another kind of file.
        CorruptArtefact: `path` holds a database that is not an index, or a damaged one.
    """
    if not path.exists():
        return None
    if not path.is_file() or not _is_database(path):
        raise UsageError(
            "there is something at this path that is not an index", where=show(path), fix="choose another path"
        )
    index = EmbeddingIndex.open(path)
    if index.root is not None and _same_folder(index.root, folder):
        return index
    if index.root is not None and not index.root.exists() and folder.is_dir() and _holds_most_of(index, folder):
        return EmbeddingIndex.open(path, root=folder)
    content = "a list of files" if index.root is None else f"another folder: {show(index.root)}"
    overwrite = option("overwrite", python="overwrite=True")
    fix = f"write to another file; or {overwrite} replaces this index by one of {show(folder)}"
    raise UsageError(f"at this path is an index of {content}", where=show(path), fix=fix)


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_SQLITE_HEADER)) == _SQLITE_HEADER


def _same_folder(root: Path, folder: Path) -> bool:
    try:
        return root.absolute() == folder.absolute() or root.samefile(folder)
    except OSError:
        return False


def _holds_most_of(index: EmbeddingIndex, folder: Path) -> bool:
    assert index.root is not None
    exists = [os.path.exists(folder / path.relative_to(index.root)) for path in index.paths]  # noqa: PTH110
    return 2 * sum(exists) > len(exists)
