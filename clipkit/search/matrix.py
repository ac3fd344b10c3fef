"""The embeddings of an index as one memory-mapped array, in a file beside the index file.

It is a cache: the index file holds the same embeddings. Opening it reads a header only; the first use of a tile checks
its hash (XXH3, which detects accidents, not tampering), so that damage is found before a score rests on it.

    8 bytes   "clipkitM"
    8 bytes   length of the header, little-endian; 8 bytes: XXH3 of the header
    header    JSON: generation of the index, rows, dim, and the hash of each tile
    padding   to a multiple of 4096 bytes
    rows      (rows, dim) float32, little-endian, one after the other
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from clipkit.errors import CorruptArtefact
from clipkit.files import publish

ROWS_PER_TILE = 65_536
_MAGIC = b"clipkitM"
_PREFIX = struct.Struct("<8sQQ")
_PAGE = 4096


class Matrix:
    """(rows, dim) float32 embeddings of unit length, in tiles of `ROWS_PER_TILE` rows.

    Args:
        vectors: all of them.
        hashes: of each tile, as 16 hex digits; None where the vectors were just read from the index file.
        path: the mapped file, for messages.
    """

    def __init__(self, vectors: Tensor, hashes: list[str] | None = None, path: Path | None = None) -> None:
        self._vectors, self._hashes, self.path = vectors, hashes, path
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def dim(self) -> int:
        return self._vectors.shape[1]

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row of each tile, and the tile.

        Raises:
            CorruptArtefact: a tile is not what was written.
        """
        for number, start in enumerate(range(0, len(self), ROWS_PER_TILE)):
            tile = self._vectors[start : start + ROWS_PER_TILE]
            if self._hashes is not None and number not in self._verified:
                if _hash(tile.numpy()) != self._hashes[number]:
                    message = f"rows {start:,} to {start + len(tile) - 1:,} are not what was written"
                    raise CorruptArtefact(message, where=self.path, fix="delete this file: it is made again")
                self._verified.add(number)
            yield start, tile

    def verified(self) -> Tensor:
        """Return all vectors, each tile checked."""
        for _ in self.tiles():
            pass
        return self._vectors


def matrix_path(index: Path) -> Path:
    """Return the file of an index's matrix."""
    return index.with_name(f"{index.name}.matrix")


def write_matrix(path: Path, generation: str, rows: int, dim: int, chunks: Iterable[np.ndarray[Any, Any]]) -> None:
    """Publish a matrix, replacing an older one. Never holds more than a chunk.

    Args:
        path: the file.
        generation: of the index that it belongs to.
        rows, dim: its shape.
        chunks: its rows in order, (n, dim) each; their numbers need not be those of the tiles.
    """
    publish(path, lambda fresh: _write(fresh, generation, rows, dim, chunks), replace=True)


def _write(path: Path, generation: str, rows: int, dim: int, chunks: Iterable[np.ndarray[Any, Any]]) -> None:
    tiles = -(-rows // ROWS_PER_TILE)
    header = {"generation": generation, "rows": rows, "dim": dim, "tiles": ["0" * 16] * tiles}
    start = _data_start(len(_encoded(header)))
    hashes = []
    with path.open("wb") as file:
        file.seek(start)
        digest, room = xxhash.xxh3_64(), ROWS_PER_TILE
        for chunk in chunks:
            data = np.ascontiguousarray(chunk, dtype="<f4")
            file.write(data.data)
            while len(data):
                digest.update(data[:room].data)
                used = min(room, len(data))
                data, room = data[used:], room - used
                if room == 0:
                    hashes.append(digest.hexdigest())
                    digest, room = xxhash.xxh3_64(), ROWS_PER_TILE
        if room < ROWS_PER_TILE:
            hashes.append(digest.hexdigest())
        content = _encoded(header | {"tiles": hashes})
        file.seek(0)
        file.write(_PREFIX.pack(_MAGIC, len(content), xxhash.xxh3_64_intdigest(content)) + content)
        file.truncate(start + 4 * rows * dim)


def open_matrix(path: Path, generation: str) -> Matrix | None:
    """Map a matrix; None where it is missing, damaged, or belongs to another state of the index."""
    try:
        with path.open("rb") as file:
            magic, length, check = _PREFIX.unpack(file.read(_PREFIX.size))
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(length, size))
            if magic != _MAGIC or xxhash.xxh3_64_intdigest(content) != check:
                return None
            header = json.loads(content)
            rows, dim, start = header["rows"], header["dim"], _data_start(length)
            if header["generation"] != generation or size != start + 4 * rows * dim:
                return None
            if rows * dim == 0:
                return Matrix(torch.zeros(rows, dim))
            # private and writable, for torch has no read-only tensors: whoever writes changes a copy
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, struct.error, ValueError, KeyError):
        return None
    vectors = torch.from_numpy(np.frombuffer(mapped, dtype="<f4", count=rows * dim, offset=start).reshape(rows, dim))
    return Matrix(vectors, header["tiles"], path)


def _encoded(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True).encode()


def _data_start(length: int) -> int:
    return -(-(_PREFIX.size + length) // _PAGE) * _PAGE


def _hash(rows: np.ndarray[Any, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(rows).data)
