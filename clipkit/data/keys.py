"""Key columns: what groups, labels and splits go by."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from typing import Any

from clipkit.errors import UsageError


def key_values(pairs: Any, column: str) -> list[Hashable | None]:
    """The values of a column, one a row; None where the cell is empty (None, NaN, a blank text). Lists become tuples.

    Raises:
        UsageError: there is no such column, or it holds what cannot be compared, such as dicts.
    """
    require_column(pairs, column)
    values = [tuple(value) if isinstance(value, list) else value for value in pairs[column]]
    for value in values:
        if not isinstance(value, Hashable):
            raise UsageError(f"the column {column!r} holds {type(value).__name__}, by which nothing can be grouped")
    return [None if _is_empty(value) else value for value in values]


def require_column(pairs: Any, column: str) -> None:
    """Raises UsageError, with the near names, where a data set says that it has no such column."""
    columns: Sequence[str] | None = getattr(pairs, "column_names", None)
    if columns is not None and column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        raise UsageError(
            f"there is no column {column!r}; there are {', '.join(columns)}",
            fix=f"did you mean {near[0]!r}?" if near else "name one of these",
        )


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())
