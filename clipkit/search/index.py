"""EmbeddingIndex: a folder of images that can be searched by text or image, in one file."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from clipkit.data.reading.rejects import Reject
from clipkit.embedding.decoding import Decode
from clipkit.errors import CorruptArtefact, ModelError, ModelMismatch, UsageError, option
from clipkit.images.parallel import Workers
from clipkit.models.dual_encoder import DualEncoder
from clipkit.search.building import EmbedOptions, ImageFiles, build_index, update_index
from clipkit.search.changes import Changes
from clipkit.search.hits import Hit, find_hits
from clipkit.search.index_file import ChangedError, Header, load_matrix, look_up, open_index, read_entries
from clipkit.search.presence import FilePresence, relocated, require_root
from clipkit.search.query import Query, embed_queries

log = logging.getLogger("clipkit")


class EmbeddingIndex:
    """Exact search over the embeddings of images. Make one with `build` or `open`.

    The embeddings are mapped from a file beside the index (`PATH.matrix`), and paths are read for the hits alone, so
    that opening takes no longer for a million images than for ten. That file may be deleted: it is made again.

    Attributes:
        path: the index file.
        model_name: the name that the model was opened with.
        fingerprint: of the model that embedded the images.
        rejected: the images that the last `build` or `update` could not use, and folders it could not list.
    """

    def __init__(self, path: Path, header: Header, model: DualEncoder | None, rejected: list[Reject]) -> None:
        self.path = path
        self._model = model
        self.rejected = rejected
        self._set_header(header)

    def _set_header(self, header: Header) -> None:
        while True:
            try:
                self._matrix = load_matrix(self.path, header)
                break
            except ChangedError:  # another process updated the index after the header was read
                header = replace(open_index(self.path), root=header.root)
        self._header = header
        self.model_name = header.model
        self.fingerprint = header.fingerprint

    def _reload(self) -> None:
        """Follow an update that another process made; a folder that moved stays where `open` was told."""
        self._set_header(replace(open_index(self.path), root=self._header.root))

    def _read_paths(self, rows: Iterable[int]) -> dict[int, Path]:
        entries = look_up(self.path, self._header.generation, rows)
        return {row: self._header.path_of(entry) for row, entry in entries.items()}

    @property
    def paths(self) -> list[Path]:
        """The images, one a row; read from the index file at each access."""
        try:
            entries = read_entries(self.path, self._header.generation)
        except ChangedError:
            self._reload()
            return self.paths
        return [self._header.path_of(entry) for entry in entries]

    @property
    def vectors(self) -> Tensor:
        """(images, dim) float32, unit length, mapped from the file beside the index and verified."""
        try:
            return self._matrix.verified()
        except CorruptArtefact as error:
            self._replace_matrix(error)
            return self._matrix.verified()

    def _replace_matrix(self, error: CorruptArtefact) -> None:
        """Make the matrix again from the index file."""
        log.warning("%s: %s; it is made again from the index", error.where, error.message)
        if self._matrix.path is not None:
            with contextlib.suppress(OSError):
                self._matrix.path.unlink()
        self._matrix = load_matrix(self.path, self._header)

    @classmethod
    def build(
        cls,
        model: DualEncoder,
        images: ImageFiles,
        path: str | os.PathLike[str],
        *,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "skip",
        max_bad: int | float = 1.0,
        rejects: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        decode: Decode = "fast",
    ) -> EmbeddingIndex:
        """Embed images and publish their index, entirely or not at all.

        Finished batches are committed to ``PATH.partial``: a build that was killed continues from there when it is
        started again. Under several processes, each of them calls this.

        Args:
            model: the index keeps its name, to open it again.
            images: a folder, searched with its subfolders, or a list of files.
            path: the file to write.
            batch_size, workers, progress: as for `embed`.
            on_bad: "skip" lists unusable images in ``rejected``; "error" stops at the first.
            max_bad: how many (int) or what fraction (float) of the images may be left out.
            rejects: file to which those left out are written as JSON lines.
            overwrite: replace an existing index; the old one stays until the new one is complete.
            decode: as for `embed`; the index keeps it, and updates follow it.

        Raises:
            UsageError: something is at ``path`` already, or the file to be replaced is not an index.
            DataError: the folder does not exist, or holds no image that can be used.
            TooManyRejected: more than `max_bad` are left out; nothing is written.
        """
        target = Path(path)
        options = EmbedOptions(batch_size, workers, progress, on_bad, max_bad, rejects)
        rejected = build_index(model, images, target, options, decode=decode, overwrite=overwrite)
        return cls(target, open_index(target), model, rejected)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: DualEncoder | str | os.PathLike[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
    ) -> EmbeddingIndex:
        """Open an index. Each row is verified when it is first used; `update` verifies the whole list of files.

        Args:
            path: the file that `build` wrote.
            model: the model that embedded the images, or its name or folder now; None: the index opens it on the first
                query, by the name it had.
            root: where the folder that was indexed is now, if it moved; the next `update` saves it.

        Raises:
            UsageError: there is no such file; or `root` is given for an index of a list of files.
            DataError: none of the files that were indexed is below `root`.
            CorruptArtefact: it is damaged, or not an index.
            ModelMismatch: another model was given.
        """
        header = open_index(Path(path))
        if root is not None:
            header = relocated(header, Path(root), Path(path))
        index = cls(Path(path), header, None, [])
        if model is not None:
            index._use_model(model if isinstance(model, DualEncoder) else DualEncoder.from_pretrained(model))
        return index

    @property
    def root(self) -> Path | None:
        """The folder that was indexed; None for a list of files."""
        return self._header.root

    def __len__(self) -> int:
        return self._header.rows

    @property
    def model(self) -> DualEncoder:
        """The model that embedded the images, opened on first use.

        Raises:
            UsageError: it cannot be opened by the name it had.
            ModelMismatch: that name now belongs to another model.
        """
        if self._model is None:
            try:
                model = DualEncoder.from_pretrained(self.model_name)
            except ModelError as error:
                raise UsageError(
                    f"the index was made with the model {self.model_name!r}, which cannot be opened: {error.message}",
                    where=self.path,
                    fix=f"say where it is now: {option('model', python='EmbeddingIndex.open(path, model=...)')}",
                ) from error
            return self._use_model(model)
        return self._model

    def _use_model(self, model: DualEncoder) -> DualEncoder:
        differences = self.fingerprint.difference(model.fingerprint())
        if differences:
            shown = "\n  ".join(differences[:10])
            overwrite = option("overwrite", python="overwrite=True")
            raise ModelMismatch(
                f"the index was made with {self.model_name!r}; {model.name!r} gives other embeddings "
                f"(index != model):\n  {shown}",
                where=self.path,
                fix=f"use the model the index was made with, or build it again with this one ({overwrite})",
            )
        self._model = model
        return model

    def search(self, query: Query, k: int = 10, *, missing: bool = False) -> list[Hit]:
        """Return the k images nearest to a query, best first; of equal scores, the first in the index.

        Args:
            query: a text; or an image: a Path, a PIL image, bytes, an array (a str that is the path of an image is
                that image); or a (dim,) Tensor, an embedding.
            k: how many, from 1; all if the index has fewer.
            missing: return files that no longer exist, too, flagged. Without it the next ones take their place.

        Raises:
            BadImage: the query is the path of an image that cannot be opened.
            DataError: the folder that was indexed no longer exists.
        """
        return self.search_many([query], k, missing=missing)[0]

    def search_many(self, queries: Sequence[Query], k: int = 10, *, missing: bool = False) -> list[list[Hit]]:
        """`search` for several queries at once, texts and images mixed."""
        if isinstance(queries, (str, bytes)):
            raise UsageError("expected a list of queries, found one", fix="use search() for one query")
        if k < 1:
            raise UsageError(f"k must be at least 1, found {k}")
        if not missing:
            require_root(self.root, self.path)
        vectors = embed_queries(queries, lambda: self.model, self._matrix.dim)
        while True:
            files = FilePresence(self._read_paths, required=not missing)
            try:
                hits = find_hits(vectors, self._matrix, k, files)
            except ChangedError:
                self._reload()
            except CorruptArtefact as error:
                if error.where != str(self._matrix.path):
                    raise
                self._replace_matrix(error)
            else:
                files.log_missing()
                return hits

    def update(
        self,
        model: DualEncoder | None = None,
        *,
        verify: bool = False,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "skip",
        max_bad: int | float = 1.0,
        rejects: str | os.PathLike[str] | None = None,
    ) -> Changes:
        """Read the folder (or the listed files) again: embed new content, remove files that are gone.

        The index file changes in one transaction. Images in a folder that cannot be listed now stay in it.

        Args:
            verify: read every file, to see those that were replaced with the same size and time, too.
            model, batch_size, workers, progress, on_bad, max_bad, rejects: as for `build`.

        Returns:
            What changed.

        Raises:
            DataError: the folder does not exist, or holds no image that can be used any more.
            TooManyRejected: more than `max_bad` are left out; the index stays as it was.
        """
        if model is not None:
            self._use_model(model)
        options = EmbedOptions(batch_size, workers, progress, on_bad, max_bad, rejects)
        try:
            changes = update_index(self.path, self._header, lambda: self.model, options, verify=verify)
        except ChangedError:
            self._reload()
            changes = update_index(self.path, self._header, lambda: self.model, options, verify=verify)
        self._set_header(open_index(self.path))
        self.rejected = changes.rejected
        return changes
