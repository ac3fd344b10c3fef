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
    """One image with what its rows say of it; the first of them gives the other columns."""

    rows: list[int]
    path: str | None
    texts: list[str]
    label: str | None
    group: Any


def assemble(
    pictures: ImageColumn, columns: Columns, items: Sequence[Item], classes: ClassLabel | None, *, texts: bool
) -> Dataset:
    """Columns image, texts (if there are any), label (if there are classes) and the rest of the table, one row an item.

    Args:
        pictures: the image column.
        columns: the columns used up.
        items: what to keep, in order.
        classes: the feature of the label.
        texts: whether the items have texts.
    """
    from datasets import Dataset, DatasetInfo, Features, List, Value, concatenate_datasets

    table = pictures.table
    used = {columns.image, *columns.texts, columns.label if classes else None}
    rest = [name for name in table.names if name not in used]
    kept = [item.rows[0] for item in items]
    # An embedded image stays where it is: texts for all rows are put beside it, then rows are chosen by an index.
    beside: list[Item | None] = list(items)
    if pictures.sizes is not None:
        beside = [None] * len(table)
        for item in items:
            beside[item.rows[0]] = item
    features: dict[str, Any] = {}
    new: dict[str, Any] = {}
    if texts:
        features["texts"] = List(Value("string"))
        new["texts"] = [item.texts if item else [] for item in beside]
    if classes is not None:
        number = {name: index for index, name in enumerate(classes.names)}
        features["label"] = classes
        new["label"] = [number[item.label] if item and item.label is not None else None for item in beside]
    parts = [Dataset(_arrow(new, features), info=DatasetInfo(features=Features(features)))]
    if pictures.sizes is not None:
        assert isinstance(table.columns, Dataset)
        old = table.columns.select_columns([columns.image, *rest])
        old = old if columns.image == "image" else old.rename_column(columns.image, "image")
        parts = [old.select_columns(["image"]), *parts] + ([old.select_columns(rest)] if rest else [])
        pairs = concatenate_datasets(parts, axis=1)
        return pairs if len(kept) == len(table) else pairs.select(kept)
    parts.insert(0, _image_files([str(item.path) for item in items]))
    parts += [_metadata(table, rest, kept)] if rest else []
    return concatenate_datasets(parts, axis=1)


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
    """The other columns, of the rows that are kept."""
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
