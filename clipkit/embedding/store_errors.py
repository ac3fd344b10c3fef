"""Errors of an embedding store, from those of SQLite and the operating system."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from clipkit.errors import ClipkitError, CorruptArtefact, ResourceError

# SQLITE_ERROR is a statement that does not fit the tables: ours do, unless the tables are damaged
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA)


def translate(error: Exception, path: Path | None) -> ClipkitError:
    """Return the error to raise in place of one of SQLite or the operating system, which says how to fix it."""
    if isinstance(error, sqlite3.ProgrammingError):
        return ClipkitError("the store is closed", where=path, fix="open it again")
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # Python's own: text that is not UTF-8
    # a damaged schema comes back in SQLite's own message, which then is not UTF-8
    if isinstance(error, UnicodeError) or (isinstance(error, sqlite3.Error) and code in _BROKEN):
        fix = "check the path; if a store was there, it is lost: build it again"
        return CorruptArtefact(f"expected an embedding store: {error}", where=path, fix=fix)
    if isinstance(error, sqlite3.Error) and code == sqlite3.SQLITE_BUSY:
        return ResourceError("another process keeps writing to the store", where=path, fix="wait for it to end")
    if isinstance(error, sqlite3.Error) and code == sqlite3.SQLITE_FULL:
        return ResourceError("the disk is full", where=path, fix="free some space and run again: stored rows are kept")
    fix = "check that it is a file, and that you may write to it and to its folder"
    return ResourceError(f"the store cannot be read or written: {error}", where=path, fix=fix)
