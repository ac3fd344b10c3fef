"""What became of an index's files since it was made: looked at by name, size and time, or by content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.errors import BadImage
from clipkit.files import content_hash
from clipkit.images.load import bytes_of
from clipkit.search.index_file import Entry

Stat = tuple[int, int]


@dataclass(frozen=True)
class Changes:
    """What `EmbeddingIndex.update` found.

    Attributes:
        added: images that were not there.
        changed: images with another content under the name they had.
        moved: images under a new name, as (before, now); they are neither among the added nor the removed.
        removed: images that are gone, or cannot be used any more.
        rejected: images that cannot be used, and folders that cannot be listed.
        kept: how many are as they were.
    """

    added: list[Path]
    changed: list[Path]
    moved: list[tuple[Path, Path]]
    removed: list[Path]
    rejected: list[Reject]
    kept: int

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        found = {name: len(getattr(self, name)) for name in ("added", "changed", "moved", "removed")}
        return found | {"kept": self.kept}

    def __str__(self) -> str:
        words = ("new", "changed", "moved", "deleted", "as before")
        return ", ".join(f"{count:,} {word}" for count, word in zip(self.counts().values(), words, strict=True))


def stat_of(file: Path) -> Stat:
    """Size and time of change in nanoseconds; zeros if there is no such file."""
    try:
        status = file.stat()
    except OSError:  # gone or unreadable: embed() says so, with its reason
        return 0, 0
    return status.st_size, status.st_mtime_ns


def unchanged(
    files: Sequence[Path], stats: Mapping[Path, Stat], old: Mapping[Path, Entry], *, verify: bool
) -> set[Path]:
    """Those of the files that need not be embedded: known by name, size and time, and with `verify` by content.

    Under several processes each reads its share.
    """
    same = [file for file in files if file in old and (old[file].size, old[file].mtime_ns) == stats[file]]
    if not verify:
        return set(same)

    def mine() -> list[Path]:
        share = same[distributed.rank() :: distributed.world_size()]
        return [file for file in share if _content(file) == old[file].content]

    return {file for part in distributed.together(mine) for file in part}


def _content(file: Path) -> bytes | None:
    try:
        return content_hash(bytes_of(file))
    except BadImage:  # embed() says so, with its reason
        return None


def compare(old: Mapping[Path, Entry], new: Mapping[Path, Entry], same: set[Path], rejected: list[Reject]) -> Changes:
    """What tells two states of an index apart, whose entries are given by their paths.

    Args:
        same: those of both that were not looked at again.
    """
    gone: dict[bytes, list[Path]] = {}
    for file, entry in old.items():
        if file not in new:
            gone.setdefault(entry.content, []).append(file)
    added, moved = [], []
    for file, entry in new.items():
        if file in old:
            continue
        if before := gone.get(entry.content):
            moved.append((before.pop(0), file))
        else:
            added.append(file)
    changed = [file for file in new if file in old and file not in same and new[file].content != old[file].content]
    kept = sum(file in old for file in new) - len(changed)
    return Changes(added, changed, moved, [file for files in gone.values() for file in files], rejected, kept)
