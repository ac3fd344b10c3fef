"""The image files of a folder, of one path, or of a list."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipkit.data.reading.rejects import LoadReport, OnBad, Reject, unreadable_folders
from clipkit.errors import DataError, UsageError
from clipkit.images.load import describe, find_images
from clipkit.paths import walk

log = logging.getLogger("clipkit")


@dataclass(frozen=True)
class Listing:
    """The image files to label or to index.

    Attributes:
        root: the folder, if one was given.
        files: the images, each once; below a folder sorted by name.
        unreadable: folders below the root that could not be listed.
        rejected: the same folders as rejects, numbered after the files.
    """

    root: Path | None
    files: Sequence[Path]
    unreadable: Sequence[Path] = ()
    rejected: list[Reject] = field(default_factory=list)

    def load_report(self) -> LoadReport:
        """Return the counts so far; the caller adds the images that cannot be decoded."""
        n = len(self.files)
        return LoadReport(rows=n + len(self.rejected), used=n, images=n, rejects=list(self.rejected))


def list_images(path: str | os.PathLike[str], *, on_bad: OnBad = "skip") -> Listing:
    """Return the images below a folder, or `path` itself if it is a file.

    Raises:
        DataError: `path` does not exist, or is a folder without an image; or a folder cannot be listed, and
            `on_bad` is "error".
    """
    if Path(path).is_file():
        return Listing(None, [Path(path)])
    listing = _list_folder(Path(path), on_bad)
    if not listing.files:
        raise DataError(
            "there is no image here", where=path, fix="check the folder; images are recognised by their suffix"
        )
    return listing


def list_files(images: str | os.PathLike[str] | Iterable[object], *, on_bad: OnBad = "skip") -> Listing:
    """Return the absolute paths of the images below a folder, or of those in a list.

    Raises:
        DataError: the folder does not exist; or one below it cannot be listed, and `on_bad` is "error".
        UsageError: an item of a list is not a path.
    """
    if isinstance(images, (str, os.PathLike)):
        return _list_folder(Path(images).absolute(), on_bad)
    files: list[Path] = []
    for row, item in enumerate(images):
        if not isinstance(item, (str, os.PathLike)):
            message = f"an index is made of files, found {describe(item)}"
            raise UsageError(message, where=f"item {row}", fix="save the images, or use embed() on them")
        files.append(Path(item).absolute())
    return Listing(None, list(dict.fromkeys(files)))


def _list_folder(root: Path, on_bad: OnBad) -> Listing:
    tree = walk(root)
    files = find_images(tree)
    rejected = unreadable_folders(tree, row=len(files))
    if rejected and on_bad == "error":
        raise DataError(rejected[0].message, where=rejected[0].where, code=rejected[0].code)
    unused = tree.passed_over(files)
    if unused is not None:
        log.info(unused)
    return Listing(root, files, list(tree.unreadable), rejected)
