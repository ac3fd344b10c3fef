"""What an index file holds beside the embeddings: which files, by which model, and the proof that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import ClipkitError, CorruptArtefact, UsageError
from clipkit.models.fingerprint.fingerprint import Fingerprint

_FORMAT = 1


_ROWS = 10_000  # read at once


_BROKEN = "the index file is damaged or was changed: {}"


_REBUILD = "build it again; check the disk"


class Entry(NamedTuple):
    """One image file.

    Attributes:
        path: the bytes of its name, below the root if there is one: a name need not be valid UTF-8.
        size, mtime_ns: as the file system had them; they tell whether it changed.
        content: SHA-256 of its bytes, by which the store knows its embedding.
    """

    path: bytes
    size: int
    mtime_ns: int
    content: bytes


@dataclass(frozen=True)
class Catalogue:
    """An index in memory.

    Attributes:
        model: name or folder of the model.
        fingerprint: of the model.
        root: the folder that was indexed; None for a list of files.
        entries: in the order of the rows.
        vectors: (entries, dim) float32.
    """

    model: str
    fingerprint: Fingerprint
    root: Path | None
    entries: list[Entry]
    vectors: Tensor

    def path_of(self, entry: Entry) -> Path:
        name = Path(os.fsdecode(entry.path))
        return self.root / name if self.root else name

    def about(self) -> dict[str, Any]:
        root = None if self.root is None else os.fsencode(self.root).hex()
        return {"format": _FORMAT, "model": self.model, "fingerprint": self.fingerprint.as_dict(), "root": root}


def write(store: EmbeddingStore, catalogue: Catalogue) -> None:
    """Makes the store an index of these entries, in one transaction; embeddings of nothing in it are dropped."""
    about = json.dumps(catalogue.about(), sort_keys=True)
    digest = _digest(about, catalogue.entries)
    with store.transaction():
        store.query("CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        store.query(
            "CREATE TABLE IF NOT EXISTS entries (row INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, "
            "size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content BLOB NOT NULL)"
        )
        store.query("DELETE FROM entries")
        store.change("INSERT OR REPLACE INTO about VALUES (?, ?)", [("about", about), ("digest", digest)])
        store.change("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", [(i, *e) for i, e in enumerate(catalogue.entries)])
        own = "SELECT id FROM spaces WHERE kind = 'image' AND tower = ?"
        tower = (catalogue.fingerprint.image,)
        store.query(f"DELETE FROM embeddings WHERE space NOT IN ({own})", tower)
        store.query("DELETE FROM embeddings WHERE content NOT IN (SELECT content FROM entries)")
        store.query("DELETE FROM spaces WHERE kind <> 'image' OR tower <> ?", tower)


def is_index(path: Path) -> bool:
    """Whether a file is an index, whole or damaged."""
    try:
        with EmbeddingStore(path, readonly=True) as store:
            return bool(store.query("SELECT 1 FROM sqlite_master WHERE name = 'entries'"))
    except ClipkitError:
        return False


def read(store: EmbeddingStore) -> Catalogue:
    """The index in a store, every byte of it verified.

    Raises:
        CorruptArtefact: it is none, or damaged.
        UsageError: it was written by a newer clipkit.
    """
    with store.transaction(write=False):
        if not store.query("SELECT 1 FROM sqlite_master WHERE name = 'entries'"):
            fix = "give an index file, or build one"
            raise CorruptArtefact("expected an index, found a store of embeddings", where=store.path, fix=fix)
        values = dict(store.query("SELECT key, value FROM about"))
        about = _about(values, store.path)
        fingerprint = Fingerprint.from_dict(about["fingerprint"])
        vectors, entries = _rows(store, fingerprint.image)
    if _digest(values["about"], entries) != values.get("digest"):
        raise CorruptArtefact(_BROKEN.format("the list of files"), where=store.path, fix=_REBUILD)
    root = None if about["root"] is None else Path(os.fsdecode(bytes.fromhex(about["root"])))
    return Catalogue(about["model"], fingerprint, root, entries, vectors)


def _about(values: Mapping[str, str], path: Path | None) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(values["about"])
        found = about["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtefact(_BROKEN.format("what it says of itself"), where=path, fix=_REBUILD) from error
    if found != _FORMAT:
        raise UsageError(
            f"the index has format {found}; this clipkit reads {_FORMAT}", where=path, fix="update clipkit"
        )
    return about


def _rows(store: EmbeddingStore, tower: str) -> tuple[Tensor, list[Entry]]:
    ((count,),) = store.query("SELECT count(*) FROM entries")
    vectors = torch.zeros(count, store.dim("image", tower) or 0)
    entries: list[Entry] = []
    for low in range(0, count, _ROWS):
        rows = store.query(_JOINED, (tower, low, low + _ROWS))
        if any(row[5] is None for row in rows) or [row[0] for row in rows] != list(range(low, min(low + _ROWS, count))):
            raise CorruptArtefact(_BROKEN.format("an embedding is missing"), where=store.path, fix=_REBUILD)
        some = [Entry(*row[1:5]) for row in rows]
        own = [store.unpack(entry.content, *row[5:]) for entry, row in zip(some, rows, strict=True)]
        vectors[low : low + len(own)] = torch.from_numpy(np.stack(own))
        entries += some
    return vectors, entries


_JOINED = """
    SELECT e.row, e.path, e.size, e.mtime_ns, e.content, v.vector, v.crc FROM entries e
    LEFT JOIN spaces s ON s.kind = 'image' AND s.tower = ?
    LEFT JOIN embeddings v ON v.space = s.id AND v.content = e.content
    WHERE e.row >= ? AND e.row < ? ORDER BY e.row"""


def _digest(about: str, entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256(about.encode())
    for path, size, mtime, content in entries:
        digest.update(b"%d %d %d " % (len(path), size, mtime) + path + content)
    return digest.hexdigest()
