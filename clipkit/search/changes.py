"""How an index's files changed since it was built: compared by name, size and time, or by content."""

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

SizeAndTime = tuple[int, int]


@dataclass(frozen=True)
class Changes:
    """What `EmbeddingIndex.update` changed.

    Attributes:
        added: images that were not in the index.
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
        """Return the number of images that were added, changed, moved, removed and kept."""
        counts = {name: len(getattr(self, name)) for name in ("added", "changed", "moved", "removed")}
        return counts | {"kept": self.kept}

    def __str__(self) -> str:
        words = ("new", "changed", "moved", "deleted", "as before")
        return ", ".join(f"{count:,} {word}" for count, word in zip(self.counts().values(), words, strict=True))


def size_and_time(file: Path) -> SizeAndTime:
    """Return size and time of change in nanoseconds; zeros if the file does not exist."""
    try:
        status = file.stat()
    except OSError:  # missing or unreadable: embed() reports it, with its reason
        return 0, 0
    return status.st_size, status.st_mtime_ns


def unchanged(
    files: Sequence[Path], stats: Mapping[Path, SizeAndTime], old: Mapping[Path, Entry], *, verify: bool
) -> set[Path]:
    """Return the files that need not be embedded again.

    Under several processes each reads its share.

    Args:
        files: the images that exist now.
        stats: their sizes and times.
        old: the entries of the index, by path.
        verify: compare contents, too, and not only name, size and time.
    """
    same = [file for file in files if file in old and (old[file].size, old[file].mtime_ns) == stats[file]]
    if not verify:
        return set(same)

    def verify_share() -> list[Path]:
        share = same[distributed.rank() :: distributed.world_size()]
        return [file for file in share if _content(file) == old[file].content]

    verified: set[Path] = set()
    for share in distributed.together(verify_share):
        verified.update(share)
    return verified


def _content(file: Path) -> bytes | None:
    try:
        return content_hash(bytes_of(file))
    except BadImage:  # embed() reports it, with its reason
        return None


def compare(old: Mapping[Path, Entry], new: Mapping[Path, Entry], same: set[Path], rejected: list[Reject]) -> Changes:
    """Return the differences between two states of an index.

    Args:
        old: the entries before, by path.
        new: the entries now, by path.
        same: files of both that were not read again.
        rejected: images that cannot be used now.
    """
    missing: dict[bytes, list[Path]] = {}  # content -> files of the old state that the new one lacks
    for file, entry in old.items():
        if file not in new:
            missing.setdefault(entry.content, []).append(file)
    added, moved = [], []
    for file, entry in new.items():
        if file in old:
            continue
        same_content = missing.get(entry.content)
        if same_content:
            moved.append((same_content.pop(0), file))
        else:
            added.append(file)
    in_both = [file for file in new if file in old]
    changed = [file for file in in_both if file not in same and new[file].content != old[file].content]
    removed = [file for files in missing.values() for file in files]
    return Changes(added, changed, moved, removed, rejected, kept=len(in_both) - len(changed))
