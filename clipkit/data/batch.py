"""A batch: the tensors that go into the model, and what is known of each of their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.augment import Augmentation, augment
from clipkit.data.map_style import drawn
from clipkit.data.plan import Draw, hash64
from clipkit.errors import BadImage, DataError, option
from clipkit.images import describe, load_image
from clipkit.texts import is_blank

Side = Literal["image", "text"]
ROW, VIEW = "row", "view"  # keys that every sample carries, and every image where there are views
CONTENT = ("image", "texts")  # key columns that are hashes of what was drawn
HARD = ("hard_texts", "hard_images")  # columns whose cells are only ever a negative


class Transform(Protocol):
    """What the loader needs of a model's processor."""

    def images(self, images: Sequence[Any]) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of one side of a batch.

    Args:
        keys: column -> (m,) int64 codes, or (m,) or (m, d) float32 numbers. Beside the columns asked for: ``row``, the
            row in the data set, -1 for hard negatives; on the image side ``view``, where there are views: 0 the image
            itself, 1, 2 … its augmented views; ``image`` and ``texts``, hashes of the contents, where asked for.
        anchor: (m,) bool, false for hard negatives; None where there are none.
    """

    keys: dict[str, Tensor]
    anchor: Tensor | None = None

    def to(self, device: torch.device) -> Rows:
        return Rows(_move(self.keys, device), None if self.anchor is None else self.anchor.to(device))


@dataclass
class Batch:
    """This rank's rows of one global batch.

    Args:
        inputs: keyword arguments of the model's forward. The image side has a row for each image, then for each view,
            then for each hard image; the text side for each caption, then for each hard text.
        rows: side -> what is known of its rows.
        samples: how many samples there are.
        rejected: rows whose image could not be used, left out of `inputs`.
    """

    inputs: dict[str, Tensor]
    rows: dict[Side, Rows]
    samples: int
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.samples

    @property
    def keys(self) -> dict[str, Tensor]:
        """column -> (samples, ...): the keys of the samples themselves, without views and hard negatives."""
        side = next(iter(self.rows.values()))
        return {name: values[: self.samples] for name, values in side.keys.items()}

    def to(self, device: torch.device) -> Batch:
        rows = {side: each.to(device) for side, each in self.rows.items()}
        return Batch(_move(self.inputs, device), rows, self.samples, self.rejected)

    def split(self, count: int) -> list[dict[str, Tensor]]:
        """`inputs` in nearly equal parts, each side cut on its own, for embeddings do not depend on one another."""
        parts = {name: tensor.tensor_split(count) for name, tensor in self.inputs.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(count)]


def _move(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


class Pictures(NamedTuple):
    """The image side of a batch: tensors, and what it took to make them."""

    inputs: dict[str, Tensor]
    kept: list[int]
    hashes: list[int]
    hard: list[int]  # hashes of the hard images
    rejected: list[dict[str, Any]]


@dataclass
class Assembly:
    """Draws -> Batch. Goes to the workers, so it carries no weights.

    Args:
        source: the data set.
        transform: the model's processor.
        keys: column -> (rows of the data set, ...).
        content: which of `CONTENT` are keys, too.
        hard: which of `HARD` the data set has.
        sides: which sides are prepared.
        views: (number of the view, its augmentation), 0 being the image itself.
        on_bad: ``error`` or ``skip``.
    """

    source: Any
    transform: Transform
    keys: Mapping[str, Tensor]
    content: tuple[str, ...]
    hard: frozenset[str]
    sides: tuple[str, ...]
    views: tuple[tuple[int, Augmentation], ...]
    on_bad: str

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """The batch of some draws.

        Raises:
            BadImage: an image cannot be used, and `on_bad` is ``error``.
            DataError: none of the images can be used.
        """
        records = _records(self.source, draws)
        images = self._images(draws, records)
        kept = [(draws[i], records[i]) for i in images.kept]
        texts = [record["texts"][draw.caption] for draw, record in kept]
        hard_texts = [text for _, record in kept for text in _listed(record.get("hard_texts"), "hard_texts")]
        rows = torch.tensor([draw.row for draw, _ in kept], dtype=torch.int64)
        keys = {ROW: rows, **{name: values[rows] for name, values in self.keys.items()}}
        found = {"image": images.hashes, "texts": [_hash(text.encode()) for text in texts]}
        keys |= {name: torch.tensor(found[name], dtype=torch.int64) for name in self.content}
        inputs = dict(images.inputs)
        sides: dict[Side, Rows] = {}
        if "image" in self.sides:
            sides["image"] = self._image_rows(keys, images.hard)
        if "text" in self.sides:
            inputs |= self.transform.texts(texts + hard_texts)
            hard = [_hash(text.encode()) for text in hard_texts]
            sides["text"] = _with_hard(keys, "texts", hard) if "hard_texts" in self.hard else Rows(keys)
        return Batch(inputs, sides, len(kept), images.rejected)

    def _image_rows(self, keys: dict[str, Tensor], hard: list[int]) -> Rows:
        if len(self.views) > 1 or self.views[0][0]:
            views = torch.tensor([view for view, _ in self.views]).repeat_interleave(len(keys[ROW]))
            keys = {name: torch.cat([values] * len(self.views)) for name, values in keys.items()} | {VIEW: views}
        return _with_hard(keys, "image", hard) if "hard_images" in self.hard else Rows(keys)

    def _images(self, draws: Sequence[Draw], records: list[dict[str, Any]]) -> Pictures:
        everything = list(range(len(draws)))
        if "image" not in self.sides:
            return Pictures({}, everything, [], [], [])
        if records and "image_features" in records[0]:
            return self._features(draws, records)
        images: list[list[Any]] = []
        hard: list[Any] = []
        kept, hashes, hard_hashes, rejected = [], [], [], []
        for i, (draw, record) in enumerate(zip(draws, records, strict=True)):
            try:
                image = load_image(record["image"])
                others = [load_image(each) for each in _listed(record.get("hard_images"), "hard_images")]
            except BadImage as error:
                rejected.append(self._refused(draw, error))
                continue
            images.append([augment(image, name, _seed(draw, view)) for view, name in self.views])
            hard += [augment(each, self.views[0][1], hash64(draw.seed, -1, j)) for j, each in enumerate(others)]
            kept.append(i)
            if "image" in self.content:
                hashes.append(_image_hash(image))
                hard_hashes += [_image_hash(each) for each in others]
            else:
                hard_hashes += [-1] * len(others)
        _require_some(kept, draws, rejected)
        ordered = [views[v] for v in range(len(self.views)) for views in images] + hard
        return Pictures({"pixel_values": self.transform.images(ordered)}, kept, hashes, hard_hashes, rejected)

    def _features(self, draws: Sequence[Draw], records: list[dict[str, Any]]) -> Pictures:
        """What a locked tower made of the images beforehand: of each one vector, or several to draw from."""
        cells, kept, hashes, rejected = [], [], [], []
        for i, (draw, record) in enumerate(zip(draws, records, strict=True)):
            cell = record["image_features"]
            if cell is None:  # it could not be used then
                rejected.append(self._refused(draw, why_bad(record["image"])))
                continue
            several = np.ndim(cell[0]) > 0
            cells.append(np.asarray(cell[draw.seed % len(cell)] if several else cell, dtype=np.float32))
            kept.append(i)
            if "image" in self.content:  # the same whatever is drawn
                hashes.append(_hash(np.asarray(cell[0] if several else cell, dtype=np.float32).tobytes()))
        _require_some(kept, draws, rejected)
        return Pictures({"image_features": torch.from_numpy(np.stack(cells))}, kept, hashes, [], rejected)

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
    """Why features of an image are missing."""
    try:
        load_image(image)
    except BadImage as error:
        return error
    return BadImage("CHANGED", "it could not be used when its features were computed", where=describe(image))


def _seed(draw: Draw, view: int) -> int:
    return draw.seed if view == 0 else hash64(draw.seed, view)


def _with_hard(keys: dict[str, Tensor], content: str, hashes: list[int]) -> Rows:
    """Rows with hard negatives at their end: nothing is known of them but what they look like."""
    found = {}
    for name, values in keys.items():
        nothing = float("nan") if values.is_floating_point() else 0 if name == VIEW else -1
        more = values.new_full((len(hashes), *values.shape[1:]), nothing)
        found[name] = torch.cat([values, torch.tensor(hashes, dtype=torch.int64) if name == content else more])
    anchor = torch.arange(len(found[ROW])) < len(keys[ROW])
    return Rows(found, anchor)


def _listed(cell: Any, column: str) -> list[Any]:
    if cell is None:
        return []
    found = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if (
        column == "hard_texts"
        and (wrong := next((each for each in found if not isinstance(each, str)), None)) is not None
    ):
        raise DataError(f"expected texts; found {type(wrong).__name__} {repr(wrong)[:40]}", where=column)
    return [each for each in found if not (isinstance(each, str) and is_blank(each))]


def _hash(content: bytes) -> int:
    """63 bits: two contents of a batch of a million meet by chance once in ten million batches."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _image_hash(image: Image.Image) -> int:
    return _hash(f"{image.mode} {image.size} ".encode() + image.tobytes())


def _records(source: Any, draws: Sequence[Draw]) -> list[dict[str, Any]]:
    fetch = getattr(source, "__getitems__", None)  # datasets: one Arrow look-up instead of n
    if fetch is not None:
        with drawn(hash64(*(draw.seed for draw in draws))):
            return list(fetch([draw.row for draw in draws]))
    records = []
    for draw in draws:
        with drawn(draw.seed):
            records.append(source[draw.row])
    return records
