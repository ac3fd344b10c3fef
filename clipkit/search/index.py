"""EmbeddingIndex: a folder of images that can be searched by text or image, in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from clipkit.data.reading.rejects import Reject
from clipkit.errors import ModelError, ModelMismatch, UsageError, option
from clipkit.models.dual_encoder import DualEncoder
from clipkit.search.building import EmbedOptions, ImageFiles, build_index, update_index
from clipkit.search.changes import Changes
from clipkit.search.hits import Hit, nearest
from clipkit.search.index_file import Catalogue, read_index
from clipkit.search.presence import FilePresence, relocated
from clipkit.search.query import Query, embed_queries

_TILE = 2**24  # scores held at once: 64 MiB


class EmbeddingIndex:
    """Exact search over the embeddings of images. Make one with `build` or `open`.

    Attributes:
        path: the index file.
        paths: the images, one a row.
        vectors: (images, dim) float32, unit length.
        model_name: the name that the model was opened with.
        fingerprint: of the model that embedded the images.
        rejected: the images that the last `build` or `update` could not use, and folders it could not list.
    """

    def __init__(self, path: Path, catalogue: Catalogue, model: DualEncoder | None, rejected: list[Reject]) -> None:
        self.path = path
        self._model = model
        self._set_content(catalogue, rejected)

    def _set_content(self, catalogue: Catalogue, rejected: list[Reject]) -> None:
        self._catalogue = catalogue
        self.rejected = rejected
        self.paths = [catalogue.path_of(entry) for entry in catalogue.entries]
        self.vectors = catalogue.vectors
        self.model_name = catalogue.model
        self.fingerprint = catalogue.fingerprint

    @classmethod
    def build(
        cls,
        model: DualEncoder,
        images: ImageFiles,
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

        Raises:
            UsageError: something is at ``path`` already, or the file to be replaced is not an index.
            DataError: the folder does not exist, or holds no image that can be used.
            TooManyRejected: more than `max_bad` are left out; nothing is written.
        """
        target = Path(path)
        options = EmbedOptions(batch_size, workers, progress, on_bad, max_bad, rejects)
        rejected = build_index(model, images, target, options, overwrite=overwrite)
        return cls(target, read_index(target), model, rejected)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: DualEncoder | str | os.PathLike[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
    ) -> EmbeddingIndex:
        """Open an index and verify it.

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
        catalogue = read_index(Path(path))
        if root is not None:
            catalogue = relocated(catalogue, Path(root), Path(path))
        index = cls(Path(path), catalogue, None, [])
        if model is not None:
            index._use_model(model if isinstance(model, DualEncoder) else DualEncoder.from_pretrained(model))
        return index

    @property
    def root(self) -> Path | None:
        """The folder that was indexed; None for a list of files."""
        return self._catalogue.root

    def __len__(self) -> int:
        return len(self.paths)

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
        files = FilePresence(self.paths, self.root, self.path, required=not missing)
        vectors = embed_queries(queries, lambda: self.model, self.vectors.shape[1])
        queries_at_once = max(1, _TILE // max(1, len(self)))
        hits: list[list[Hit]] = []
        for chunk in torch.split(vectors, queries_at_once):
            scores = chunk @ self.vectors.T  # (queries, images)
            hits += [nearest(row, k, files) for row in scores]
        files.log_missing()
        return hits

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
        changes = update_index(self.path, self._catalogue, lambda: self.model, options, verify=verify)
        self._set_content(read_index(self.path), changes.rejected)
        return changes
