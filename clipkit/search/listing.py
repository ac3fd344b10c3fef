"""Which image files are meant by a folder, one file, or a list."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from clipkit.errors import DataError, UsageError
from clipkit.images import describe, find_images
from clipkit.paths import walk


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """The images below a folder, sorted, or the one file that `path` is.

    Raises:
        DataError: there is nothing at `path`, or a folder without an image.
    """
    if Path(path).is_file():
        return [Path(path)]
    found = find_images(walk(path))
    if not found:
        raise DataError("there is no image here", where=path, fix="check the folder; images are told by their suffix")
    return found


def listed(images: str | os.PathLike[str] | Iterable[object]) -> tuple[Path | None, list[Path]]:
    """The folder, if one was given, and the absolute paths of the images, each once.

    Raises:
        DataError: the folder does not exist.
        UsageError: an item of a list is no path.
    """
    if isinstance(images, (str, os.PathLike)):
        root = Path(images).absolute()
        return root, find_images(walk(root))
    files: list[Path] = []
    for row, item in enumerate(images):
        if not isinstance(item, (str, os.PathLike)):
            message = f"an index is made of files, found {describe(item)}"
            raise UsageError(message, where=f"item {row}", fix="save the images, or use embed() on them")
        files.append(Path(item).absolute())
    return None, list(dict.fromkeys(files))
