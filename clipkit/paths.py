"""Paths as people meet them: printed safely, walked without loops, and guessed at when mistyped."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from clipkit.errors import DataError


def show(path: str | os.PathLike[str]) -> str:
    """A path that can be printed anywhere, also where its name is no valid UTF-8 or holds control characters."""
    text = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def is_url(name: str) -> bool:
    """Whether a name has a scheme (https://, s3://, data:) rather than being a file's."""
    return re.match(r"[a-z][a-z0-9+.-]+://|data:", name[:32], re.IGNORECASE) is not None


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every visible folder from `root` down, once whatever its links say, with the names of its visible files.

    Raises:
        DataError: a folder cannot be listed. Silence would lose its files.
    """

    def stop(error: OSError) -> None:
        raise DataError(
            f"UNREADABLE: a folder cannot be listed: {error.strerror}",
            where=show(error.filename),
            fix="give yourself permission to read it, or move it out of the way",
        ) from error

    status = root.stat()
    seen = {(status.st_dev, status.st_ino)}
    for parent, folders, files in os.walk(root, onerror=stop, followlinks=True):
        here = Path(parent)
        keep = []
        # Real folders before links to them, so that a file is found under its own name.
        for name in sorted(folders, key=lambda name: ((here / name).is_symlink(), name)):
            status = (here / name).stat()
            if not name.startswith(".") and (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                keep.append(name)
        folders[:] = keep
        yield here, [name for name in files if not name.startswith(".")]


def near_path(path: Path) -> Path | None:
    """The file that was probably meant by a missing one.

    Tried in turn: backslashes as slashes, %20 as a space, another case or composition of accents, a typing slip.
    """
    for other in (str(path).replace("\\", "/"), unquote(str(path))):
        if other != str(path) and os.path.lexists(other):
            return Path(other)
    try:
        with os.scandir(path.parent) as entries:
            names = {_plain(entry.name): entry.name for entry in itertools.islice(entries, 2000)}
    except (OSError, ValueError):
        return None
    # img_0001 and img_0002 are two files, not one and its misspelling
    alike = [name for name in names if _digits(name) == _digits(path.name)]
    close = difflib.get_close_matches(_plain(path.name), alike, n=1, cutoff=0.8)
    return path.parent / names[close[0]] if close else None


def did_you_mean(path: Path) -> str | None:
    """A fix that names the near path, if there is one."""
    near = near_path(path)
    return f"did you mean {show(near)}?" if near else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _digits(name: str) -> str:
    return "".join(c for c in name if c.isdigit())
