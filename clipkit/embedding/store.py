"""EmbeddingStore: embeddings by content, in one SQLite file that survives a kill."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from clipkit.embedding.store_errors import translate
from clipkit.errors import ClipkitError, CorruptArtefact, UsageError

Vector: TypeAlias = npt.NDArray[np.float32]

_APPLICATION = 0x436C4B74  # "ClKt": marks the file as ours

_SCHEMA = 1

_LOOKUP = 500  # SQLite's oldest limit on the variables of one statement is 999

_TABLES = """
CREATE TABLE IF NOT EXISTS spaces (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, tower TEXT NOT NULL, dim INTEGER NOT NULL, UNIQUE (kind, tower));
CREATE TABLE IF NOT EXISTS embeddings (
    space INTEGER NOT NULL, content BLOB NOT NULL, vector BLOB NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (space, content));
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    content BLOB NOT NULL) WITHOUT ROWID;
"""

_SETTLED = 2 * 10**9  # nanoseconds: a file that changed later than this before it was read may change within its time


class Key(NamedTuple):
    """What an embedding is an embedding of, and by what.

    Attributes:
        content: SHA-256 of the content, 32 bytes (`content_hash`).
        kind: "image" or "text", with whatever transform is not part of the tower's fingerprint.
        tower: fingerprint of the tower, its evaluation transform or tokenizer included.
    """

    content: bytes
    kind: str
    tower: str


class EmbeddingStore:
    """Float32 vectors under content keys. A row that `put` has returned for is on the disk.

    SQLite in WAL mode with ``synchronous=FULL``; every row carries a checksum. Several processes and threads may read
    and write one store at once (not over a network file system, whose locks SQLite cannot trust).

    Args:
        path: the file, created with its parents where missing; None keeps the store in memory.
        wait: seconds to wait for another writer.
        readonly: open an existing, sealed file, also from a folder that cannot be written to.

    Raises:
        CorruptArtefact: the file is not an embedding store, or it is damaged.
        ResourceError: the file cannot be opened, or the disk is full, or another writer does not let go.
        UsageError: the store is of a newer clipkit.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, wait: float = 60.0, readonly: bool = False
    ) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._owner, self._wait = os.getpid(), wait
        with self._errors():
            self._db = self._connect(wait, readonly)
            try:
                self._patiently(lambda: self._prepare(readonly))
            except BaseException:
                self._db.close()
                raise

    def _connect(self, wait: float, readonly: bool) -> sqlite3.Connection:
        name = ":memory:"
        if self.path is not None:
            if not readonly:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            name = f"file:{quote(os.fsencode(self.path.absolute()))}?mode={'ro' if readonly else 'rwc'}"
        # autocommit: every transaction here is begun and ended by name
        return sqlite3.connect(name, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)

    def _prepare(self, readonly: bool) -> None:
        with self.transaction(write=False):  # one view: another process may be making this very file
            ((application,),) = self._db.execute("PRAGMA application_id")
            ((schema,),) = self._db.execute("PRAGMA user_version")
            ((tables,),) = self._db.execute("SELECT count(*) FROM sqlite_master")
        if application != _APPLICATION and (application or tables or readonly):
            message = "expected an embedding store, found another kind of SQLite file"
            raise CorruptArtefact(message, where=self.path, fix="choose another path")
        if schema > _SCHEMA:
            message = f"the store has schema {schema}; this clipkit reads up to {_SCHEMA}"
            raise UsageError(message, where=self.path, fix="update clipkit")
        if readonly:
            self._require_length()
            return
        self._db.execute("PRAGMA page_size=8192")  # 4096 would hold one vector of 512 numbers, and half a page of air
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        with self.transaction():  # of several that open a new file at once, each finds it empty or finished
            for statement in _TABLES.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id={_APPLICATION}")
            self._db.execute(f"PRAGMA user_version={_SCHEMA}")

    def _require_length(self) -> None:
        """SQLite finds a cut only if it happens to read there."""
        ((mode,),) = self._db.execute("PRAGMA journal_mode")
        ((pages,),) = self._db.execute("PRAGMA page_count")
        ((size,),) = self._db.execute("PRAGMA page_size")
        if self.path is not None and mode != "wal" and self.path.stat().st_size < pages * size:
            message = f"the file was cut: {pages * size:,} bytes expected, {self.path.stat().st_size:,} found"
            raise CorruptArtefact(message, where=self.path, fix="copy it again, or build it again")

    def get(self, keys: Sequence[Key]) -> dict[Key, Vector]:
        """The vectors that are there, (dim,) float32 each; a key that is not there is left out.

        Raises:
            CorruptArtefact: a row's checksum is wrong.
        """
        stored: dict[Key, Vector] = {}
        for (kind, tower), contents in _by_space(keys):
            rows = self._lookup(kind, tower, contents, "content, vector, crc")
            stored |= {Key(c, kind, tower): self.unpack(c, vector, crc) for c, vector, crc in rows}
        return stored

    def has(self, keys: Sequence[Key]) -> set[Key]:
        """The keys that are there; reads no vector."""
        return {
            Key(content, kind, tower)
            for (kind, tower), contents in _by_space(keys)
            for (content,) in self._lookup(kind, tower, contents, "content")
        }

    def put(self, keys: Sequence[Key], vectors: npt.ArrayLike) -> None:
        """Stores row i of ``vectors`` (n, dim) under key i, all or none; a key that is there keeps its vector.

        Raises:
            ClipkitError: a vector is not finite, or not of the dim of its kind and tower.
        """
        rows = np.ascontiguousarray(vectors, dtype="<f4")
        if rows.ndim != 2 or len(rows) != len(keys):
            raise ClipkitError(f"expected one vector for each of {len(keys)} keys, found shape {rows.shape}")
        if not np.isfinite(rows).all():
            raise ClipkitError("an embedding that is not finite cannot be stored", where=self.path)
        if any(len(key.content) != 32 for key in keys):
            raise ClipkitError("a key's content must be a SHA-256 of 32 bytes: see content_hash")
        with self._errors(), self.transaction():
            spaces = {(k.kind, k.tower) for k in keys}
            ids = {space: self._space(*space, dim=rows.shape[1]) for space in spaces}
            self._db.executemany(
                "INSERT OR IGNORE INTO embeddings VALUES (?, ?, ?, ?)",
                (_record(ids[key.kind, key.tower], key.content, row) for key, row in zip(keys, rows, strict=True)),
            )

    def known_contents(self, files: Sequence[str]) -> list[bytes | None]:
        """The content hash of each file that was read before, without opening it; None for the others.

        A file is known by its absolute path, size, time of change and inode.
        """
        stats = [file_stat(path) for path in files]
        contents: list[bytes | None] = [None] * len(files)
        for start in range(0, len(files), _LOOKUP):
            rows = [row for row in range(start, min(start + _LOOKUP, len(files))) if stats[row] is not None]
            names = {os.fsencode(os.path.abspath(files[row])): row for row in rows}  # noqa: PTH100 (a tenth of the time)
            marks = ",".join("?" * len(names))
            sql = f"SELECT path, size, mtime_ns, inode, content FROM files WHERE path IN ({marks})"
            known = {path: (tuple(status), content) for path, *status, content in self.query(sql, list(names))}
            for row in rows:
                path = os.fsencode(os.path.abspath(files[row]))  # noqa: PTH100
                if path in known and known[path][0] == stats[row]:
                    contents[row] = known[path][1]
        return contents

    def remember_contents(self, files: Sequence[tuple[str, tuple[int, int, int] | None, bytes]]) -> None:
        """Keep (path, `file_stat` before it was read, content hash) for `known_contents`."""
        now = time.time_ns()
        rows = [
            (os.fsencode(os.path.abspath(path)), *before, content)  # noqa: PTH100
            for path, before, content in files
            if before is not None and before == file_stat(path) and now - before[1] > _SETTLED
        ]
        self.change("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    def dim(self, kind: str, tower: str) -> int | None:
        """Length of the vectors of this kind and tower; None if there are none."""
        row = self.query("SELECT dim FROM spaces WHERE kind = ? AND tower = ?", (kind, tower))
        return int(row[0][0]) if row else None

    def __len__(self) -> int:
        return int(self.query("SELECT count(*) FROM embeddings")[0][0])

    def unpack(self, content: bytes, vector: bytes, crc: int) -> Vector:
        """A stored row's vector, its checksum verified."""
        if zlib.crc32(vector, zlib.crc32(content)) != crc:
            raise CorruptArtefact(
                "a stored embedding is not what was written (checksum)",
                where=f"{self.path}, content {content.hex()[:16]}",
                fix="delete the file and build it again; check the disk",
            )
        return np.frombuffer(vector, dtype="<f4")

    # ------------------------------------------------------------ for the other tables in this file (the search index)

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of one statement."""
        self._check_process()
        with self._lock, self._errors():
            return self._db.execute(sql, values).fetchall()

    def change(self, sql: str, rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]] = ((),)) -> None:
        """One statement for each of ``rows``, all or none."""
        with self._errors(), self.transaction():
            self._db.executemany(sql, rows)

    @contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[None]:
        """Everything in the block is written, or nothing; without ``write``, one view of the file whatever others
        write. An inner one joins the outer one."""
        self._check_process()
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled back already
                    self._db.execute("ROLLBACK")
                raise

    def seal(self) -> None:
        """Folds the write-ahead log into the file, which then is whole by itself and readable without write access."""
        with self._lock, self._errors():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._patiently(lambda: self._db.execute("PRAGMA journal_mode=DELETE").fetchall())

    def _patiently(self, work: Callable[[], object]) -> None:
        """SQLite does not wait for others to change the journal or to create a file, as it does with all else."""
        deadline = time.monotonic() + self._wait
        while True:
            try:
                work()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        with self._lock:
            if self._owner == os.getpid():  # a forked child must not touch its parent's connection
                self._db.close()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lookup(self, kind: str, tower: str, contents: Sequence[bytes], columns: str) -> Iterator[tuple[Any, ...]]:
        space = self.query("SELECT id FROM spaces WHERE kind = ? AND tower = ?", (kind, tower))
        for low in range(0, len(contents) if space else 0, _LOOKUP):
            some = contents[low : low + _LOOKUP]
            marks = ",".join("?" * len(some))
            yield from self.query(
                f"SELECT {columns} FROM embeddings WHERE space = ? AND content IN ({marks})", (*space[0], *some)
            )

    def _space(self, kind: str, tower: str, dim: int) -> int:
        self._db.execute("INSERT OR IGNORE INTO spaces (kind, tower, dim) VALUES (?, ?, ?)", (kind, tower, dim))
        sql = "SELECT id, dim FROM spaces WHERE kind = ? AND tower = ?"
        ((number, known),) = self._db.execute(sql, (kind, tower)).fetchall()
        if known != dim:
            raise ClipkitError(
                f"{kind} embeddings of tower {tower} have {known} dimensions here, found {dim}",
                where=self.path,
                fix="the fingerprint must change with the model: was it computed before the model was changed?",
            )
        return int(number)

    def _check_process(self) -> None:
        if self._owner != os.getpid():
            raise ClipkitError(
                "a store cannot be used in a process forked from the one that opened it",
                fix="open the store anew in the child process",
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeError) as error:
            raise translate(error, self.path) from error


def _record(space: int, content: bytes, row: Vector) -> tuple[int, bytes, bytes, int]:
    """A row of the table: the checksum covers the content's hash and the vector."""
    vector = row.tobytes()
    return space, content, vector, zlib.crc32(vector, zlib.crc32(content))


def file_stat(path: str) -> tuple[int, int, int] | None:
    """Size, time of change in nanoseconds and inode of a regular file; None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path costs as much as the call)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _by_space(keys: Sequence[Key]) -> Iterator[tuple[tuple[str, str], list[bytes]]]:
    def space(key: Key) -> tuple[str, str]:
        return key.kind, key.tower

    for kind_and_tower, group in groupby(sorted(set(keys), key=space), space):
        yield kind_and_tower, [key.content for key in group]
