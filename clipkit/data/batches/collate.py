"""Make batches: the tensors that go into the model, and the keys of their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.batches.augment import Augmentation, augment
from clipkit.data.batches.batch import ROW, VIEW, Batch, RowKeys, Transform
from clipkit.data.batches.plan import Draw, hash64
from clipkit.data.batches.records import FEATURES, TEXT_FEATURES, RecordReader
from clipkit.errors import BadImage, DataError, option
from clipkit.images.load import describe, load_image
from clipkit.modality import Modality
from clipkit.texts import is_blank


class CollatedImages(NamedTuple):
    """The image side of a batch: tensors, the draws that were kept, hashes of the images, and rejects."""

    inputs: dict[str, Tensor]
    kept: list[int]
    hashes: list[int]
    hard: list[int]  # hashes of the hard images
    rejected: list[dict[str, Any]]


@dataclass
class Collator:
    """Makes a `Batch` of draws. It is sent to the workers, so it has no weights.

    Args:
        reader: of the data set.
        transform: the model's processor.
        keys: column -> (rows of the data set, ...).
        content: which of `CONTENT` are keys, too.
        hard: which of `HARD` the data set has.
        sides: which sides are prepared.
        views: (number of the view, its augmentation), 0 being the image itself.
        on_bad: ``error`` or ``skip``.
        at_least: as for `load_image`.
    """

    reader: RecordReader
    transform: Transform
    keys: Mapping[str, Tensor]
    content: tuple[str, ...]
    hard: frozenset[str]
    sides: tuple[str, ...]
    views: tuple[tuple[int, Augmentation], ...]
    on_bad: str
    at_least: int | None = None

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """Return the batch of some draws.

        Raises:
            BadImage: an image cannot be used, and `on_bad` is ``error``.
            DataError: none of the images can be used.
        """
        records = self.reader.read(draws)
        images = self._images(draws, records)
        kept = [(draws[i], records[i]) for i in images.kept]
        texts = [record["texts"][draw.caption] for draw, record in kept]
        hard_texts = [text for _, record in kept for text in _listed(record.get("hard_texts"), "hard_texts")]
        rows = torch.tensor([draw.row for draw, _ in kept], dtype=torch.int64)
        keys = {ROW: rows, **{name: values[rows] for name, values in self.keys.items()}}
        hashes = {"image": images.hashes, "texts": [_hash(text.encode()) for text in texts]}
        keys |= {name: torch.tensor(hashes[name], dtype=torch.int64) for name in self.content}
        inputs = dict(images.inputs)
        sides: dict[Modality, RowKeys] = {}
        if "image" in self.sides:
            sides["image"] = self._image_rows(keys, images.hard)
        if "text" in self.sides:
            if kept and TEXT_FEATURES in kept[0][1]:
                features = [record[TEXT_FEATURES][draw.caption] for draw, record in kept]
                inputs[TEXT_FEATURES] = torch.from_numpy(np.asarray(features, dtype=np.float32))
            else:
                inputs |= self.transform.texts(texts + hard_texts)
            hard = [_hash(text.encode()) for text in hard_texts]
            sides["text"] = _with_hard(keys, "texts", hard) if "hard_texts" in self.hard else RowKeys(keys)
        return Batch(inputs, sides, len(kept), images.rejected)

    def _image_rows(self, keys: dict[str, Tensor], hard: list[int]) -> RowKeys:
        if len(self.views) > 1 or self.views[0][0]:
            views = torch.tensor([view for view, _ in self.views]).repeat_interleave(len(keys[ROW]))
            keys = {name: torch.cat([values] * len(self.views)) for name, values in keys.items()} | {VIEW: views}
        return _with_hard(keys, "image", hard) if "hard_images" in self.hard else RowKeys(keys)

    def _images(self, draws: Sequence[Draw], records: list[dict[str, Any]]) -> CollatedImages:
        everything = list(range(len(draws)))
        if "image" not in self.sides:
            return CollatedImages({}, everything, [], [], [])
        if records and FEATURES in records[0]:
            return self._features(draws, records)
        images: list[list[Any]] = []
        hard: list[Any] = []
        kept, hashes, rejected = [], [], []
        hard_hashes: list[int] = []
        for i, (draw, record) in enumerate(zip(draws, records, strict=True)):
            try:
                image = load_image(record["image"], at_least=self.at_least)
                cells = _listed(record.get("hard_images"), "hard_images")
                hard_images = [load_image(cell, at_least=self.at_least) for cell in cells]
            except BadImage as error:
                rejected.append(self._refused(draw, error))
                continue
            images.append([augment(image, name, _seed(draw, view)) for view, name in self.views])
            for j, hard_image in enumerate(hard_images):
                hard.append(augment(hard_image, self.views[0][1], hash64(draw.seed, -1, j)))
            kept.append(i)
            if "image" in self.content:
                hashes.append(_image_hash(image))
                hard_hashes += map(_image_hash, hard_images)
            else:
                hard_hashes += [-1] * len(hard_images)
        _require_some(kept, draws, rejected)
        ordered = [views[v] for v in range(len(self.views)) for views in images] + hard
        return CollatedImages({"pixel_values": self.transform.images(ordered)}, kept, hashes, hard_hashes, rejected)

    def _features(self, draws: Sequence[Draw], records: list[dict[str, Any]]) -> CollatedImages:
        """Return the kept features of a frozen tower: of each image one vector, or one drawn from several."""
        vectors, kept, hashes, rejected = [], [], [], []
        for i, (draw, record) in enumerate(zip(draws, records, strict=True)):
            if record[FEATURES] is None:  # it could not be used then
                rejected.append(self._refused(draw, why_bad(self.reader.image(draw.row))))
                continue
            versions = np.atleast_2d(np.asarray(record[FEATURES], dtype=np.float32))
            vectors.append(versions[draw.seed % len(versions)])
            kept.append(i)
            if "image" in self.content:  # the same whatever is drawn
                hashes.append(_hash(versions[0].tobytes()))
        _require_some(kept, draws, rejected)
        return CollatedImages({FEATURES: torch.from_numpy(np.stack(vectors))}, kept, hashes, [], rejected)

    def _refused(self, draw: Draw, error: BadImage) -> dict[str, Any]:
        if self.on_bad == "error":
            raise error.or_skip()
        return {"row": draw.row, "path": error.where, "code": error.code, "message": error.message}


def _require_some(kept: list[int], draws: Sequence[Draw], rejected: list[dict[str, Any]]) -> None:
    if not kept:
        raise DataError(
            f"none of the {len(draws)} images of this process's part of a batch can be used",
            where=rejected[0]["path"] if rejected else "the data",
            fix=f"see `clipkit check data`; a larger {option('batch_size')}, or fewer processes, leave some",
        )


def why_bad(image: Any) -> BadImage:
    """Return why the features of an image are missing."""
    try:
        load_image(image)
    except BadImage as error:
        return error
    return BadImage("CHANGED", "it could not be used when its features were computed", where=describe(image))


def _seed(draw: Draw, view: int) -> int:
    return draw.seed if view == 0 else hash64(draw.seed, view)


def _with_hard(keys: dict[str, Tensor], content: str, hashes: list[int]) -> RowKeys:
    """Add the rows of hard negatives, of which nothing but their content is known."""
    extended = {}
    for name, values in keys.items():
        if name == content:
            more = torch.tensor(hashes, dtype=torch.int64)
        else:
            more = values.new_full((len(hashes), *values.shape[1:]), _unknown(name, values))
        extended[name] = torch.cat([values, more])
    anchor = torch.arange(len(extended[ROW])) < len(keys[ROW])
    return RowKeys(extended, anchor)


def _unknown(name: str, values: Tensor) -> float:
    """Return the value of a key that a hard negative does not have."""
    if values.is_floating_point():
        return float("nan")
    return 0 if name == VIEW else -1


def _listed(cell: Any, column: str) -> list[Any]:
    if cell is None:
        return []
    values = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if column == "hard_texts":
        for value in values:
            if not isinstance(value, str | None):
                raise DataError(f"expected texts; found {type(value).__name__} {repr(value)[:40]}", where=column)
    return [value for value in values if not (isinstance(value, str) and is_blank(value))]


def _hash(content: bytes) -> int:
    """Return 63 bits of a hash: in a batch of a million, two contents agree by chance once in ten million batches."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _image_hash(image: Image.Image) -> int:
    return _hash(f"{image.mode} {image.size} ".encode() + image.tobytes())
