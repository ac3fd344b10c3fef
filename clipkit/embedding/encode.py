"""From distinct items to vectors, batch by batch: decoded in workers, refused by number, and always finite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit.data.rejects import Reject
from clipkit.embedding.store import content_hash
from clipkit.errors import BadImage, DataError, ModelError
from clipkit.images import bytes_of, describe, load_image
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.encode import encode, text_chunks
from clipkit.models.processor import Processor
from clipkit.texts import BadText

Kind: TypeAlias = Literal["image", "text"]


def reject(row: int, item: Any, error: DataError) -> Reject:
    """The entry of the ledger for an item that was refused."""
    code = error.code if isinstance(error, (BadImage, BadText)) else "BAD_DATA"
    return Reject(row, code, error.message.removeprefix(f"{code}: "), error.where or f"item {row}", _path(item))


def _path(item: object) -> str | None:
    found = item.get("path") if isinstance(item, Mapping) else item
    return os.fsdecode(found) if isinstance(found, (str, os.PathLike)) else None


class Encoder:
    """Batches of distinct items to vectors; refused items are put into ``rejected``, by number."""

    def __init__(
        self,
        model: DualEncoder,
        items: Sequence[Any],
        kind: Kind,
        first: list[int],
        content: list[bytes],
        workers: int,
        *,
        skip: bool,
    ) -> None:
        self.model, self.items, self.kind, self.workers, self.skip = model, items, kind, workers, skip
        self.first, self.content = first, content
        self.rejected: dict[int, Reject] = {}

    def batches(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """For each batch the numbers that could be used and their vectors (n, dim)."""
        for numbers, vectors in self._texts(batches) if self.kind == "text" else self._images(batches):
            bad = (~torch.isfinite(vectors).all(1)).nonzero().flatten().tolist()
            if bad:
                row = self.first[numbers[bad[0]]]
                raise ModelError(
                    f"the model gives NaN or infinity for {len(bad)} of {len(numbers)} {self.kind}s of a batch",
                    where=f"item {row}: {describe(self.items[row]) if self.kind == 'image' else repr(self.items[row])}",
                    fix="check the model's weights (did training diverge?), or use float32",
                )
            yield numbers, vectors

    def _texts(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        for numbers in batches:
            texts = [self.items[self.first[n]] for n in numbers]
            # not encode_texts, which would tell of the long texts of each batch
            chunks = text_chunks(texts, self.model.processor, len(texts))
            yield numbers, encode(self.model, chunks, "text", texts, None, None, False)

    def _images(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        source = _Images(self.items, self.first, self.content, self.model.processor)
        # batch_size None: one element of the sampler is one whole batch
        for loaded in DataLoader(source, batch_size=None, sampler=batches, num_workers=self.workers):
            numbers, pixels, refused = loaded
            for n, error in refused:
                if not self.skip:
                    raise error.or_skip()
                self.rejected[n] = reject(self.first[n], self.items[self.first[n]], error)
            with evaluating(self.model):
                vectors = self.model(pixel_values=pixels.to(self.model.device)).image if numbers else pixels
            yield numbers, vectors.float().cpu().reshape(len(numbers), self.model.dim)


class _Images(Dataset[tuple[list[int], Tensor, list[tuple[int, BadImage]]]]):
    """Decodes whole batches; picklable, and without the model's weights."""

    def __init__(self, items: Sequence[Any], first: list[int], content: list[bytes], processor: Processor) -> None:
        self.items, self.first, self.content, self.processor = items, first, content, processor

    def __getitem__(self, batch: list[int]) -> tuple[list[int], Tensor, list[tuple[int, BadImage]]]:
        images, refused = {}, []
        for n in batch:
            try:
                images[n] = self._load(n)
            except BadImage as error:
                refused.append((n, error))
        pixels = self.processor.images(list(images.values())) if images else torch.zeros(0)
        return list(images), pixels, refused

    def _load(self, n: int) -> Image.Image:
        item = self.items[self.first[n]]
        if self.content and content_hash(bytes_of(item)) != self.content[n]:
            # a vector under the wrong content would be wrong for ever
            raise BadImage("CHANGED", "the file changed while it was read", where=describe(item), fix="run again")
        return load_image(item)


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is as it was."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in was.items():
            module.training = training
