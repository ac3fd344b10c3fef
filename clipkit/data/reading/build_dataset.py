"""From rows that passed to the data set that is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipkit.data.reading.columns import Columns
from clipkit.data.reading.image_column import ImageColumn
from clipkit.data.reading.table import Table, absolute

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset


@dataclass
class Item:
    """One image with the texts, label and group of its rows; its first row gives the other columns."""

    rows: list[int]
    path: str | None
    texts: list[str]
    label: str | None
    group: Any


def assemble(
    image_column: ImageColumn, columns: Columns, items: Sequence[Item], classes: ClassLabel | None, *, texts: bool
) -> Dataset:
    """Return the data set: image, texts (if any), label (if there are classes) and the other columns, a row an item.

    Args:
        image_column: the images.
        columns: the columns used up.
        items: what to keep, in order.
        classes: the feature of the label.
        texts: whether the items have texts.
    """
    from datasets import Dataset, DatasetInfo, Features, List, Value, concatenate_datasets

    table = image_column.table
    used = {columns.image, *columns.texts, columns.label if classes else None}
    rest = [name for name in table.names if name not in used]
    kept = [item.rows[0] for item in items]
    # Embedded images are not copied: every row of the table gets its item, then an index chooses the rows with one.
    embedded = image_column.sizes is not None
    item_of_row: list[Item | None] = list(items)
    if embedded:
        item_of_row = [None] * len(table)
        for item in items:
            item_of_row[item.rows[0]] = item
    features: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    if texts:
        features["texts"] = List(Value("string"))
        cells["texts"] = [item.texts if item else [] for item in item_of_row]
    if classes is not None:
        code = {name: index for index, name in enumerate(classes.names)}
        features["label"] = classes
        cells["label"] = [code[item.label] if item and item.label is not None else None for item in item_of_row]
    made = Dataset(_arrow(cells, features), info=DatasetInfo(features=Features(features)))
    if not embedded:
        parts = [_image_files([str(item.path) for item in items]), made]
        if rest:
            parts.append(_metadata(table, rest, kept))
        return concatenate_datasets(parts, axis=1)
    assert isinstance(table.columns, Dataset)
    old = table.columns.select_columns([columns.image, *rest])
    if columns.image != "image":
        old = old.rename_column(columns.image, "image")
    parts = [old.select_columns(["image"]), made]
    if rest:
        parts.append(old.select_columns(rest))
    pairs = concatenate_datasets(parts, axis=1)
    return pairs if len(kept) == len(table) else pairs.select(kept)


def _arrow(columns: dict[str, Any], features: dict[str, Any]) -> Any:
    import pyarrow as pa
    from datasets import Features

    schema = Features(features).arrow_schema
    return pa.table({name: pa.array(cells, schema.field(name).type) for name, cells in columns.items()})


def _image_files(paths: list[str]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo, Features, Image

    cells = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], ["bytes", "path"])
    return Dataset(pa.table({"image": cells}), info=DatasetInfo(features=Features({"image": Image(decode=False)})))


def _metadata(table: Table, names: list[str], kept: list[int]) -> Dataset:
    """Return the other columns, of the rows that are kept."""
    import pyarrow as pa
    from datasets import Dataset

    if isinstance(table.columns, Dataset):
        rows = table.columns.select_columns(names).select(kept)
        return Dataset(rows.with_format("arrow")[:], info=rows.info)
    columns = {name: [table.columns[name][row] for row in kept] for name in names}
    if "hard_images" in columns:
        columns["hard_images"] = [absolute(table.root, cell) for cell in columns["hard_images"]]
    return Dataset(pa.table({name: _cells(cells) for name, cells in columns.items()}))


def _cells(cells: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(cells)
    except (pa.ArrowException, OverflowError, TypeError):  # Arrow wants one type a column; JSON does not
        return pa.array([None if cell is None else json.dumps(cell, ensure_ascii=False) for cell in cells])
