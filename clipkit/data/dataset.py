"""Anything with `len` and `source[i]` (a list of dicts, a map-style torch Dataset), read as the tables are."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipkit.errors import DataError, UsageError, option
from clipkit.metrics.codes import assign_codes
from clipkit.suggest import closest
from clipkit.texts import BadText, checked_text, is_blank

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = ("image", "hard_images", "image_features", "text_features")  # never kept, for they would fill the memory
_AT_ONCE = 1000  # rows


def as_dataset(source: Any) -> Any:
    """`source` itself where it offers columns, as a `datasets.Dataset` does; else a `MapStyleDataset` around its rows.

    Raises:
        UsageError: a stream, which has no row k to go back to; or its rows are not mappings.
    """
    if isinstance(source, MapStyleDataset) or _offers_columns(source):
        return source
    return MapStyleDataset(source)


class MapStyleDataset:
    """Rows as a table: every row is read once, in order, and every cell but the images is kept.

    Args:
        source: ``len(source)``, and ``source[i]`` a mapping from column to cell.

    Raises:
        UsageError: as `as_dataset`.
    """

    def __init__(self, source: Any) -> None:
        _refuse_streams(source)
        self.source, self._added = source, dict[str, Sequence[Any]]()
        names: dict[str, None] = {}
        self._kept: dict[str, list[Any]] = {}
        for row in range(len(source)):
            record = self[row]
            for name in record:
                if name not in names:
                    names[name] = None
                    self._kept |= {} if name in PIXELS else {name: [None] * len(source)}
            for name, cell in record.items():
                if name in self._kept:
                    self._kept[name][row] = cell
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | str) -> Any:
        """A row, or a column."""
        if isinstance(key, str):
            if key in self._added:
                return self._added[key]
            return self._kept[key] if key in self._kept else _Cells(self, key)
        record = self.source[key]
        if not isinstance(record, Mapping):
            raise UsageError(
                f"expected rows that map columns to cells; found {type(record).__name__}",
                where=f"row {key}",
                fix='source[i] gives {"image": …, "texts": [caption, …]}',
            )
        return dict(record) | {name: cells[key] for name, cells in self._added.items()}

    def add_column(self, name: str, cells: Sequence[Any]) -> MapStyleDataset:
        """Return the same rows with one more column, as `datasets` does."""
        other = MapStyleDataset.__new__(MapStyleDataset)
        other.__dict__ |= self.__dict__
        other._added = {**self._added, name: cells}
        other.column_names = [*(column for column in self.column_names if column != name), name]
        return other

    def __getstate__(self) -> dict[str, Any]:  # workers read rows alone
        return self.__dict__ | {"_kept": {}}


class _Cells(Sequence[Any]):
    """A column that is not kept: each access reads a row."""

    def __init__(self, table: MapStyleDataset, name: str) -> None:
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[row] for row in range(*key.indices(len(self)))]
        return self.table[key].get(self.name)

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))


def iterate_column(source: Any, column: str) -> Iterator[Any]:
    """Yield the cells of a column in order.

    A `datasets.Dataset` turns a thousand rows into Python objects in a tenth of the time that they take one by one. Of
    one with a format or a transform, whose batches may differ from its rows, they are read one by one.
    """
    layout = getattr(source, "format", None)
    if not isinstance(layout, Mapping) or layout.get("type", "") is not None:
        yield from source[column]
        return
    selected = source.select_columns([column])
    for start in range(0, len(selected), _AT_ONCE):
        yield from selected[start : start + _AT_ONCE][column]


def caption_counts(pairs: Any) -> list[int]:
    """Return the number of captions of each row.

    Raises:
        DataError: a row where `texts` is not a list of texts, or is an empty one; a text that is empty or broken.
    """
    counts = []
    for row, texts in enumerate(iterate_column(pairs, "texts")):
        listed = isinstance(texts, list | tuple)
        if not listed or not texts or not all(isinstance(text, str) for text in texts):
            shown = repr(texts)[:40] if listed else f"{type(texts).__name__} {repr(texts)[:40]}"
            fix = 'write "texts": [caption]' if isinstance(texts, str) else "give each row a caption, or leave it out"
            raise DataError(f"`texts` is a list of at least one caption; found {shown}", where=f"row {row}", fix=fix)
        for text in texts:
            _check(text, row)
        counts.append(len(texts))
    return counts


def _check(text: str, row: int) -> None:
    try:
        checked_text(text)
    except BadText as error:
        fix = "give the row another caption, or leave it out"
        raise DataError(error.message, where=f"row {row}", fix=fix) from error


def _offers_columns(source: Any) -> bool:
    names = getattr(source, "column_names", None)
    if not isinstance(names, list | tuple) or not hasattr(source, "__len__"):
        return False
    try:
        source["texts" if "texts" in names else names[0]]
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    return True


def _refuse_streams(source: Any) -> None:
    streams = any(kind.__name__ == "IterableDataset" for kind in type(source).__mro__)  # of torch and of datasets
    if streams or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise UsageError(
            f"expected len(source) and source[i], so that every batch can be drawn again; found a stream, "
            f"{type(source).__name__}",
            fix="pack it first: pairs = list(stream), or one of `datasets` to disk: "
            "pairs = datasets.Dataset.from_generator(lambda: (yield from stream))",
        )
    if isinstance(source, Mapping):
        names = ", ".join(map(str, list(source)[:5]))
        raise UsageError(
            f"expected rows: source[0], source[1] …; found {type(source).__name__} with {names}",
            fix="datasets.Dataset.from_dict(columns), or one split of it",
        )


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Seed torch, random and numpy for a while: data sets may draw numbers, as torchvision's transforms do."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def key_values(pairs: Any, column: str) -> list[Hashable | None]:
    """Return the values of a column, one a row; None for empty cells (None, NaN, a blank text).

    Lists become tuples.

    Raises:
        UsageError: there is no such column, or it holds values that cannot be compared, such as dicts.
    """
    cells = _column(pairs, column)
    values = [tuple(value) if isinstance(value, list) else value for value in cells]
    for value in values:
        if not isinstance(value, Hashable):
            raise UsageError(f"the column {column!r} holds {type(value).__name__}, by which nothing can be grouped")
    return [None if _is_empty(value) else value for value in values]


def column_codes(pairs: Any, column: str) -> Tensor:
    """Return (n,) int64: a code for each distinct value of a column, from 0; -1 for empty cells."""
    import torch

    return torch.tensor(assign_codes(key_values(pairs, column)), dtype=torch.int64)


def number_values(pairs: Any, column: str) -> Tensor:
    """Return (n,) or (n, d) float32: a column of numbers, or of lists of d numbers; NaN for empty cells.

    Raises:
        UsageError: there is no such column, it holds something else, or lists of different lengths.
    """
    import torch

    cells = list(_column(pairs, column))
    width = next((len(cell) for cell in cells if isinstance(cell, (list, tuple, np.ndarray))), None)
    empty = np.nan if width is None else [np.nan] * width
    try:
        numbers = np.asarray([empty if cell is None else cell for cell in cells], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"expected numbers, or lists of equally many numbers; {error}",
            where=f"column {column!r}",
            fix="name another column, or make it numeric",
        ) from error
    return torch.from_numpy(numbers)


def require_column(pairs: Any, column: str) -> None:
    """Raise UsageError, with the closest name, where a data set has no such column."""
    columns: Sequence[str] | None = getattr(pairs, "column_names", None)
    if columns is not None and column not in columns:
        matches = closest(column, columns)
        raise UsageError(
            f"there is no column {column!r}; there are {', '.join(columns)}",
            fix=f"did you mean {matches[0]!r}?" if matches else "name one of these",
        )


def has_texts(pairs: Any) -> bool:
    """Whether a data set has captions; one of images and labels alone has none."""
    return "texts" in as_dataset(pairs).column_names


def require_texts(pairs: Any) -> None:
    """Raise UsageError where a data set has no captions; the fix says how a label makes some."""
    if has_texts(pairs):
        return
    columns = as_dataset(pairs).column_names
    fix = f"name their column: {option('text', 'COLUMN')}"
    if "label" in columns:
        fix = f"make them out of the labels: {option('templates', 'a photo of a {}.')}; or {fix}"
    raise UsageError(f"the data has no column of texts; there are {', '.join(columns)}", fix=fix)


def _column(pairs: Any, column: str) -> Iterable[Any]:
    if not isinstance(pairs, Mapping):
        pairs = as_dataset(pairs)
    require_column(pairs, column)
    return iterate_column(pairs, column)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and is_blank(value))
