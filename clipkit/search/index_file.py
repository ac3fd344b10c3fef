"""The index file: which image files it lists, the model that embedded them, and a digest that detects damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from clipkit.embedding.decoding import Decode
from clipkit.embedding.embed import space_of
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import ClipkitError, CorruptArtefact, ResourceError, UsageError, typed
from clipkit.files import publish
from clipkit.models.fingerprint.fingerprint import Fingerprint
from clipkit.paths import did_you_mean
from clipkit.search.matrix import Matrix, matrix_path, open_matrix, write_matrix

_FORMAT = 2  # 2: a generation, a hash of each row, and the matrix beside the file
_ROWS_AT_ONCE = 10_000
_LOOKUP = 500  # rows of one statement; SQLite's oldest limit on its variables is 999
_BROKEN = "the index file is damaged or was changed: {}"
_REBUILD = "build it again; check the disk"
_ENTRIES = """CREATE TABLE IF NOT EXISTS entries (row INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content BLOB NOT NULL, hash BLOB NOT NULL)"""
_VECTORS = """
    SELECT e.row, e.content, v.vector, v.crc FROM entries e
    LEFT JOIN spaces s ON s.kind = ? AND s.tower = ?
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
class Header:
    """What an index file says of itself.

    Attributes:
        model: name or folder of the model.
        fingerprint: of the model.
        root: the folder that was indexed; None for a list of files.
        decode: how the images were decoded, see `embed`.
        rows: how many images.
        generation: drawn anew whenever the entries change: rows of two generations must not be mixed.
    """

    model: str
    fingerprint: Fingerprint
    root: Path | None
    decode: Decode = "exact"
    rows: int = 0
    generation: str = ""

    def path_of(self, entry: Entry) -> Path:
        """Return the path of an entry's file."""
        name = Path(os.fsdecode(entry.path))
        return self.root / name if self.root else name

    def as_json(self) -> str:
        root = None if self.root is None else os.fsencode(self.root).hex()
        fields = {"format": _FORMAT, "model": self.model, "fingerprint": self.fingerprint.as_dict(), "root": root}
        fields |= {"decode": self.decode, "rows": self.rows, "generation": self.generation}
        return json.dumps(fields, sort_keys=True)

    @property
    def space(self) -> tuple[str, str]:
        """`Key.kind` and `Key.tower` of its embeddings."""
        return space_of("image", self.decode), self.fingerprint.image


class ChangedError(Exception):
    """The index file was updated after its header was read."""


def open_index(path: Path) -> Header:
    """Read the header of an index file, and bring an older format up to date.

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
    with EmbeddingStore(path, readonly=True) as store, store.transaction(write=False):
        version, header = _read_header(store)
    if version == 1:
        _upgrade(path)
        return open_index(path)
    return header


def read_entries(path: Path, generation: str) -> list[Entry]:
    """Return all entries in the order of their rows, each of them verified.

    Raises:
        ChangedError: the index is of another generation by now.
        CorruptArtefact: it is damaged.
    """
    with EmbeddingStore(path, readonly=True) as store, store.transaction(write=False):
        _require_generation(store, generation)
        rows = store.query("SELECT row, path, size, mtime_ns, content, hash FROM entries ORDER BY row")
        if [row[0] for row in rows] != list(range(_read_header(store)[1].rows)):
            raise CorruptArtefact(_BROKEN.format("the list of files"), where=path, fix=_REBUILD)
    return [_verified(*row, where=path) for row in rows]


def look_up(path: Path, generation: str, rows: Iterable[int]) -> dict[int, Entry]:
    """Return the entries of some rows, each of them verified; errors as for `read_entries`."""
    numbers = list(dict.fromkeys(rows))
    entries: dict[int, Entry] = {}
    with EmbeddingStore(path, readonly=True) as store, store.transaction(write=False):
        _require_generation(store, generation)
        for start in range(0, len(numbers), _LOOKUP):
            chunk = numbers[start : start + _LOOKUP]
            marks = ",".join("?" * len(chunk))
            columns = "row, path, size, mtime_ns, content, hash"
            for row in store.query(f"SELECT {columns} FROM entries WHERE row IN ({marks})", chunk):
                entries[row[0]] = _verified(*row, where=path)
    if len(entries) < len(numbers):
        raise CorruptArtefact(_BROKEN.format("the list of files"), where=path, fix=_REBUILD)
    return entries


def read_vectors(store: EmbeddingStore, header: Header) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the embeddings in the order of the rows, some thousand at once, each of them verified.

    Raises:
        CorruptArtefact: one is missing or damaged.
    """
    for start in range(0, header.rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, header.rows)
        rows = store.query(_VECTORS, (*header.space, start, stop))
        complete = [row[0] for row in rows] == list(range(start, stop))
        if not complete or any(row[2] is None for row in rows):
            raise CorruptArtefact(_BROKEN.format("an embedding is missing"), where=store.path, fix=_REBUILD)
        yield np.stack([store.unpack(*row[1:]) for row in rows])


