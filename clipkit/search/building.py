"""Embed images into an index file, or bring one up to date."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.embedding.decoding import Decode
from clipkit.embedding.embed import embed
from clipkit.embedding.items import EmbedResult
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import DataError
from clipkit.images.parallel import Workers
from clipkit.models.dual_encoder import DualEncoder
from clipkit.search.changes import Changes, SizeAndTime, compare, size_and_time, unchanged
from clipkit.search.index_file import (
    Entry,
    Header,
    load_matrix,
    publish_index,
    read_entries,
    require_free_path,
    write_index,
)
from clipkit.search.listing import Listing, list_files
from clipkit.search.presence import require_root

ImageFiles = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class EmbedOptions:
    """How images are embedded, and how many may be left out; fields as for `EmbeddingIndex.build`."""

    batch_size: int
    workers: Workers
    progress: bool
    on_bad: Literal["error", "skip"]
    max_bad: int | float
    rejects: str | os.PathLike[str] | None

    def embed(self, model: DualEncoder, files: Sequence[Path], path: Path, decode: Decode) -> EmbedResult:
        """Embed files into the store at `path`."""
        with EmbeddingStore(path) as store:
            result = embed(
                model, files, store=store, batch_size=self.batch_size, workers=self.workers, progress=self.progress,
                on_bad=self.on_bad, decode=decode,
            )  # fmt: skip
            distributed.together(store.close)  # before one of the processes writes the index
        return result

    def check_rejects(self, listing: Listing, rejected: list[Reject], source: object) -> None:
        """List what cannot be used, and compare it with the policy; see `LoadReport.settle`."""
        named = isinstance(source, (str, os.PathLike))
        if not listing.files:
            where = source if named else "an empty list"
            fix = "check the folder; images are recognised by their suffix"
            raise DataError("there is no image here", where=where, fix=fix)
        report = listing.load_report()
        report.refuse(rejected)
        name = source if named else f"a list of {len(listing.files)} files"
        report.settle(name, on_bad="skip", max_bad=self.max_bad, rejects=self.rejects)


def build_index(
    model: DualEncoder, images: ImageFiles, target: Path, options: EmbedOptions, *, decode: Decode, overwrite: bool
) -> list[Reject]:
    """Embed images and publish their index; arguments and errors as for `EmbeddingIndex.build`.

    Returns:
        The images that cannot be used, and the folders that cannot be listed.
    """
    distributed.together(lambda: require_free_path(target, overwrite=overwrite))
    listing = list_files(images, on_bad=options.on_bad)
    stats = {file: size_and_time(file) for file in listing.files}
    draft = target.with_name(target.name + ".partial")
    result = options.embed(model, listing.files, draft, decode)
    entries = list(_entries(listing.files, stats, result, listing.root).values())

    def finish() -> None:
        if not distributed.is_main():
            return
        options.check_rejects(listing, result.rejected, images)
        header = Header(_reopenable_name(model), model.fingerprint(), listing.root, decode)
        header = write_index(draft, header, entries)
        publish_index(draft, target, replace=overwrite)
        load_matrix(target, header)

    distributed.together(finish)
    return result.rejected + listing.rejected


def update_index(
    path: Path, header: Header, model: Callable[[], DualEncoder], options: EmbedOptions, *, verify: bool
) -> Changes:
    """Bring the index file at `path` up to date; errors as for `EmbeddingIndex.update`.

    Args:
        path: the index file.
        header: of the file; its root may have moved.
        model: opens the model, once the folder is known to exist.
        options: how new content is embedded.
        verify: compare contents, too, and not only name, size and time.
    """
    # 1. which files exist now, and which of them are new or changed
    root = header.root
    require_root(root, path)
    old = {header.path_of(entry): entry for entry in read_entries(path, header.generation)}
    if root:
        listing = list_files(root, on_bad=options.on_bad)
    else:
        listing = Listing(None, [file for file in old if file.is_file()])
    stats = {file: size_and_time(file) for file in listing.files}
    same = unchanged(listing.files, stats, old, verify=verify)
    fresh = [file for file in listing.files if file not in same]

    # 2. embed those
    result = options.embed(model(), fresh, path, header.decode)
    row_of = {file: row for row, file in enumerate(listing.files)}
    rejected = [replace(reject, row=row_of[fresh[reject.row]]) for reject in result.rejected]

    # 3. what lies in a folder that cannot be listed now is kept: it is not known to be gone
    unlisted = {file for file in old if any(file.is_relative_to(folder) for folder in listing.unreadable)}
    entries = {file: old[file] for file in old if file in same | unlisted}
    entries |= _entries(fresh, stats, result, root)
    order = sorted(entries, key=str) if root else [file for file in old if file in entries]

    # 4. write, in one transaction
    def finish() -> None:
        if not distributed.is_main():
            return
        if listing.files:
            options.check_rejects(listing, rejected, path)
        updated = write_index(path, header, [entries[file] for file in order])
        load_matrix(path, updated)

    distributed.together(finish)
    new = {file: entries[file] for file in order}
    return compare(old, new, same | unlisted, rejected + listing.rejected)


def _entries(
    files: Sequence[Path], stats: Mapping[Path, SizeAndTime], result: EmbedResult, root: Path | None
) -> dict[Path, Entry]:
    """The entry of each file that was embedded, by its path."""
    entries: dict[Path, Entry] = {}
    for row, content in zip(result.rows, result.content, strict=True):
        file = files[row]
        name = os.fsencode(file.relative_to(root) if root else file)
        entries[file] = Entry(name, *stats[file], content)
    return entries


def _reopenable_name(model: DualEncoder) -> str:
    """The model's name, a folder made absolute, so that it is still right in another working directory."""
    _, _, rest = model.name.rpartition("open_clip:")
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        return model.name
    prefix = model.name.removesuffix(rest)
    return f"{prefix}{folder.absolute()}"
