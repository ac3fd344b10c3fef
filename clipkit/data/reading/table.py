"""Columns of cells, read from whatever holds them, with the place of each row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipkit.data.reading.rejects import Reject
from clipkit.paths import is_url

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000  # rows that `datasets` turns into Python objects at once: a fifth of the time of one by one


class Unusable(NamedTuple):
    """Marks a cell that could not be read; its row becomes a reject."""

    code: str
    message: str


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where each row stands.

    Args:
        name: what to call the source in messages.
        root: the folder that relative paths start from.
        columns: name -> cells, or a `datasets.Dataset`.
        lines: line of each row in a text file (from 1); None where rows are counted from 0.
        places: how a person finds each row, where its number is not enough.
        rejects: rows that could not even be read; they are not among the columns.
        no_text: what to say of a row without a caption.
        templates: make texts out of the label unless the user gives others.
    """

    name: str
    root: Path
    columns: Mapping[str, Sequence[Any]] | Dataset
    lines: Sequence[int] | None = None
    places: Sequence[str] | None = None
    rejects: list[Reject] = field(default_factory=list)
    no_text: str = "the caption is empty"
    templates: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(self.columns) if isinstance(self.columns, Mapping) else list(self.columns.column_names)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ())) if isinstance(self.columns, Mapping) else len(self.columns)

    def cells(self, name: str) -> list[Any]:
        """Return the cells of a column."""
        if isinstance(self.columns, Mapping):
            return list(self.columns[name])
        column = self.columns.select_columns([name])
        cells: list[Any] = []
        for start in range(0, len(column), _BATCH):
            cells += column[start : start + _BATCH][name]
        return cells

    def row(self, index: int) -> int:
        """Return the number of a row as the source counts: its line, or its index."""
        return index if self.lines is None else self.lines[index]

    def where(self, index: int) -> str:
        """Return where a person finds a row."""
        if self.places is not None:
            return self.places[index]
        return f"{self.name}, row {index}" if self.lines is None else f"{self.name}:{self.lines[index]}"


def absolute(folder: Path, cell: Any) -> Any:
    """Return the path of a cell, or its list of paths, made absolute from a folder; other cells as they are."""
    if isinstance(cell, str) and cell.strip() and not is_url(cell):
        return os.path.abspath(folder / cell)  # noqa: PTH100 (links are not followed)
    if isinstance(cell, list):
        return [absolute(folder, path) for path in cell]
    return cell
