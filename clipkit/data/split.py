"""Training and test rows that share nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.data.keys import key_values
from clipkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def split_pairs(
    pairs: Dataset, *, test: float | int = 0.1, by: str = "image", seed: int = 0
) -> tuple[Dataset, Dataset]:
    """(train, test), each in the order of `pairs`, with no image (or no value of a column) on both sides.

    What is drawn depends on the order of the rows and the seed alone, not on where the files lie.

    Args:
        pairs: as `load_pairs` gives them.
        test: of the images (or of the values of the column) the fraction (float in (0, 1)) or the number (int) that
            makes the test set.
        by: ``image``: two rows with the same file, or with files of the same content, stay together; or a column, such
            as ``group``: its values are drawn, each with all its rows.
        seed: of the draw.

    Raises:
        UsageError: `test` leaves one side empty, or there is no such column.
        DataError: the column has empty cells: rows that belong nowhere could end up on both sides.
    """
    keys = image_keys(pairs) if by == "image" else _column(pairs, by)
    number: dict[Hashable, int] = {}
    unit = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)
    size = _size(test, len(number), by)
    drawn = np.random.default_rng(seed).permutation(len(number))[:size]
    is_test = np.isin(unit, drawn)
    return pairs.select(np.flatnonzero(~is_test)), pairs.select(np.flatnonzero(is_test))


def image_keys(pairs: Dataset) -> list[Hashable]:
    """For each row a key that is equal where the encoded images are equal, byte by byte.

    Only images of one size can be equal, so only those are read and hashed. A file that cannot be read is known by its
    path.
    """
    from datasets import Image

    images = pairs.with_format(None).select_columns(["image"]).cast_column("image", Image(decode=False))
    sizes: list[int | None] = []
    paths: list[str | None] = []
    for start in range(0, len(images), 1000):
        for cell in images[start : start + 1000]["image"]:
            data, path = cell["bytes"], cell["path"]
            paths.append(None if data is not None else path)
            sizes.append(len(data) if data is not None else _file_size(path))
    distinct = {
        (size, path) if path else (size, row) for row, (size, path) in enumerate(zip(sizes, paths, strict=True))
    }
    often = Counter(size for size, _ in distinct)
    return [
        _key(images, row, size, path) if size is None or often[size] > 1 else size
        for row, (size, path) in enumerate(zip(sizes, paths, strict=True))
    ]


def _key(images: Dataset, row: int, size: int | None, path: str | None) -> Hashable:
    if size is None:
        return path if path else ("row", row)
    try:
        data = Path(path).read_bytes() if path else images[row]["image"]["bytes"]
    except OSError:
        return path
    return hashlib.sha256(data).digest()


def _file_size(path: str | None) -> int | None:
    try:
        return Path(path).stat().st_size if path else None
    except (OSError, ValueError):
        return None


def _column(pairs: Dataset, name: str) -> list[Any]:
    if name not in pairs.column_names:
        columns = ", ".join(map(repr, pairs.column_names))
        raise UsageError(f"no column {name!r} to split by; there are {columns}", fix='by="image", or one of them')
    values = key_values(pairs, name)
    if None in values:
        where = f"row {values.index(None)}"
        raise DataError(f"the column {name!r} is empty, so the row belongs nowhere", where=where, fix="fill it")
    return values


def _size(test: float | int, units: int, by: str) -> int:
    kind = "images" if by == "image" else f"values of {by!r}"
    if isinstance(test, bool) or not (0 < test < 1 if isinstance(test, float) else test > 0):
        raise UsageError(f"test is a fraction in (0, 1) or a number of {kind}; found {test!r}", fix="test=0.1")
    size = max(1, round(test * units)) if isinstance(test, float) else test
    if size >= units:
        fix = f"test must be less than {units}" if units > 1 else "more data is needed"
        raise UsageError(f"a test set of {size} leaves nothing to train on: there are {units} {kind}", fix=fix)
    return size
