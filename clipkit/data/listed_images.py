"""The images that a table names, whatever else it says of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clipkit.data.reading.columns import image_column
from clipkit.data.reading.image_column import ImageColumn
from clipkit.data.reading.rejects import LoadReport, OnBad, Reject, check_policy
from clipkit.data.reading.sources import open_source
from clipkit.data.reading.tables import TABLE_SUFFIXES
from clipkit.data.reading.text_files import Quoting, checked_format
from clipkit.errors import BadImage
from clipkit.paths import show


def names_images(source: str | os.PathLike[str], separator: str | None = None) -> bool:
    """Whether a source is a table or a data set that names images, and not a folder of images or one image."""
    path = Path(source)
    if path.is_dir():
        return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    return separator is not None or path.suffix.lower() in TABLE_SUFFIXES or not path.exists()


def load_images(
    source: str | os.PathLike[str],
    *,
    image: str | None = None,
    split: str = "train",
    separator: str | None = None,
    encoding: str = "utf-8-sig",
    quoting: Quoting = "double",
    on_bad: OnBad = "error",
    max_bad: int | float = 0.1,
    rejects: str | os.PathLike[str] | None = None,
    ledger: LoadReport | None = None,
) -> tuple[list[str], list[Any]]:
    """Return the names of the images as in the table, and the images; each file once, at the row that names it first.

    Embedded images without a name are named after their row.

    Args:
        source: a table, a folder that `save_to_disk` wrote, or the name (org/name) of a data set of the hub.
        image: column of the images.
        split, separator, encoding, quoting, on_bad, max_bad, rejects, ledger: as for `load_pairs`.

    Raises:
        DataError, TooManyRejected: as for `load_pairs`.
    """
    check_policy(on_bad, max_bad)
    ledger = LoadReport() if ledger is None else ledger
    table = open_source(source, ledger, split=split, form=checked_format(separator, encoding, quoting))
    column = image_column(table, image)
    images_of_rows = ImageColumn.of(table, column)
    ledger.rows = len(table) + len(table.rejects)
    ledger.rejects += table.rejects
    rows: dict[str | int, list[int]] = {}
    for index in range(len(table)):
        try:
            rows.setdefault(images_of_rows.key(index), []).append(index)
        except BadImage as bad:
            name = images_of_rows.paths[index]
            shown = show(name) if isinstance(name, str) else None
            ledger.rejects.append(Reject(table.row(index), bad.code, bad.reason, table.where(index), shown))
    ledger.used, ledger.images = sum(map(len, rows.values())), len(rows)
    groups = list(rows.values())
    ledger.origin = lambda row: [(table.row(index), table.where(index)) for index in groups[row]]
    ledger.settle(table.name, on_bad=on_bad, max_bad=max_bad, rejects=rejects)
    cells = images_of_rows.table.columns[column] if images_of_rows.sizes is not None else None
    images = [key if isinstance(key, str) or cells is None else cells[key] for key in rows]
    return [images_of_rows.paths[group[0]] or table.where(group[0]) for group in groups], images
