"""Numbers in place of values: equal values have equal numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def assign_codes(values: Iterable[Hashable | None]) -> list[int]:
    """Number the values from 0 in the order in which they first appear; -1 for None.

    >>> assign_codes(["b", "a", None, "b"])
    [0, 1, -1, 0]
    """
    codes: dict[Hashable, int] = {}
    return [-1 if value is None else codes.setdefault(value, len(codes)) for value in values]
