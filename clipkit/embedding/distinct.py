"""The distinct items of a call of `embed`: by their content, or by themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.embedding.items import EmbedResult, batched, reject
from clipkit.embedding.store import EmbeddingStore, file_stat
from clipkit.errors import BadImage, ClipkitError, DataError
from clipkit.files import content_hash
from clipkit.images.load import bytes_of
from clipkit.modality import Modality
from clipkit.progress import track
from clipkit.texts import checked_text

_FILES = 4096  # looked up in the store at once


@dataclass
class DistinctItems:
    """The distinct items.

    number: for each row, which distinct item it is; None where it was refused.
    first: for each distinct item, its first row.
    content: for each distinct item, the SHA-256 of its content; empty without a store.
    rejected: by row.
    """

    number: list[int | None]
    first: list[int]
    content: list[bytes]
    rejected: dict[int, Reject]

    def assemble(self, vectors: Tensor, rejected: Mapping[int, Reject]) -> EmbedResult:
        """One row of ``vectors`` (one a distinct item) for each item that was used."""
        out = dict(self.rejected)
        out |= {r: replace(rejected[n], row=r) for r, n in enumerate(self.number) if n is not None and n in rejected}
        used = [(row, n) for row, n in enumerate(self.number) if n is not None and row not in out]
        if len(used) + len(out) != len(self.number):
            raise ClipkitError(f"{len(self.number)} items, but {len(used)} used and {len(out)} rejected: a bug")
        content = [self.content[n] for _, n in used] if self.content else []
        return EmbedResult(vectors[[n for _, n in used]], [r for r, _ in used], [out[r] for r in sorted(out)], content)


def identify(
    items: Sequence[Any], kind: Modality, store: EmbeddingStore | None, *, skip: bool, progress: bool
) -> DistinctItems:
    """With a store an item is known by its content; without one, a text by itself and an image by its row."""
    hashed = store is not None
    here, world = distributed.rank(), distributed.world_size()
    rows = range(here, len(items), world) if hashed or kind == "text" else range(0)
    main = progress and distributed.is_main()

    def name(row: int, item: Any) -> Hashable:
        try:
            if kind == "text":
                text = checked_text(item)
                return content_hash(text) if hashed else text
            return content_hash(bytes_of(item)) if hashed else row
        except DataError as error:
            if not skip:
                raise (error.or_skip() if isinstance(error, BadImage) else error) from error.__cause__
            return reject(row, item if kind == "image" else None, error)

    def name_own() -> list[Hashable]:
        names: list[Hashable] = []
        parts = list(batched(rows, _FILES))
        sizes = [len(part) for part in parts]
        for part in track(iter(parts), len(rows), f"reading {kind}s", unit=kind, shown=main, sizes=sizes):
            if kind == "image" and store is not None:
                names += _image_contents(store, {row: items[row] for row in part}, name)
            else:
                names += [name(row, items[row]) for row in part]
        return names

    shares = distributed.together(name_own)
    names = [shares[row % world][row // world] if hashed or kind == "text" else row for row in range(len(items))]
    codes: dict[Hashable, int] = {}
    work = DistinctItems([], [], [], {})
    for row, identity in enumerate(names):
        if isinstance(identity, Reject):
            work.rejected[row] = identity
            work.number.append(None)
            continue
        if identity not in codes:
            codes[identity] = len(codes)
            work.first.append(row)
        work.number.append(codes[identity])
    work.content = [code for code in codes if isinstance(code, bytes)] if hashed else []
    return work


def _image_contents(
    store: EmbeddingStore, images: Mapping[int, Any], read: Callable[[int, Any], Hashable]
) -> list[Hashable]:
    """What `read` gives of each image; a file that the store has seen as it is now is not opened."""
    paths = {row: os.fspath(item) for row, item in images.items() if isinstance(item, (str, os.PathLike))}
    known = dict(zip(paths, store.known_contents(list(paths.values())), strict=True))
    names: list[Hashable] = []
    fresh: list[tuple[str, tuple[int, int, int] | None, bytes]] = []
    for row, item in images.items():
        known_content = known.get(row)
        if known_content is not None:
            names.append(known_content)
            continue
        before = file_stat(paths[row]) if row in paths else None
        content = read(row, item)
        if row in paths and isinstance(content, bytes):
            fresh.append((paths[row], before, content))
        names.append(content)
    store.remember_contents(fresh)
    return names
