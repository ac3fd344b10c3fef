"""The image column of a table: files, each checked once, or images that are embedded in the data set."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from clipkit.data.reading.table import Table
from clipkit.errors import BadImage, DataError, option
from clipkit.images.load import probe_image
from clipkit.paths import is_url

if TYPE_CHECKING:
    from datasets import Dataset

_GUESSES = 10  # near names are looked up for this many missing files: as many as an error shows
_OPENED = 10_000  # rows up to which every file is opened; opening a million files takes 40 s, their sizes 2 s
_LARGEST = 64 * 1024**2  # bytes, as `load_image` has it


@dataclass
class ImageColumn:
    """The image column.

    Args:
        table: with the column typed as `datasets.Image(decode=False)` if images are embedded.
        paths: the cell of each row, or the path beside an embedded image.
        sizes: bytes of each embedded image; None where no image is embedded.
    """

    table: Table
    paths: list[Any]
    sizes: list[int | None] | None = None
    probed: dict[str, BadImage | None] = field(default_factory=dict)
    missing: int = 0

    @classmethod
    def of(cls, table: Table, column: str) -> ImageColumn:
        features = getattr(table.columns, "features", None)
        if features is None or getattr(features[column], "dtype", "") in ("string", "large_string"):
            return cls(table, table.cells(column))
        return cls._typed(table, column)

    @classmethod
    def _typed(cls, table: Table, column: str) -> ImageColumn:
        from datasets import Dataset, Image

        assert isinstance(table.columns, Dataset)
        try:
            data = table.columns.cast_column(column, Image(decode=False))
        except Exception as error:  # pyarrow and datasets have many types for it
            feature = table.columns.features[column]
            message = f"the column {column!r} holds neither paths nor images, but {feature}"
            raise DataError(
                message, code="COLUMN", where=table.name, fix=f"name another column: {option('image', 'COLUMN')}"
            ) from error
        paths, sizes = _paths_and_sizes(data, column)
        if not any(size is not None for size in sizes):
            return cls(table, paths)
        return cls(replace(table, columns=data), paths, sizes)

    def key(self, index: int) -> str | int:
        """Return a key that is equal for the rows of one image: the absolute path of its file, or the row.

        Raises:
            BadImage: the image cannot be used.
        """
        size = None if self.sizes is None else self.sizes[index]
        if size:
            return index
        cell = self.paths[index]
        if size == 0 or cell is None or not str(cell).strip():
            raise BadImage("EMPTY", "there is no image in this row")
        if not isinstance(cell, str):
            raise BadImage("NOT_IMAGE", f"expected a path; found {type(cell).__name__}")
        # Strings, not Path: this runs for every row; and abspath leaves links as they are named.
        path = cell if is_url(cell) else os.path.abspath(os.path.join(self.table.root, cell))  # noqa: PTH100, PTH118
        if path not in self.probed:
            self.probed[path] = self._probe(path)
        if (bad := self.probed[path]) is not None:
            raise bad
        return path if self.sizes is None else index

    def _probe(self, path: str) -> BadImage | None:
        try:
            path.encode()
            if len(self.paths) > _OPENED and _is_plausible(path):
                return None
            probe_image(path, guess=self.missing < _GUESSES)
        except UnicodeEncodeError:
            return BadImage("BAD_NAME", "the file's name is not valid UTF-8", fix="rename the file")
        except BadImage as bad:
            self.missing += bad.code == "MISSING"
            return bad
        return None


def _is_plausible(path: str) -> bool:
    """Whether a path is that of a regular file of an allowed size; it is not opened."""
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path costs as much as the call)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _LARGEST


def _paths_and_sizes(data: Dataset, column: str) -> tuple[list[str | None], list[int | None]]:
    """Return the path and the number of bytes of each undecoded image; the bytes are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths: list[str | None] = []
    sizes: list[int | None] = []
    for batch in data.select_columns([column]).with_format("arrow").iter(1000):
        chunk = pa.chunked_array(batch[column]) if isinstance(batch[column], list) else batch[column]
        paths += pc.struct_field(chunk, "path").to_pylist()
        sizes += pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
    return paths, sizes
