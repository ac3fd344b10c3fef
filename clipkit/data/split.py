"""Training and test rows that share nothing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from clipkit.data.dataset import as_dataset, key_values, require_column
from clipkit.data.fingerprint import file_or_bytes, raw_cells
from clipkit.errors import DataError, UsageError, option
from clipkit.metrics.codes import assign_codes

if TYPE_CHECKING:
    from datasets import Dataset

Value = TypeVar("Value", bound=Hashable)
_END = 4096  # bytes


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
    units = np.array(assign_codes(keys), dtype=np.int64)
    count = int(units.max(initial=-1)) + 1
    size = _size(test, count, by)
    drawn = np.random.default_rng(seed).permutation(count)[:size]
    is_test = np.isin(units, drawn)
    return pairs.select(np.flatnonzero(~is_test)), pairs.select(np.flatnonzero(is_test))


def image_keys(pairs: Any) -> list[Hashable]:
    """Return a key for each row; keys are equal where the encoded images are equal, byte by byte.

    Of the files only those of one size can be equal; of these the beginning and the end are read, and only those that
    agree in them are read and hashed as a whole. A file that cannot be read is known by its path, an image that was
    decoded already by its pixels.
    """
    known = known_images(pairs)
    sizes = {path: size for size, path, _ in known if path and size is not None}
    of_one_size = _repeated(sizes)
    first_link = _first_links(of_one_size)
    of_equal_ends = _repeated({path: size_and_ends(path, sizes[path]) for path in set(first_link.values())})
    digests = {path: digest(path) for path in of_equal_ends}
    keys: list[Hashable] = []
    for row, (size, path, content) in enumerate(known):
        if content:
            keys.append(content)
        elif path and size is not None:
            link = first_link.get(path, path)
            keys.append(digests.get(link, link))
        else:
            keys.append(path or ("row", row))
    return keys


def _repeated(values: Mapping[str, Value]) -> dict[str, Value]:
    """Keep the entries whose value occurs more than once."""
    counts = Counter(values.values())
    return {path: value for path, value in values.items() if counts[value] > 1}


def _first_links(paths: Iterable[str]) -> dict[str, str]:
    """Return for each path the first that names the same file: hard links are read once."""
    first: dict[tuple[int, int], str] = {}
    links: dict[str, str] = {}
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 (a Path costs as much as the call)
        except (OSError, ValueError):
            links[path] = path
            continue
        known = status.st_ino != 0  # 0 where a file system has no such numbers
        links[path] = first.setdefault((status.st_dev, status.st_ino), path) if known else path
    return links


def size_and_ends(path: str, size: int) -> Hashable:
    """Return the size of a file with a hash of its first and last 4 KiB; its path where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (a Path costs as much as the call)
            ends = file.read(_END)
            file.seek(max(0, size - _END))
            ends += file.read(_END)
    except (OSError, ValueError):
        return path
    return size, hashlib.sha256(ends).digest()


def known_images(pairs: Any) -> list[tuple[int | None, str | None, bytes]]:
    """Return what is known of each row's image without reading a file: size in bytes, path, SHA-256.

    The path is that of a file; the SHA-256 is that of an image that is not a file. An image without a size cannot be
    read.
    """
    pairs = as_dataset(pairs)
    require_column(pairs, "image")
    kept: list[tuple[int | None, str | None, bytes]] = []
    for cell in raw_cells(pairs, "image"):
        data = None if cell is None else file_or_bytes(cell)
        if data is None or isinstance(data, str):
            kept.append((_file_size(data), data, b""))
        else:
            kept.append((len(data), None, hashlib.sha256(data).digest()))
    return kept


def digest(path: str) -> Hashable:
    """Return the SHA-256 of a file; its path if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        return path


def _file_size(path: str | None) -> int | None:
    try:
        return Path(path).stat().st_size if path else None
    except (OSError, ValueError):
        return None


def _column(pairs: Dataset, name: str) -> list[Any]:
    if name not in pairs.column_names:
        columns = ", ".join(map(repr, pairs.column_names))
        raise UsageError(
            f"no column {name!r} to split by; there are {columns}",
            fix=option("data.split_by", "image", python='by="image"'),
        )
    values = key_values(pairs, name)
    if None in values:
        where = f"row {values.index(None)}"
        raise DataError(f"the column {name!r} is empty, so the row belongs nowhere", where=where, fix="fill it")
    return values


def _size(test: float | int, units: int, by: str) -> int:
    kind = "images" if by == "image" else f"values of {by!r}"
    if isinstance(test, bool) or not (0 < test < 1 if isinstance(test, float) else test > 0):
        raise UsageError(f"test is a fraction in (0, 1) or a number of {kind}; found {test!r}", fix=option("test", 0.1))
    size = max(1, round(test * units)) if isinstance(test, float) else test
    if size >= units:
        fix = f"test must be less than {units}" if units > 1 else "more data is needed"
        raise UsageError(f"a test set of {size} leaves nothing to train on: there are {units} {kind}", fix=fix)
    return size
