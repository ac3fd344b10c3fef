"""Metadata files among the images, as the ImageFolder of `datasets` reads them: file_name, and what is known of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipkit.data.reading.caption_files import CaptionFiles
from clipkit.data.reading.columns import TEXT_NAMES, obvious
from clipkit.data.reading.rejects import Reject
from clipkit.data.reading.table import Table, absolute
from clipkit.data.reading.tables import read_table
from clipkit.data.reading.text_files import TextFormat
from clipkit.errors import DataError
from clipkit.paths import Tree, show

_PATHS = ("file_name", "hard_images")


def is_metadata(path: Path) -> bool:
    return path.stem.lower() == "metadata" and path.suffix.lower() in (".csv", ".jsonl", ".parquet")


def read_metadata(
    tree: Tree, images: Sequence[Path], files: Sequence[Path], captions: CaptionFiles, form: TextFormat
) -> Table:
    """The rows of all metadata files, and one for each image that none of them names, with the captions beside it.

    Where the files have no column of texts, all captions are those beside the images.

    Raises:
        DataError: two files in one folder; one without the column file_name; as `read_table`.
    """
    columns: dict[str, list[Any]] = {"file_name": []}
    places: list[str] = []
    rejects: list[Reject] = []
    for table in _tables(files, form):
        for name in table.names:
            columns.setdefault(name, [None] * len(places))
        for name, cells in columns.items():
            more = table.cells(name) if name in table.names else [None] * len(table)
            cells += [absolute(table.root, cell) for cell in more] if name in _PATHS else more
        places += map(table.where, range(len(table)))
        rejects += table.rejects
    _add_captions(columns, {os.path.abspath(image): image for image in images}, captions)  # noqa: PTH100 (no links)
    places += [show(tree.root / os.path.relpath(cell, tree.root)) for cell in columns["file_name"][len(places) :]]
    no_text = "neither a metadata file nor a caption file says what is on it"
    return Table(show(tree.root), tree.root, columns, places=places, rejects=rejects, no_text=no_text)


def _tables(files: Sequence[Path], form: TextFormat) -> Iterator[Table]:
    folders = Counter(path.parent for path in files)
    for path in files:
        if folders[path.parent] > 1:
            message = "there are two metadata files in one folder"
            raise DataError(message, where=show(path.parent), fix=f"move one out of the way: {show(path)}")
        table = read_table(path, form)
        if "file_name" not in table.names:
            raise DataError(
                f"a metadata file names its images in the column file_name; there are {', '.join(table.names)}",
                code="COLUMN",
                where=show(path),
                fix=f"rename that column, or pass the table itself: {show(path)}",
            )
        yield table


def _add_captions(columns: dict[str, list[Any]], images: dict[str, Path], captions: CaptionFiles) -> None:
    """Rows for images that are not among the columns yet; and captions where no metadata file has any."""
    named = columns["file_name"]
    missing = images.keys() - {cell for cell in named if isinstance(cell, str)}
    rows = len(named)
    named += sorted(missing)
    for name, cells in columns.items():
        if name != "file_name":
            cells += [None] * (len(named) - len(cells))
    beside = [captions.of(images[cell]) if cell in images else None for cell in named]
    text = obvious(list(columns), TEXT_NAMES)
    if text is not None:
        columns[text][rows:] = beside[rows:]
    elif any(captions is not None for captions in beside):
        columns["texts"] = beside
