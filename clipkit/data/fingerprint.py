"""The fingerprint of the data that a training reads, by which another run knows whether it is the same data.

A sha256 over the rows in their order: how many, every caption, every image, hard negatives, and the columns named.

Not seen: columns that were not named; where files lie and what they are called; of an image file above 64 KiB what lies
outside its first, middle and last 16 KiB when its length stays the same (100,000 files are to take seconds). Of more
than 100,000 rows the length of every file counts, and the content of 10,000 files, evenly spread. A file that cannot be
read counts by its path. Of rows that open their images themselves 1,000 are looked at, or none where two
looks differ (random augmentation); what a transform of `datasets` makes of its columns is not looked at either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipkit.data.dataset import MapStyleDataset, as_dataset, drawn, iterate_column, require_column
from clipkit.errors import BadImage
from clipkit.images.load import bytes_of
from clipkit.progress import track

_VERSION = b"clipkit data 1"
_WHOLE, _WINDOW = 64 * 1024, 16 * 1024  # files up to here are read whole, of longer ones three windows
_SAMPLE = 1000
_READ_ALL, _READ_OF_MORE = 100_000, 10_000  # rows: the files of up to so many are all read; of more, so many files


# Columns that every training reads, where they are there.
_READ = ("texts", "image", "image_features", "text_features", "hard_texts", "hard_images")


def data_fingerprint(source: Any, columns: Sequence[str] = (), *, progress: bool = False) -> str:
    """Return the sha256 (64 hex digits) of what a training reads from a data set.

    Args:
        source: as `Trainer` takes it.
        columns: the key columns that are read beside the captions and images.
        progress: whether to show progress.

    Raises:
        UsageError: a stream, or there is no such column.
    """
    source = as_dataset(source)
    names = [name for name in dict.fromkeys([*_READ, *columns]) if name in columns or name in source.column_names]
    names = [name for name in names if name not in ("row", "view")]  # made by the loader
    total = hashlib.sha256(_VERSION + b" %d" % len(source))
    for name in names:
        require_column(source, name)
        column = hashlib.sha256(name.encode())
        seen: dict[str, bytes] = {}
        with drawn(0):  # a data set that draws of its own draws the same each time
            cells = _sample(source) if name == "image" and opened(source) else raw_cells(source, name)
            content = _rows_read(len(source))
            tracked = track(cells, len(source), f"reading the column {name!r}", unit="row", shown=progress)
            for row, cell in enumerate(tracked):
                column.update(_cell(name, cell, seen, row in content))
        total.update(column.digest())
    return total.hexdigest()


def images_identity(images: Iterable[Any]) -> str:
    """Return the sha256 of images, in their order."""
    seen: dict[str, bytes] = {}
    return hashlib.sha256(b"".join(_image(image, seen) for image in images)).hexdigest()


def raw_cells(source: Any, column: str) -> Iterator[Any]:
    """Yield the cells of a column; images undecoded where the source allows it."""
    features = getattr(source, "features", None)
    if features is None:
        yield from source[column]
        return
    from datasets import Image, List

    source = source.with_format(None).select_columns([column])
    if column == "image" and isinstance(features[column], Image):
        source = source.cast_column(column, Image(decode=False))
    elif column == "hard_images" and isinstance(getattr(features[column], "feature", None), Image):
        source = source.cast_column(column, List(Image(decode=False)))
    yield from iterate_column(source, column)


def _rows_read(rows: int) -> Container[int]:
    """The rows whose image files are read; of the others the size alone counts."""
    if rows <= _READ_ALL:
        return range(rows)
    return set(np.linspace(0, rows - 1, _READ_OF_MORE).astype(int).tolist())


def _cell(column: str, cell: Any, seen: dict[str, bytes], content: bool) -> bytes:
    if column == "image":
        return _image(cell, seen) if content else _image_size(cell)
    if column in ("image_features", "text_features"):
        return _features(cell)
    if column == "hard_images":
        several = cell if isinstance(cell, list | tuple) else [cell]
        return b"%d " % len(several) + b"".join(_image(image, seen) for image in several)
    return _plain(cell)


def opened(source: Any) -> bool:
    """Whether a data set gives images that it has opened itself, rather than paths or bytes."""
    if not isinstance(source, MapStyleDataset) or not len(source) or "image" not in source.column_names:
        return False
    cell = source[0].get("image")
    if cell is None or isinstance(cell, str | os.PathLike | bytes | Mapping):
        return False
    return not getattr(cell, "filename", None)


def steady(source: Any) -> bool:
    """Whether the first images are the same when they are read again."""
    first, second = ([file_or_bytes(cell) for cell in source["image"][:8]] for _ in range(2))
    return first == second


def _sample(source: MapStyleDataset) -> Iterator[Any]:
    if steady(source):
        rows = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int))
        yield from (source["image"][int(row)] for row in rows)


def _plain(cell: Any) -> bytes:
    """Return JSON, which tells 1 from "1" and one text from the next."""
    return json.dumps(cell, default=_listed, sort_keys=True).encode() + b"\n"


def _listed(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def file_or_bytes(cell: Any) -> str | bytes | None:
    """Return the path of the image in a cell, or its content if it is not a file; None if there is no image to open."""
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        cell = path if data is None else data
    name = cell if isinstance(cell, str | os.PathLike) else getattr(cell, "filename", "")  # of a PIL image, still there
    if name:
        return os.fspath(name)
    try:
        return None if cell is None or isinstance(cell, str) else bytes_of(cell)
    except BadImage:  # left to the loader, which stops or skips as asked
        return None


def _image(cell: Any, seen: dict[str, bytes]) -> bytes:
    """Return 32 bytes that depend on the content of an image cell."""
    image = file_or_bytes(cell)
    if isinstance(image, str):
        if image not in seen:
            seen[image] = _file(image)
        return seen[image]
    return hashlib.sha256(b"none" if image is None else image).digest()


def _image_size(cell: Any) -> bytes:
    """As `_image`, but of a file the size alone."""
    image = file_or_bytes(cell)
    if not isinstance(image, str):
        return _image(cell, {})
    try:
        return b"%d bytes\n" % os.stat(image).st_size  # noqa: PTH116 (a Path costs as much as the call)
    except (OSError, ValueError):
        return _unreadable(image)


def _features(cell: Any) -> bytes:
    return hashlib.sha256(np.asarray(cell, dtype=np.float32).tobytes()).digest()


def _file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return hashlib.sha256(b"%d " % size + b"".join(_windows(file, size))).digest()
    except (OSError, ValueError):
        return _unreadable(path)


def _unreadable(path: str) -> bytes:
    return hashlib.sha256(b"unreadable " + path.encode("utf-8", "surrogatepass")).digest()


def _windows(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= _WHOLE:
        yield file.read()
        return
    for start in (0, (size - _WINDOW) // 2, size - _WINDOW):
        file.seek(start)
        yield file.read(_WINDOW)
