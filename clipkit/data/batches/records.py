"""Read the rows of a batch: as mappings from column to cell, with kept features as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.data.batches.batch import HARD
from clipkit.data.batches.plan import Draw, hash64
from clipkit.data.dataset import drawn

if TYPE_CHECKING:
    import pyarrow as pa

FEATURES, TEXT_FEATURES = "image_features", "text_features"
_USED = ("image", "texts", *HARD)  # columns of which a batch is made


class RecordReader:
    """Reads rows of a data set.

    Of a `datasets.Dataset` without a format only the columns that make a batch are read, all rows of a batch at once,
    and kept features as numpy arrays instead of lists of Python's floats: a tenth of the time.

    Args:
        source: the data set, as `as_dataset` gives it.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self._rows, self._features = source, None
        self._arrays: list[str] = []
        if not _is_unformatted(source):
            return
        names = [name for name in _USED if name in source.column_names]
        for column in (FEATURES, TEXT_FEATURES):
            if column not in source.column_names:
                continue
            if _is_of_floats(source.data.schema.field(column).type):
                self._arrays.append(column)
            else:
                names.append(column)
        if FEATURES in self._arrays:
            names = [name for name in names if name != "image"]  # see `image`
        if self._arrays:
            self._features = source.select_columns(self._arrays).with_format("arrow")
        self._rows = source.select_columns(names)

    def read(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        """Return the row of each draw. A data set that draws random numbers of its own draws the same ones each time.

        The column `image` is left out where there are features; `image` reads it.
        """
        rows = [draw.row for draw in draws]
        fetch: Callable[[list[int]], list[dict[str, Any]]] | None = getattr(self._rows, "__getitems__", None)
        if fetch is None:
            return [self._read_one(draw) for draw in draws]
        with drawn(hash64(*(draw.seed for draw in draws))):
            records = list(fetch(rows))
        if self._features is not None:
            table = self._features[rows]
            for column in self._arrays:
                cells = _vectors(table.column(column).combine_chunks())
                for record, cell in zip(records, cells, strict=True):
                    record[column] = cell
        return records

    def image(self, row: int) -> Any:
        """Return the image of a row."""
        return self.source[row]["image"]

    def _read_one(self, draw: Draw) -> dict[str, Any]:
        with drawn(draw.seed):
            record: dict[str, Any] = self._rows[draw.row]
        return record

    def __reduce__(self) -> tuple[type[RecordReader], tuple[Any]]:
        return RecordReader, (self.source,)  # a worker that is spawned gets the table once


def _is_unformatted(source: Any) -> bool:
    layout = getattr(source, "format", None)
    return isinstance(layout, Mapping) and layout.get("type", "") is None


def _is_of_floats(column: pa.DataType) -> bool:
    """Whether cells are lists of floats, or lists of such lists."""
    import pyarrow as pa

    depth = 0
    while pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column):
        depth += 1
        column = column.value_type
    return depth in (1, 2) and bool(pa.types.is_floating(column))


def _vectors(cells: pa.Array) -> list[np.ndarray[Any, Any] | None]:
    """Return of each cell its numbers, (d,) or (n, d); None of an empty cell."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(cells)
    ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False))
    values = cells.flatten()  # without the empty cells
    inner = _width(values)
    numbers = values if inner is None else values.flatten()
    matrix = numbers.to_numpy(zero_copy_only=False)
    if inner is not None:
        matrix = matrix.reshape(-1, inner)
    empty = lengths.is_null().to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], ends[:-1]])
    return [None if is_empty else matrix[start:end] for start, end, is_empty in zip(starts, ends, empty, strict=True)]


def _width(values: pa.Array) -> int | None:
    """Return how many numbers each list of an array of lists has; None where the array is of numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(values.type):
        return None
    widths = pc.unique(pc.list_value_length(values)).to_pylist()
    assert len(widths) <= 1, f"features of one data set have one size; found {widths}"
    return widths[0] if widths else 1
