"""Image batches decoded in worker processes: an image that cannot be used comes back as a value, not an exception."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipkit.errors import BadImage
from clipkit.files import content_hash
from clipkit.images.load import bytes_of, describe, load_image
from clipkit.models.processor import Processor

K = TypeVar("K", bound=Hashable)


def decode_batch(
    keys: Iterable[K], load: Callable[[K], Image.Image]
) -> tuple[dict[K, Image.Image], list[tuple[K, BadImage]]]:
    """Return the images of a batch that could be loaded, by key, and the errors of the others."""
    images: dict[K, Image.Image] = {}
    refused: list[tuple[K, BadImage]] = []
    for key in keys:
        try:
            images[key] = load(key)
        except BadImage as error:
            refused.append((key, error))
    return images, refused


def require_unchanged(item: Any, content: bytes) -> None:
    """Raise BadImage unless the image still has this content: a vector under the wrong content would stay wrong."""
    if content_hash(bytes_of(item)) != content:
        raise BadImage("CHANGED", "the file changed while it was read", where=describe(item), fix="run again")


class ImageBatches(Dataset[tuple[list[int], Tensor, list[tuple[int, BadImage]]]]):
    """Batches of distinct images to pixels. Goes to the workers, so it carries no weights.

    Args:
        items: all items of a call of `embed`.
        first: for each distinct item, its first row.
        content: for each distinct item, the SHA-256 of its content; empty where nothing is hashed.
        processor: makes the pixels.
    """

    def __init__(self, items: Sequence[Any], first: list[int], content: list[bytes], processor: Processor) -> None:
        self.items, self.first, self.content, self.processor = items, first, content, processor

    def __getitem__(self, batch: list[int]) -> tuple[list[int], Tensor, list[tuple[int, BadImage]]]:
        images, refused = decode_batch(batch, self._load)
        pixels = self.processor.images(list(images.values())) if images else torch.zeros(0)
        return list(images), pixels, refused

    def _load(self, number: int) -> Image.Image:
        item = self.items[self.first[number]]
        if self.content:
            require_unchanged(item, self.content[number])
        return load_image(item)
