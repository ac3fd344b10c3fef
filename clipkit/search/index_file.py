"""The index file: which image files it lists, the model that embedded them, and a digest that detects damage."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import ClipkitError, CorruptArtefact, UsageError, typed
from clipkit.files import publish
from clipkit.models.fingerprint.fingerprint import Fingerprint
from clipkit.paths import did_you_mean

_FORMAT = 1
_ROWS_AT_ONCE = 10_000
_BROKEN = "the index file is damaged or was changed: {}"
_REBUILD = "build it again; check the disk"
_ENTRIES_WITH_VECTORS = """
    SELECT e.row, e.path, e.size, e.mtime_ns, e.content, v.vector, v.crc FROM entries e
    LEFT JOIN spaces s ON s.kind = 'image' AND s.tower = ?
    LEFT JOIN embeddings v ON v.space = s.id AND v.content = e.content
    WHERE e.row >= ? AND e.row < ? ORDER BY e.row"""


class Entry(NamedTuple):
    """One image file.

    Attributes:
        path: the bytes of its name, below the root if there is one: a name need not be valid UTF-8.
        size, mtime_ns: as the file system had them; they show whether the file changed.
        content: SHA-256 of its bytes, under which the store keeps its embedding.
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
        """Return the path of an entry's file."""
        name = Path(os.fsdecode(entry.path))
        return self.root / name if self.root else name

    def header(self) -> dict[str, Any]:
        """Return all but the entries and vectors, as JSON keeps it."""
        root = None if self.root is None else os.fsencode(self.root).hex()
        return {"format": _FORMAT, "model": self.model, "fingerprint": self.fingerprint.as_dict(), "root": root}


def read_index(path: Path) -> Catalogue:
    """Read an index file and verify every byte of it.

    Raises:
        UsageError: there is no such file; or a newer clipkit wrote it.
        CorruptArtefact: it is damaged, or not an index.
    """
    if path.is_dir():
        raise UsageError("expected an index file; it is a folder", where=path, fix="give the index file")
    if not path.is_file():
        build = typed(
            python="EmbeddingIndex.build(model, folder, path)",
            shell=f"clipkit index FOLDER --model MODEL --to {shlex.quote(str(path))}",
        )
        fix = did_you_mean(path) or f"build it first: {build}"
        raise UsageError("expected an index file; it does not exist", where=path, fix=fix)
    with EmbeddingStore(path, readonly=True) as store:
        return _read(store)


def write_index(path: Path, catalogue: Catalogue) -> None:
    """Turn a store of embeddings into an index of these entries, in one transaction.

    Embeddings that no entry needs are deleted.
    """
    with EmbeddingStore(path) as store:
        _write(store, catalogue)
        store.seal()


def publish_index(draft: Path, target: Path, *, replace: bool) -> None:
    """Copy a draft to where the index belongs, entirely or not at all, and delete the draft."""

    def copy(fresh: Path) -> None:
        with EmbeddingStore(draft) as store:
            store.query("VACUUM INTO ?", (os.fspath(fresh),))
        with EmbeddingStore(fresh) as store:
            store.seal()

    publish(target, copy, replace=replace)
    for suffix in ("", "-wal", "-shm"):
        draft.with_name(draft.name + suffix).unlink(missing_ok=True)


def require_free_path(target: Path, *, overwrite: bool) -> None:
    """Refuse a path that is taken, unless an index is there that may be overwritten.

    Raises:
        UsageError: the path is taken.
    """
    if not target.exists():
        return
    if not overwrite:
        fix = "open it with EmbeddingIndex.open and call update(), choose another path, or pass overwrite=True"
        raise UsageError("there is something at this path already", where=target, fix=fix)
    if not _is_index(target):
        message = "only an index may be overwritten, and this is not one"
        raise UsageError(message, where=target, fix="choose another path")


def _is_index(path: Path) -> bool:
    """Whether a file is an index, intact or damaged."""
    try:
        with EmbeddingStore(path, readonly=True) as store:
            return _has_entries(store)
    except ClipkitError:
        return False


def _has_entries(store: EmbeddingStore) -> bool:
    return bool(store.query("SELECT 1 FROM sqlite_master WHERE name = 'entries'"))


def _write(store: EmbeddingStore, catalogue: Catalogue) -> None:
    header = json.dumps(catalogue.header(), sort_keys=True)
    digest = _digest(header, catalogue.entries)
    tower = catalogue.fingerprint.image
    with store.transaction():
        store.query("CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        store.query(
            "CREATE TABLE IF NOT EXISTS entries (row INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, "
            "size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content BLOB NOT NULL)"
        )
        store.query("DELETE FROM entries")
        store.change("INSERT OR REPLACE INTO about VALUES (?, ?)", [("about", header), ("digest", digest)])
        rows = [(row, *entry) for row, entry in enumerate(catalogue.entries)]
        store.change("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", rows)
        own_space = "SELECT id FROM spaces WHERE kind = 'image' AND tower = ?"
        store.query(f"DELETE FROM embeddings WHERE space NOT IN ({own_space})", (tower,))
        store.query("DELETE FROM embeddings WHERE content NOT IN (SELECT content FROM entries)")
        store.query("DELETE FROM spaces WHERE kind <> 'image' OR tower <> ?", (tower,))


def _read(store: EmbeddingStore) -> Catalogue:
    with store.transaction(write=False):
        if not _has_entries(store):
            fix = "give an index file, or build one"
            raise CorruptArtefact("expected an index, found a store of embeddings", where=store.path, fix=fix)
        values = dict(store.query("SELECT key, value FROM about"))
        header = _parse_header(values, store.path)
        fingerprint = Fingerprint.from_dict(header["fingerprint"])
        vectors, entries = _read_rows(store, fingerprint.image)
    if _digest(values["about"], entries) != values.get("digest"):
        raise CorruptArtefact(_BROKEN.format("the list of files"), where=store.path, fix=_REBUILD)
    root = None if header["root"] is None else Path(os.fsdecode(bytes.fromhex(header["root"])))
    return Catalogue(header["model"], fingerprint, root, entries, vectors)


def _parse_header(values: Mapping[str, str], path: Path | None) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(values["about"])
        version = header["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtefact(_BROKEN.format("its header"), where=path, fix=_REBUILD) from error
    if version != _FORMAT:
        message = f"the index has format {version}; this clipkit reads {_FORMAT}"
        raise UsageError(message, where=path, fix="update clipkit")
    return header


def _read_rows(store: EmbeddingStore, tower: str) -> tuple[Tensor, list[Entry]]:
    ((count,),) = store.query("SELECT count(*) FROM entries")
    vectors = torch.zeros(count, store.dim("image", tower) or 0)
    entries: list[Entry] = []
    for start in range(0, count, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, count)
        rows = store.query(_ENTRIES_WITH_VECTORS, (tower, start, start + _ROWS_AT_ONCE))
        complete = [row[0] for row in rows] == list(range(start, stop))
        if not complete or any(row[5] is None for row in rows):
            raise CorruptArtefact(_BROKEN.format("an embedding is missing"), where=store.path, fix=_REBUILD)
        chunk = [Entry(*row[1:5]) for row in rows]
        embeddings = [store.unpack(entry.content, *row[5:]) for entry, row in zip(chunk, rows, strict=True)]
        vectors[start:stop] = torch.from_numpy(np.stack(embeddings))
        entries += chunk
    return vectors, entries


def _digest(header: str, entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256(header.encode())
    for path, size, mtime, content in entries:
        digest.update(b"%d %d %d " % (len(path), size, mtime) + path + content)
    return digest.hexdigest()
