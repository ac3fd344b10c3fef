"""Key columns: what groups, labels and splits go by.

`pairs` is columns by name, a data set that offers them, or anything with `len` and `pairs[i]` (see `as_table`).
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.data.map_style import as_table
from clipkit.errors import UsageError, option
from clipkit.texts import is_blank

if TYPE_CHECKING:
    from torch import Tensor


def key_values(pairs: Any, column: str) -> list[Hashable | None]:
    """The values of a column, one a row; None where the cell is empty (None, NaN, a blank text). Lists become tuples.

    Raises:
        UsageError: there is no such column, or it holds what cannot be compared, such as dicts.
    """
    cells = _column(pairs, column)
    values = [tuple(value) if isinstance(value, list) else value for value in cells]
    for value in values:
        if not isinstance(value, Hashable):
            raise UsageError(f"the column {column!r} holds {type(value).__name__}, by which nothing can be grouped")
    return [None if _is_empty(value) else value for value in values]


def codes(pairs: Any, column: str) -> Tensor:
    """(n,) int64: one number for each distinct value, given once per data set; -1 for empty cells."""
    import torch

    numbers: dict[Any, int] = {}
    found = [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in key_values(pairs, column)]
    return torch.tensor(found, dtype=torch.int64)


def number_values(pairs: Any, column: str) -> Tensor:
    """(n,) or (n, d) float32: a column of numbers, or of lists of d numbers; NaN for empty cells.

    Raises:
        UsageError: there is no such column, it holds something else, or lists of different lengths.
    """
    import torch

    cells = list(_column(pairs, column))
    width = next((len(cell) for cell in cells if isinstance(cell, (list, tuple, np.ndarray))), None)
    empty = np.nan if width is None else [np.nan] * width
    try:
        found = np.asarray([empty if cell is None else cell for cell in cells], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"expected numbers, or lists of equally many numbers; {error}",
            where=f"column {column!r}",
            fix="name another column, or make it numeric",
        ) from error
    return torch.from_numpy(found)


def require_column(pairs: Any, column: str) -> None:
    """Raises UsageError, with the near names, where a data set says that it has no such column."""
    columns: Sequence[str] | None = getattr(pairs, "column_names", None)
    if columns is not None and column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        raise UsageError(
            f"there is no column {column!r}; there are {', '.join(columns)}",
            fix=f"did you mean {near[0]!r}?" if near else "name one of these",
        )


def has_texts(pairs: Any) -> bool:
    """Whether a data set has captions; one of images and labels alone has none."""
    return "texts" in as_table(pairs).column_names


def require_texts(pairs: Any) -> None:
    """Raises UsageError where a data set has no captions, and says how a label makes some."""
    if has_texts(pairs):
        return
    columns = as_table(pairs).column_names
    fix = f"name their column: {option('text', 'COLUMN')}"
    if "label" in columns:
        fix = f"make them out of the labels: {option('templates', 'a photo of a {}.')}; or {fix}"
    raise UsageError(f"there are no texts to learn from or to find; there are {', '.join(columns)}", fix=fix)


def _column(pairs: Any, column: str) -> Sequence[Any]:
    if not isinstance(pairs, Mapping):
        pairs = as_table(pairs)
    require_column(pairs, column)
    cells: Sequence[Any] = pairs[column]
    return cells


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and is_blank(value))
