"""Image batches, decoded: an image that cannot be used comes back as a value, not an exception."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipkit.errors import BadImage
from clipkit.files import content_hash
from clipkit.images.load import bytes_of, describe, load_image
from clipkit.images.parallel import decode_batch
from clipkit.models.processor import Processor

Decode: TypeAlias = Literal["exact", "fast"]
"""``"exact"`` decodes all pixels; ``"fast"`` lets the decoder of a JPEG scale it down, see `embed`."""


def smallest_side(decode: Decode, processor: Processor) -> int | None:
    """`at_least` of `load_image`."""
    return 3 * processor.image_size if decode == "fast" else None


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
        at_least: as for `load_image`.
    """

    def __init__(
        self,
        items: Sequence[Any],
        first: list[int],
        content: list[bytes],
        processor: Processor,
        at_least: int | None = None,
    ) -> None:
        self.items, self.first, self.content, self.processor = items, first, content, processor
        self.at_least = at_least
        self.pool: ThreadPoolExecutor | None = None

    def __getitem__(self, batch: list[int]) -> tuple[list[int], Tensor, list[tuple[int, BadImage]]]:
        images, refused = decode_batch(batch, self._load, self.pool)
        pixels = self.processor.images(list(images.values())) if images else torch.zeros(0)
        return list(images), pixels, refused

    def _load(self, number: int) -> Image.Image:
        item = self.items[self.first[number]]
        if self.content:
            require_unchanged(item, self.content[number])
        return load_image(item, at_least=self.at_least)
