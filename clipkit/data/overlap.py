"""What a test set has in common with the data that is trained on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

from clipkit.data.dataset import as_dataset, has_texts, iterate_column
from clipkit.data.split import digest, known_images, size_and_ends


@dataclass(frozen=True)
class Overlap:
    """How much of a test set is in the training data, too.

    Attributes:
        images: rows of the test set whose image is there, by the file or by its content, byte by byte.
        rows: of the test set.
        texts: captions of the test set that are there, letter by letter.
        captions: of the test set.
    """

    images: int
    rows: int
    texts: int
    captions: int

    def __str__(self) -> str:
        """In words; empty where nothing is shared."""
        if not self.images and not self.texts:
            return ""
        of = f"{self.images:,} of {self.rows:,} test images and {self.texts:,} of {self.captions:,} test captions"
        sentence = f"{of} are in the training data, too"
        if self.images:
            return f"{sentence}: figures on them are no test; take these rows out of one of the two"
        return f"{sentence}, which is expected where captions are names of classes"


def overlap(train: Any, test: Any) -> Overlap:
    """Compare two data sets; of their files only those are read of which both have one of the same size."""
    train, test = as_dataset(train), as_dataset(test)
    seen = {text for texts in iterate_column(train, "texts") for text in texts}
    captions: list[str] = []
    if has_texts(test):  # not of images and labels alone
        captions = [text for texts in iterate_column(test, "texts") for text in texts]
    shared = sum(text in seen for text in captions)
    return Overlap(_shared_images(train, test), len(test), shared, len(captions))


def _shared_images(train: Any, test: Any) -> int:
    ours, theirs = set(known_images(train)), known_images(test)
    paths = {path for _, path, _ in ours if path}
    others = [(size, path, content) for size, path, content in theirs if size is None or path not in paths]
    of_one_path = len(theirs) - len(others)
    sizes = {size for size, _, _ in ours} & {size for size, _, _ in others} - {None}
    ours = {image for image in ours if image[0] in sizes}
    others = [image for image in others if image[0] in sizes]
    # A file is hashed as a whole where an embedded image has its size, or a file of the other side has its ends.
    embedded = {size for size, _, content in [*ours, *others] if content}
    ends = {path: size_and_ends(path, size) for size, path, _ in [*ours, *others] if path and size is not None}
    common = {ends[path] for _, path, _ in ours if path} & {ends[path] for _, path, _ in others if path}
    read = cache(digest)

    def content_of(size: int | None, path: str | None, content: bytes) -> Hashable | None:
        if path and (size in embedded or ends[path] in common):
            return read(path)
        return content or None

    contents = {content_of(*image) for image in ours} - {None}
    return of_one_path + sum(content_of(*image) in contents for image in others)
