"""Folders as data: images with same-named .txt files, or one folder a class."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from clipkit.data.rejects import Ledger
from clipkit.data.tables import TABLE_SUFFIXES, Table, read_text
from clipkit.errors import DataError
from clipkit.images import find_images
from clipkit.paths import show, walk
from clipkit.prompts import DEFAULT_TEMPLATE

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
_LAYOUTS = "images with same-named .txt files, or one folder of images a class"


def read_folder(folder: Path, ledger: Ledger, *, encoding: str) -> Table:
    """The images below a folder, with their captions (column `texts`) or their class (column `label`).

    A .txt file beside an image holds one caption a line. Without any .txt file the folders are the classes.

    Raises:
        DataError: neither layout fits; says what was found.
    """
    images = find_images(walk(folder))
    if not images:
        raise _no_images(folder)
    captions = {path for path in folder.rglob("*.txt") if not path.name.startswith(".")}
    if any(image.with_suffix(".txt") in captions for image in images):
        return _with_captions(folder, images, captions, ledger, encoding)
    return _with_classes(folder, images)


def _with_captions(folder: Path, images: list[Path], captions: set[Path], ledger: Ledger, encoding: str) -> Table:
    if unused := captions - {image.with_suffix(".txt") for image in images}:
        first = ", ".join(show(path) for path in sorted(unused)[:3])
        ledger.note(f"UNREFERENCED: {len(unused):,} .txt files without an image, e.g. {first}")
    texts = [_lines(image.with_suffix(".txt"), captions, encoding) for image in images]
    no_text = "the .txt file beside the image is missing or empty"
    return Table(show(folder), folder, {"image": _absolute(images), "texts": texts}, no_text=no_text)


def _lines(path: Path, captions: set[Path], encoding: str) -> list[str]:
    if path not in captions:
        return []
    lines = io.StringIO(read_text(path, encoding, empty_ok=True), newline=None)
    return [text for line in lines if (text := line.rstrip("\n")).strip()]


def _with_classes(folder: Path, images: list[Path]) -> Table:
    if tables := _tables(folder):
        message = "the folder holds images and a table, but no .txt file"
        raise DataError(message, where=show(folder), fix=f"pass the table itself: {show(tables[0])}")
    parts = [image.relative_to(folder).parts for image in images]
    loose = [image for image, inner in zip(images, parts, strict=True) if len(inner) == 1]
    if loose:
        raise DataError(
            f"NO_TEXT: expected {_LAYOUTS}; {len(loose):,} images lie in no class folder and have no .txt",
            where=show(loose[0]),
            fix="add the .txt files, move the images into class folders, or pass a table that lists them",
        )
    classes = {inner[0] for inner in parts}
    if classes <= _SPLITS:
        fix = f"pass one of them: {show(folder / min(classes))}"
        raise DataError(f"these folders look like splits, not classes: {', '.join(sorted(classes))}", fix=fix)
    visible = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if empty := sorted(visible - classes):
        fix = "remove it, or put images into it"
        raise DataError(f"EMPTY_CLASS: a class folder holds no image: {', '.join(empty)}", where=show(folder), fix=fix)
    columns: dict[str, Any] = {"image": _absolute(images), "label": [inner[0] for inner in parts]}
    return Table(show(folder), folder, columns, templates=(DEFAULT_TEMPLATE,))


def _absolute(paths: list[Path]) -> list[str]:
    return [str(path.absolute()) for path in paths]


def _tables(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES]


def _no_images(folder: Path) -> DataError:
    tables = _tables(folder)
    fix = f"pass the table itself: {show(tables[0])}" if tables else "check the folder"
    return DataError(f"EMPTY_TABLE: expected {_LAYOUTS}; found no image", where=show(folder), fix=fix)
