"""The data set of an evaluation: its required columns, captions and groups, and a subset of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from clipkit.errors import DataError, UsageError, option
from clipkit.texts import is_blank


class Subset(Sequence[Any]):
    """Some rows of a sequence, read when asked for."""

    def __init__(self, items: Sequence[Any], rows: Sequence[int]) -> None:
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.rows[index]]


def require_columns(pairs: Any, columns: Iterable[str]) -> None:
    """Raises UsageError unless the data set has these columns, DataError if it has no row."""
    present = list(pairs.column_names)
    for column in columns:
        if column not in present:
            fix = f"name the column of the class: {option('label', 'COLUMN')}" if column == "label" else None
            raise UsageError(f"expected a column {column!r}; the data set has {', '.join(present)}", fix=fix)
    if not len(pairs):
        raise DataError("the data set has no row, so there is nothing to evaluate")


def caption_rows(texts: Iterable[Sequence[str]]) -> tuple[list[str], list[int]]:
    """Return all captions in order, and for each the row that it belongs to.

    Raises:
        DataError: a row without a caption, or an empty caption.
    """
    captions: list[str] = []
    rows: list[int] = []
    for row, own in enumerate(texts):
        if not own or not all(isinstance(text, str) and not is_blank(text) for text in own):
            raise DataError("every image needs a caption, and none may be empty", where=f"row {row}")
        captions += own
        rows += [row] * len(own)
    return captions, rows


def filled(values: Iterable[Any], column: str) -> list[Any]:
    """Return the values of a column.

    Raises:
        DataError: a cell is empty.
    """
    groups = list(values)
    if None in groups:
        message = f"every row needs a group; {groups.count(None)} have none in {column!r}"
        raise DataError(message, where=f"row {groups.index(None)}", fix="fill it, or leave such rows out")
    return groups
