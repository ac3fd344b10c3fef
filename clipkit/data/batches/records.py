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
        self._matrices: dict[str, _Cells] = {}
        if not _is_unformatted(source):
            return
        names = [name for name in _USED if name in source.column_names]
        for column in (FEATURES, TEXT_FEATURES):
            if column not in source.column_names:
                continue
            if not _is_of_floats(source.data.schema.field(column).type):
                names.append(column)
                continue
            cells = _Cells.of(source, column)
            if cells is None:
                self._arrays.append(column)
            else:
                self._matrices[column] = cells
        if FEATURES in self._arrays or FEATURES in self._matrices:
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
        for column, matrix in self._matrices.items():
            for record, row in zip(records, rows, strict=True):
                record[column] = matrix[row]
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


class _Cells:
    """A column of features as one array over Arrow's own memory.

    Args:
        vectors: (n, width), all vectors of all cells.
        starts: (rows + 1,) where each cell begins; None where each cell is one vector.
    """

    def __init__(self, vectors: np.ndarray[Any, Any], starts: np.ndarray[Any, Any] | None) -> None:
        self.vectors, self.starts = vectors, starts

    @classmethod
    def of(cls, source: Any, column: str) -> _Cells | None:
        """None where rows are not in the table's order, or a cell is empty, or Arrow holds it in several parts."""
        import pyarrow as pa
        import pyarrow.compute as pc

        chunks = source.data.column(column).chunks
        if source._indices is not None or len(chunks) != 1 or chunks[0].null_count or not len(chunks[0]):
            return None
        cells = chunks[0]
        values = cells.flatten()
        if pa.types.is_floating(values.type):
            width = _width(cells)
            return None if not width or values.null_count else cls(values.to_numpy().reshape(-1, width), None)
        width = _width(values) if len(values) and not values.null_count else None
        numbers = values.flatten()
        if not width or numbers.null_count:
            return None
        lengths = pc.list_value_length(cells).to_numpy()
        return cls(numbers.to_numpy().reshape(-1, width), np.concatenate([[0], np.cumsum(lengths)]))

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        if self.starts is None:
            vector: np.ndarray[Any, Any] = self.vectors[row]
            return vector
        return self.vectors[self.starts[row] : self.starts[row + 1]]


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