def load_matrix(path: Path, header: Header) -> Matrix:
    """Map the matrix beside an index file; make it again where it is missing, stale or damaged.

    Where nothing can be written, the embeddings are read into memory.

    Raises:
        ChangedError, CorruptArtefact: as for `read_entries`.
    """
    file = matrix_path(path)
    matrix = open_matrix(file, header.generation)
    if matrix is not None:
        return matrix
    with EmbeddingStore(path, readonly=True) as store, store.transaction(write=False):
        _require_generation(store, header.generation)
        dim = store.dim(*header.space) or 0
        with contextlib.suppress(ResourceError):
            write_matrix(file, header.generation, header.rows, dim, read_vectors(store, header))
            matrix = open_matrix(file, header.generation)
        if matrix is None:
            vectors = torch.zeros(header.rows, dim)
            start = 0
            for chunk in read_vectors(store, header):
                vectors[start : start + len(chunk)] = torch.from_numpy(chunk)
                start += len(chunk)
            matrix = Matrix(vectors)
    return matrix


def write_index(path: Path, header: Header, entries: Sequence[Entry]) -> Header:
    """Turn a store of embeddings into an index of these entries, in one transaction; return its header.

    Embeddings that no entry needs are deleted. Rows and generation are set here.
    """
    header = replace(header, rows=len(entries), generation=secrets.token_hex(16))
    with EmbeddingStore(path) as store:
        _write(store, header, entries)
        store.seal()
    return header


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


def _write(store: EmbeddingStore, header: Header, entries: Sequence[Entry]) -> None:
    text = header.as_json()
    with store.transaction():
        store.query("CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        store.query("DROP TABLE IF EXISTS entries")
        store.query(_ENTRIES)
        about = {"about": text, "digest": hashlib.sha256(text.encode()).hexdigest(), "generation": header.generation}
        store.change("INSERT OR REPLACE INTO about VALUES (?, ?)", list(about.items()))
        rows = ((row, *entry, _hash(row, entry)) for row, entry in enumerate(entries))
        store.change("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)
        own_space = "SELECT id FROM spaces WHERE kind = ? AND tower = ?"
        store.query(f"DELETE FROM embeddings WHERE space NOT IN ({own_space})", header.space)
        store.query("DELETE FROM embeddings WHERE content NOT IN (SELECT content FROM entries)")
        store.query("DELETE FROM spaces WHERE kind <> ? OR tower <> ?", header.space)
        store.query("DELETE FROM files")  # the entries know their files


def _read_header(store: EmbeddingStore) -> tuple[int, Header]:
    """The format, and the header; both verified."""
    if not _has_entries(store):
        fix = "give an index file, or build one"
        raise CorruptArtefact("expected an index, found a store of embeddings", where=store.path, fix=fix)
    values = dict(store.query("SELECT key, value FROM about"))
    try:
        fields: dict[str, Any] = json.loads(values["about"])
        version = fields["format"]
        if version not in (1, _FORMAT):
            message = f"the index has format {version}; this clipkit reads up to {_FORMAT}"
            raise UsageError(message, where=store.path, fix="update clipkit")
        digest = hashlib.sha256(values["about"].encode()).hexdigest()
        if version == _FORMAT and (values["digest"], values["generation"]) != (digest, fields["generation"]):
            raise CorruptArtefact(_BROKEN.format("its header"), where=store.path, fix=_REBUILD)
        root = None if fields["root"] is None else Path(os.fsdecode(bytes.fromhex(fields["root"])))
        fingerprint = Fingerprint.from_dict(fields["fingerprint"])
        later = {name: fields[name] for name in ("decode", "rows", "generation") if name in fields}
        header = Header(fields["model"], fingerprint, root, **later)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptArtefact(_BROKEN.format("its header"), where=store.path, fix=_REBUILD) from error
    return version, header


def _require_generation(store: EmbeddingStore, generation: str) -> None:
    """Raise ChangedError where the index is of another generation than the header that was read."""
    if store.query("SELECT value FROM about WHERE key = 'generation'") != [(generation,)]:
        raise ChangedError


def _upgrade(path: Path) -> None:
    """Rewrite an index of format 1, which clipkit 0.1 wrote, after every entry of it was verified."""
    with EmbeddingStore(path, readonly=True) as store, store.transaction(write=False):
        _, header = _read_header(store)
        values = dict(store.query("SELECT key, value FROM about"))
        rows = store.query("SELECT path, size, mtime_ns, content FROM entries ORDER BY row")
    entries = [Entry(*row) for row in rows]
    digest = hashlib.sha256(values["about"].encode())
    for name, size, mtime, content in entries:
        digest.update(b"%d %d %d " % (len(name), size, mtime) + name + content)
    if digest.hexdigest() != values.get("digest"):
        raise CorruptArtefact(_BROKEN.format("the list of files"), where=path, fix=_REBUILD)
    try:
        write_index(path, header, entries)
    except ResourceError as error:
        message = "the index was written by clipkit 0.1, and cannot be brought up to date here"
        raise ResourceError(message, where=path, fix="make it writable, or copy it, and open it once") from error


def _hash(row: int, entry: Entry) -> bytes:
    name, size, mtime, content = entry
    return xxhash.xxh3_64_digest(b"%d %d %d %d " % (row, len(name), size, mtime) + name + content)


def _verified(row: int, name: bytes, size: int, mtime: int, content: bytes, check: bytes, *, where: Path) -> Entry:
    entry = Entry(name, size, mtime, content)
    if _hash(row, entry) != check:
        raise CorruptArtefact(_BROKEN.format("the list of files"), where=where, fix=_REBUILD)
    return entry
