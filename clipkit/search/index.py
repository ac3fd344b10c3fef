"""EmbeddingIndex: a folder of images that can be searched by text or image, in one file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.embedding.embed import embed
from clipkit.embedding.items import EmbedResult
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import DataError, ModelError, ModelMismatch, UsageError, option, typed
from clipkit.files import publish
from clipkit.models.dual_encoder import DualEncoder
from clipkit.paths import did_you_mean
from clipkit.search.changes import Changes, Stat, compare, stat_of, unchanged
from clipkit.search.index_file import Catalogue, Entry, is_index, read, write
from clipkit.search.listing import Listing, listed
from clipkit.search.presence import Present, moved_to, require_root
from clipkit.search.query import Query, embed_queries

_TILE = 2**24  # scores held at once: 64 MiB


@dataclass(frozen=True)
class Hit:
    """One image found.

    Attributes:
        path: the image, where it was when the index was made or last updated.
        score: cosine similarity with the query, in [-1, 1]. Between a text and an image a good match may have 0.25;
            scores of text queries and of image queries cannot be compared.
        rank: from 1.
        missing: whether there is no such file now; such hits are given only where they are asked for.
    """

    path: Path
    score: float
    rank: int
    missing: bool = False


class EmbeddingIndex:
    """Exact search over the embeddings of images. Make one with `build` or `open`.

    Attributes:
        path: the index file.
        paths: the images, one a row.
        vectors: (images, dim) float32, unit length.
        model_name: what the model was opened as.
        fingerprint: of the model that made it.
        rejected: the images that the last `build` or `update` could not use, and folders it could not list.
    """

    def __init__(self, path: Path, catalogue: Catalogue, model: DualEncoder | None, rejected: list[Reject]) -> None:
        self.path, self._model = path, model
        self._hold(catalogue, rejected)

    def _hold(self, catalogue: Catalogue, rejected: list[Reject]) -> None:
        self._catalogue, self.rejected = catalogue, rejected
        self.paths = [catalogue.path_of(entry) for entry in catalogue.entries]
        self.vectors = catalogue.vectors
        self.model_name, self.fingerprint = catalogue.model, catalogue.fingerprint

    @classmethod
    def build(
        cls,
        model: DualEncoder,
        images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        path: str | os.PathLike[str],
        *,
        batch_size: int = 64,
        workers: int = 0,
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "skip",
        max_bad: int | float = 1.0,
        rejects: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> EmbeddingIndex:
        """Embeds images and publishes the index, whole or not at all.

        Batches are committed beside it, in ``PATH.partial``, as they are done: a build that was killed goes on where it
        was when it is started again. Under several processes, each of them calls this.

        Args:
            model: its name is kept, so that the index can open it again.
            images: a folder, searched with its subfolders, or a list of files.
            path: the file to write.
            batch_size, workers, progress: as for `embed`.
            on_bad: "skip" lists unusable images in ``rejected``; "error" stops at the first.
            max_bad: how many (int) or what fraction (float) of them may be left out.
            rejects: file to which those left out are written as JSON lines.
            overwrite: replace an index that is there; the old one stays until the new one is whole.

        Raises:
            UsageError: something is at ``path`` already, or what is to be replaced is no index.
            DataError: the folder is missing, or holds no image that can be used.
            TooManyRejected: more than `max_bad` are left out; nothing is written.
        """
        target = Path(path)
        distributed.together(lambda: _must_be_free(target, overwrite))
        listing = listed(images, on_bad=on_bad)
        files, stats = listing.files, {file: stat_of(file) for file in listing.files}
        draft = target.with_name(target.name + ".partial")
        with EmbeddingStore(draft) as store:
            found = embed(
                model, files, store=store, batch_size=batch_size, workers=workers, progress=progress, on_bad=on_bad
            )
            distributed.together(store.close)  # before one of the processes turns the draft into the index
        entries = list(_entries(files, stats, found, listing.root).values())

        def finish() -> None:
            if distributed.is_main():
                _settle(listing, found.rejected, images, max_bad, rejects)
                _write(draft, Catalogue(_reopenable(model), model.fingerprint(), listing.root, entries, found.vectors))
                publish(target, lambda fresh: _copy(draft, fresh), replace=overwrite)
                for leftover in ("", "-wal", "-shm"):
                    draft.with_name(draft.name + leftover).unlink(missing_ok=True)

        distributed.together(finish)
        return cls(target, _read(target), model, found.rejected + listing.rejected)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: DualEncoder | str | os.PathLike[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
    ) -> EmbeddingIndex:
        """Opens an index and verifies it.

        Args:
            path: what `build` wrote.
            model: the model that made it, or where it is now; left out, the index opens it itself, by the name it had,
                on the first query.
            root: where the folder that was indexed is now, if it moved; `update` writes it down.

        Raises:
            UsageError: there is no such file; or `root` is given for an index of a list of files.
            DataError: none of the files that were indexed is below `root`.
            CorruptArtefact: it is damaged, or no index.
            ModelMismatch: another model was given.
        """
        catalogue = _read(Path(path))
        index = cls(Path(path), catalogue if root is None else moved_to(catalogue, Path(root), Path(path)), None, [])
        if model is not None:
            index._adopt(model if isinstance(model, DualEncoder) else DualEncoder.from_pretrained(model))
        return index

    @property
    def root(self) -> Path | None:
        """The folder that was indexed; None for a list of files."""
        return self._catalogue.root

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def model(self) -> DualEncoder:
        """The model that made the index, opened on first use.

        Raises:
            UsageError: it cannot be opened by the name it had.
            ModelMismatch: under that name there now is another model.
        """
        if self._model is None:
            try:
                found = DualEncoder.from_pretrained(self.model_name)
            except ModelError as error:
                raise UsageError(
                    f"the index was made with the model {self.model_name!r}, which cannot be opened: {error.message}",
                    where=self.path,
                    fix=f"say where it is now: {option('model', python='EmbeddingIndex.open(path, model=...)')}",
                ) from error
            return self._adopt(found)
        return self._model

    def _adopt(self, model: DualEncoder) -> DualEncoder:
        differences = self.fingerprint.difference(model.fingerprint())
        if differences:
            shown = "\n  ".join(differences[:10])
            again = option("overwrite", python="overwrite=True")
            raise ModelMismatch(
                f"the index was made with {self.model_name!r}; {model.name!r} gives other embeddings "
                f"(index != model):\n  {shown}",
                where=self.path,
                fix=f"use the model the index was made with, or build it anew with this one ({again})",
            )
        self._model = model
        return model

    def search(self, query: Query, k: int = 10, *, missing: bool = False) -> list[Hit]:
        """The k images nearest to a query, best first; of equal scores, the first in the index.

        Args:
            query: a text; or an image: a Path, a PIL image, bytes, an array (a str that is the path of an image is
                that image); or a (dim,) Tensor, an embedding.
            k: how many, from 1; all there are if there are fewer.
            missing: give files that are no longer there, too, flagged. Without it the next ones take their place.

        Raises:
            BadImage: the query is the path of an image, and cannot be opened.
            DataError: the folder that was indexed is not there at all.
        """
        return self.search_many([query], k, missing=missing)[0]

    def search_many(self, queries: Sequence[Query], k: int = 10, *, missing: bool = False) -> list[list[Hit]]:
        """`search` for several queries at once, texts and images mixed."""
        if isinstance(queries, (str, bytes)):
            raise UsageError("expected a list of queries, found one", fix="use search() for one query")
        if k < 1:
            raise UsageError(f"k must be at least 1, found {k}")
        present = Present(self.paths, self.root, self.path, needed=not missing)
        vectors = embed_queries(queries, lambda: self.model, self.vectors.shape[1])
        step = max(1, _TILE // max(1, len(self)))
        hits: list[list[Hit]] = []
        for part in torch.split(vectors, step):
            hits += [self._best(scores, k, present) for scores in part @ self.vectors.T]
        present.tell()
        return hits

    def _best(self, scores: Tensor, k: int, present: Present) -> list[Hit]:
        k = reach = min(k, len(self))
        rows = _highest(scores, k)
        while present.needed and len(there := [row for row in rows if present[row]]) < k and reach < len(self):
            reach = min(2 * reach, len(self))
            rows = _highest(scores, reach)
        rows = (there if present.needed else rows)[:k]
        return [Hit(self.paths[row], float(scores[row]), rank, not present[row]) for rank, row in enumerate(rows, 1)]

    def update(
        self,
        model: DualEncoder | None = None,
        *,
        verify: bool = False,
        batch_size: int = 64,
        workers: int = 0,
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "skip",
        max_bad: int | float = 1.0,
        rejects: str | os.PathLike[str] | None = None,
    ) -> Changes:
        """Looks at the folder again (or at the listed files): embeds new content, drops what is gone.

        The file changes in one transaction. What lies in a folder that cannot be listed now stays as it is.

        Args:
            verify: read every file, to see those that were replaced with the same size and time, too.
            model, batch_size, workers, progress, on_bad, max_bad, rejects: as for `build`.

        Raises:
            DataError: the folder is not there, or holds no image that can be used any more.
            TooManyRejected: more than `max_bad` are left out; the index stays as it was.
        """
        if model is not None:
            self._adopt(model)
        old = {self._catalogue.path_of(entry): entry for entry in self._catalogue.entries}
        root = self.root
        require_root(root, self.path)
        listing = listed(root, on_bad=on_bad) if root else Listing(None, [file for file in old if file.is_file()])
        stats = {file: stat_of(file) for file in listing.files}
        same = unchanged(listing.files, stats, old, verify=verify)
        fresh = [file for file in listing.files if file not in same]
        with EmbeddingStore(self.path) as store:
            found = embed(
                self.model, fresh, store=store, batch_size=batch_size, workers=workers, progress=progress, on_bad=on_bad
            )
            distributed.together(store.close)
        blocked = {file for file in old if any(file.is_relative_to(folder) for folder in listing.unreadable)}
        entries = {file: old[file] for file in old if file in same | blocked} | _entries(fresh, stats, found, root)
        order = sorted(entries, key=str) if root else [file for file in old if file in entries]
        row_of = {file: row for row, file in enumerate(listing.files)}
        rejected = [replace(reject, row=row_of[fresh[reject.row]]) for reject in found.rejected]

        def finish() -> None:
            if distributed.is_main():
                if listing.files:
                    _settle(listing, rejected, self.path, max_bad, rejects)
                kept = [entries[file] for file in order]
                _write(self.path, Catalogue(self.model_name, self.fingerprint, root, kept, self.vectors))

        distributed.together(finish)
        self._hold(_read(self.path), rejected + listing.rejected)
        return compare(old, {file: entries[file] for file in order}, same | blocked, self.rejected)


def _highest(scores: Tensor, k: int) -> list[int]:
    """The k highest, best first; of equal ones the first."""
    if k == 0:
        return []
    reach = (scores >= scores.topk(k).values[-1]).nonzero().flatten()
    order: list[int] = reach[scores[reach].argsort(descending=True, stable=True)][:k].tolist()
    return order


def _must_be_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        fix = "open it with EmbeddingIndex.open and call update(), choose another path, or pass overwrite=True"
        raise UsageError("there is something at this path already", where=target, fix=fix)
    if not is_index(target):
        raise UsageError("only an index may be overwritten, and this is none", where=target, fix="choose another path")


def _entries(
    files: Sequence[Path], stats: Mapping[Path, Stat], found: EmbedResult, root: Path | None
) -> dict[Path, Entry]:
    def entry(file: Path, content: bytes) -> Entry:
        return Entry(os.fsencode(file.relative_to(root) if root else file), *stats[file], content)

    return {files[row]: entry(files[row], content) for row, content in zip(found.rows, found.content, strict=True)}


def _settle(
    listing: Listing,
    rejected: list[Reject],
    source: object,
    max_bad: int | float,
    rejects: str | os.PathLike[str] | None,
) -> None:
    """Holds what could not be used to the policy; see `Ledger.settle`."""
    if not listing.files:
        where = source if isinstance(source, (str, os.PathLike)) else "an empty list"
        raise DataError("there is no image here", where=where, fix="check the folder; images are told by their suffix")
    name = source if isinstance(source, (str, os.PathLike)) else f"a list of {len(listing.files)} files"
    ledger = listing.ledger()
    ledger.refuse(rejected)
    ledger.settle(name, on_bad="skip", max_bad=max_bad, rejects=rejects)


def _reopenable(model: DualEncoder) -> str:
    """The model's name, a folder made absolute, so that it still holds in another working directory."""
    _, _, rest = model.name.rpartition("open_clip:")
    folder = Path(rest).expanduser()
    return f"{model.name[: len(model.name) - len(rest)]}{folder.absolute()}" if folder.is_dir() else model.name


def _write(path: Path, catalogue: Catalogue) -> None:
    with EmbeddingStore(path) as store:
        write(store, catalogue)
        store.seal()


def _copy(draft: Path, fresh: Path) -> None:
    with EmbeddingStore(draft) as store:
        store.query("VACUUM INTO ?", (os.fspath(fresh),))
    with EmbeddingStore(fresh) as store:
        store.seal()


def _read(path: Path) -> Catalogue:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        build = typed(
            python="EmbeddingIndex.build(model, folder, path)",
            shell=f"clipkit index FOLDER --model MODEL --to {shlex.quote(str(path))}",
        )
        fix = "give the index file" if path.is_dir() else did_you_mean(path) or f"build it first: {build}"
        raise UsageError(f"expected an index file; it {found}", where=path, fix=fix)
    with EmbeddingStore(path, readonly=True) as store:
        return read(store)
