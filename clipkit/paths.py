"""Paths as people meet them: printed safely, walked without loops, and guessed at when mistyped."""

from __future__ import annotations

import itertools
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from clipkit.errors import DataError
from clipkit.suggest import closest

_KINDS = 12  # suffixes or names that one line counts


def show(path: str | os.PathLike[str]) -> str:
    """Return a path that can be printed anywhere: what is not valid UTF-8, or does not print, is escaped."""
    text = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def at_home(path: str) -> str:
    """A path with `~` as the home folder: a shell leaves it as it is in `--to=~/x` and `key=~/x`."""
    return str(Path(path).expanduser()) if re.match(r"~(/|$)", path) else path


def is_url(name: str) -> bool:
    """Whether a name has a scheme (https://, s3://, data:) rather than being a file's."""
    return re.match(r"[a-z][a-z0-9+.-]+://|data:", name[:32], re.IGNORECASE) is not None


@dataclass(frozen=True)
class Tree:
    """What lies below a folder, as `walk` saw it.

    Attributes:
        root: the folder.
        files: every visible file, sorted by name.
        folders: every visible folder that could be listed, the root first.
        skipped: what was not looked into, by name: hidden files and folders, and what systems leave behind.
        unreadable: the folders that could not be listed, and why.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: dict[Path, str] = field(default_factory=dict)

    def passed_over(self, used: Iterable[Path]) -> str | None:
        """Return one line that counts the files not used, by suffix, and those skipped; None if there are none.

        >>> Tree(Path("photos"), [Path("photos/a.dng"), Path("photos/b.jpg")]).passed_over([Path("photos/b.jpg")])
        'photos: not read: 1 .dng'
        """
        used_files = set(used)
        unread = Counter(_suffix(path) for path in self.files if path not in used_files)
        parts = []
        if unread:
            parts.append(f"not read: {_counted(unread)}")
        if self.skipped:
            parts.append(f"skipped: {_counted(self.skipped)}")
        return f"{show(self.root)}: {'; '.join(parts)}" if parts else None


def walk(root: str | os.PathLike[str]) -> Tree:
    """List every visible folder from `root` down, once whatever its links say.

    A folder below the root that cannot be listed is kept in `Tree.unreadable`: the caller lists it with the rejects.

    Raises:
        DataError: `root` does not exist, is not a folder, or cannot be listed.
    """
    tree = Tree(Path(root))
    if not tree.root.is_dir():
        kind = "is not a folder" if tree.root.exists() else "does not exist"
        raise DataError(f"expected a folder; {show(tree.root)} {kind}", fix=did_you_mean(tree.root))
    seen = {_identity(tree.root)}
    for parent, folders, files in os.walk(tree.root, onerror=lambda error: _unlisted(tree, error), followlinks=True):
        here = Path(parent)
        tree.folders.append(here)
        folders[:] = list(_to_visit(here, folders, seen, tree))
        tree.files.extend(here / name for name in files if not _skip(name, "file", tree.skipped))
    if tree.root in tree.unreadable:
        raise DataError(
            f"the folder cannot be listed: {tree.unreadable[tree.root]}",
            code="UNREADABLE",
            where=show(tree.root),
            fix="give yourself permission to read it",
        )
    tree.files.sort(key=str)
    return tree


def _unlisted(tree: Tree, error: OSError) -> None:
    tree.unreadable[Path(os.fsdecode(error.filename))] = error.strerror or type(error).__name__


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _to_visit(here: Path, names: list[str], seen: set[tuple[int, int]], tree: Tree) -> Iterator[str]:
    # Real folders before links to them, so that a file is listed under its own name.
    for name in sorted(names, key=lambda name: ((here / name).is_symlink(), name)):
        if _skip(name, "folder", tree.skipped):
            continue
        try:
            identity = _identity(here / name)
        except OSError as error:
            _unlisted(tree, error)
            continue
        if identity not in seen:
            seen.add(identity)
            yield name


# What file managers, cameras' tools and network drives leave beside photos: copies, thumbnails, bins.
_LEFT_BEHIND = {"@eadir", "@recycle", "#recycle", "#snapshot", "@recently-snapshot", "__macosx", "$recycle.bin"}
_LEFT_BEHIND |= {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}


def _skip(name: str, kind: str, skipped: Counter[str]) -> bool:
    if not name.startswith(".") and name.lower() not in _LEFT_BEHIND:
        return False
    by_name = kind == "folder" or name == ".DS_Store" or not name.startswith(".")
    skipped[show(name) if by_name else "other hidden"] += 1
    return True


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return show(suffix) if re.fullmatch(r"\.\S{1,12}", suffix) else "without a suffix"


def _counted(counts: Counter[str]) -> str:
    shown = [f"{number:,} {name}" for name, number in counts.most_common(_KINDS)]
    rest = sum(counts.values()) - sum(number for _, number in counts.most_common(_KINDS))
    return ", ".join([*shown, f"{rest:,} of other names"] if rest else shown)


def near_path(path: Path) -> Path | None:
    """Return the file that was probably meant by a missing one.

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
    same_digits = [name for name in names if _digits(name) == _digits(path.name) and names[name] != path.name]
    matches = closest(_plain(path.name), same_digits, cutoff=0.8)
    return path.parent / names[matches[0]] if matches else None


def did_you_mean(path: Path) -> str | None:
    """Return a fix that names the near path, if there is one."""
    near = near_path(path)
    return f"did you mean {show(near)}?" if near else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _digits(name: str) -> str:
    return "".join(c for c in name if c.isdigit())


def cache_folder(name: str) -> Path:
    """Return the folder for one kind of thing; it need not exist.

    It lies in `CLIPKIT_CACHE`, else where the system keeps caches: `XDG_CACHE_HOME` or ~/.cache on Linux,
    ~/Library/Caches on macOS, `LOCALAPPDATA` on Windows; there in a folder `clipkit`.

    Args:
        name: of the kind, such as ``verified``.
    """
    own = os.environ.get("CLIPKIT_CACHE")
    if own:
        return Path(own).expanduser() / name
    if sys.platform == "darwin":
        caches = Path("~/Library/Caches")
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return caches.expanduser() / "clipkit" / name
