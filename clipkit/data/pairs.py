"""Read images and their texts from tables, folders and data sets into one kind of data set.

The result is a `datasets.Dataset` with `image` (undecoded), `texts` (one or more) or `label` (`ClassLabel`) or both,
and every other column as it was. Images and labels alone have no column `texts`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from clipkit.data.reading.build_dataset import Item, assemble
from clipkit.data.reading.columns import Columns, choose, label_of, texts_of
from clipkit.data.reading.image_column import ImageColumn
from clipkit.data.reading.rejects import LoadReport, OnBad, Reject, check_policy
from clipkit.data.reading.sources import open_source
from clipkit.data.reading.table import Table, Unusable
from clipkit.data.reading.text_files import Quoting, checked_format
from clipkit.errors import BadImage
from clipkit.paths import show
from clipkit.progress import track
from clipkit.prompts import Templates, captions, check_templates
from clipkit.texts import BadText

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset

Source: TypeAlias = "str | os.PathLike[str] | Dataset"


def load_pairs(
    source: Source,
    *,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    split: str = "train",
    templates: Templates | None = None,
    separator: str | None = None,
    encoding: str = "utf-8-sig",
    quoting: Quoting = "double",
    on_bad: OnBad = "error",
    max_bad: int | float = 0.1,
    rejects: str | os.PathLike[str] | None = None,
    ledger: LoadReport | None = None,
    progress: bool = False,
) -> Dataset:
    """Read image-text pairs from a table, a folder or a data set.

    Captions are the text of their cells, unchanged: "None", "NA" and "007" are words. Only a cell with nothing in it
    (or whitespace, null, NaN) is empty. Several rows of one image file become one row with several texts; its other
    columns are those of the first row. Each image file is checked (it exists, is not empty or too large, begins as an
    image) but not decoded: `check_data` does that. Of more than 10,000 rows the files are not opened, so that a million
    take seconds: a file that is not an image, or that may not be read, is then refused where it is decoded.

    Args:
        source: a .csv, .tsv, .jsonl or .parquet file; a folder of images with captions beside them (`CaptionFiles`) or
            metadata files among them (`read_metadata`); a folder of class folders; a `datasets.Dataset`, a
            `DatasetDict`, a folder that `save_to_disk` wrote, or the name (org/name) of a data set of the hub.
        image: column of the images: paths (absolute, or relative to the table; of a `Dataset`, to the working
            directory), or encoded images in a `Dataset` or Parquet file. URLs are refused. By default a column with an
            obvious name, such as image, file, filepath.
        text: column or columns of the texts; each may hold a text or a list of them. By default one obvious column;
            where there is none, but a label, the result has no column `texts`: it can be checked, labelled and measured
            by zero-shot classification, and trained on with `templates`.
        label: column of the class. By default a column named label, if there is one.
        split: which split of a `DatasetDict` or of a data set of the hub.
        templates: one or more texts with {} for the class name (underscores become spaces), or a mapping from each
            class to its own, as for `prompts`. They make the texts out of the label. For class folders
            "a photo of a {}." by default.
        separator, encoding, quoting: of text files, see `TextFormat`.
        on_bad: ``error`` lists the rows that cannot be used and stops; ``skip`` leaves them out and counts them.
        max_bad: how many rows (int) or what fraction of them (float) may be skipped.
        rejects: file to which every row that cannot be used is written as JSON lines: row, code, message, where, path.
        ledger: a fresh `LoadReport` to be filled with the counts, the rejects and the notes.
        progress: whether to show how many rows are read.

    Raises:
        DataError: the source can be read in two ways or not at all, or `on_bad` is ``error`` and a row cannot be used.
        TooManyRejected: more than `max_bad` rows were skipped.
        UsageError: arguments that contradict each other.
    """
    check_policy(on_bad, max_bad)
    form = checked_format(separator, encoding, quoting)
    ledger = LoadReport() if ledger is None else ledger
    if not isinstance(source, str) and isinstance(source, os.PathLike):
        source = Path(source)
    table = open_source(source, ledger, split=split, form=form)
    filled = list(table.templates) if templates is None else check_templates(templates)
    columns = choose(table, image=image, text=text, label=label, templates=bool(filled))
    image_column = ImageColumn.of(table, columns.image)
    ledger.rows = len(table) + len(table.rejects)
    ledger.rejects += table.rejects
    items, names = _collect(table, columns, image_column, filled, ledger, progress)
    ledger.images = len(items)
    ledger.origin = _origin(table, items)
    hint = _wrong_root(table, ledger)
    ledger.settle(table.name, on_bad=on_bad, max_bad=max_bad, rejects=rejects, hint=hint)
    return assemble(image_column, columns, items, names, texts=bool(columns.texts or filled))


def _origin(table: Table, items: list[Item]) -> Callable[[int], list[tuple[int, str]]]:
    rows, places = [item.rows for item in items], replace(table, columns={})  # without the cells
    return lambda row: [(places.row(index), places.where(index)) for index in rows[row]]


def _wrong_root(table: Table, ledger: LoadReport) -> str | None:
    """Return a hint where no file exists at all: the folder that relative paths start from."""
    if ledger.used or any(reject.code != "MISSING" for reject in ledger.rejects):
        return None
    return f"no file is found at all: relative paths start at {table.root.absolute()}"


class _BadRow(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def _collect(
    table: Table, columns: Columns, image_column: ImageColumn, templates: Templates, ledger: LoadReport, progress: bool
) -> tuple[list[Item], ClassLabel | None]:
    cells = table.cells(columns.label) if columns.label else []
    labels, classes = _labels(table, columns, cells)
    texts = [table.cells(name) for name in columns.texts]
    groups = table.cells("group") if "group" in table.names else None
    items: dict[str | int, Item] = {}
    empty = 0
    for index in track(range(len(table)), len(table), "reading rows", unit="row", shown=progress):
        try:
            captions_of_row, blank = _texts(texts, index, table.no_text) if texts else ([], 0)
            name = labels[index] if labels else None
            if name is None and columns.label_needed:
                raise _no_label(cells[index])
            key = _key(image_column, index)
            path = key if isinstance(key, str) else None
            group = groups[index] if groups else None
            item = Item([index], path, captions_of_row, name, group)
            _merge(items, key, item, table)
        except _BadRow as bad:
            cell = image_column.paths[index]
            shown = show(cell) if isinstance(cell, str) else None
            ledger.rejects.append(Reject(table.row(index), bad.code, bad.message, table.where(index), shown))
        else:
            ledger.used += 1
            empty += blank
    if templates and not texts:
        made = captions({str(item.label) for item in items.values()}, templates)
        for item in items.values():
            item.texts = list(made[str(item.label)])
    _take_notes(ledger, table, items, empty, classes)
    return list(items.values()), classes


def _key(image_column: ImageColumn, index: int) -> str | int:
    try:
        return image_column.key(index)
    except BadImage as bad:
        raise _BadRow(bad.code, bad.reason) from bad


def _texts(columns: Sequence[Sequence[Any]], index: int, no_text: str) -> tuple[list[str], int]:
    """Return the captions of a row, and how many empty captions were left out."""
    cells = [column[index] for column in columns]
    for cell in cells:
        if isinstance(cell, Unusable):
            raise _BadRow(cell.code, cell.message)
    try:
        texts = [text for cell in cells for text in texts_of(cell)]
    except BadText as error:
        raise _BadRow(error.code, error.detail) from error
    full = [text for text in texts if text]
    if not full:
        raise _BadRow("EMPTY_TEXT", no_text)
    return full, len(texts) - len(full)


def _merge(items: dict[str | int, Item], key: str | int, item: Item, table: Table) -> None:
    first = items.setdefault(key, item)
    if first is item:
        return
    for name, one, other in (("label", first.label, item.label), ("group", first.group, item.group)):
        if one != other:
            where = table.where(first.rows[0])
            raise _BadRow("CONFLICT", f"the image has the {name} {other!r} here and {one!r} at {where}")
    first.texts += item.texts
    first.rows += item.rows


def _labels(table: Table, columns: Columns, cells: list[Any]) -> tuple[list[str | None], ClassLabel | None]:
    """Return the name of each row's class, and all classes in order."""
    if columns.label is None:
        return [], None
    from datasets import ClassLabel

    if not columns.label_needed and any(isinstance(cell, (list, dict, float)) and cell == cell for cell in cells):
        return [], None  # a column that is merely called label
    feature = getattr(table.columns, "features", {}).get(columns.label)
    if isinstance(feature, ClassLabel):
        names = [None if cell is None or cell < 0 else feature.int2str(cell) for cell in cells]
        return names, feature
    names = [label_of(cell) for cell in cells]
    distinct = {name for name in names if name is not None}
    if not distinct:
        return names, None
    in_order = sorted(distinct)
    if all(name.isdecimal() for name in distinct):
        in_order.sort(key=int)
    return names, ClassLabel(names=in_order)


def _no_label(cell: Any) -> _BadRow:
    if isinstance(cell, (list, dict)):
        return _BadRow("NOT_LABEL", f"expected the name or number of a class; found {type(cell).__name__}")
    return _BadRow("EMPTY_LABEL", "the label is empty")


def _take_notes(
    ledger: LoadReport, table: Table, items: dict[str | int, Item], empty: int, classes: ClassLabel | None
) -> None:
    if ledger.used > len(items):
        ledger.note(f"{table.name}: {ledger.used:,} rows name {len(items):,} images: merged")
    if empty:
        ledger.note(f"{table.name}: {empty:,} empty captions left out where the row has others")
    if classes is not None and (unlabelled := sum(item.label is None for item in items.values())):
        ledger.note(f"{table.name}: {unlabelled:,} images without a label")
