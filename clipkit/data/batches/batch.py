"""The input of one step of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from clipkit.modality import Modality

ROW, VIEW = "row", "view"  # keys that every sample carries, and every image where there are views
CONTENT = ("image", "texts")  # key columns that are hashes of what was drawn
HARD = ("hard_texts", "hard_images")  # columns whose cells are only ever a negative


class Transform(Protocol):
    """The part of a model's processor that the loader uses."""

    def images(self, images: Sequence[Any]) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class RowKeys:
    """The keys of the rows of one side of a batch.

    Args:
        keys: column -> (m,) int64 codes, or (m,) or (m, d) float32 numbers. Beside the columns asked for: ``row``, the
            row in the data set, -1 for hard negatives; on the image side ``view``, where there are views: 0 the image
            itself, 1, 2 … its augmented views; ``image`` and ``texts``, hashes of the contents, where asked for.
        anchor: (m,) bool, false for hard negatives; None where there are none.
    """

    keys: dict[str, Tensor]
    anchor: Tensor | None = None

    def to(self, device: torch.device) -> RowKeys:
        return RowKeys(_move(self.keys, device), None if self.anchor is None else self.anchor.to(device))


@dataclass
class Batch:
    """This rank's rows of one global batch.

    Args:
        inputs: keyword arguments of the model's forward. The image side has a row for each image, then for each view,
            then for each hard image; the text side for each caption, then for each hard text.
        rows: side -> the keys of its rows.
        samples: number of samples.
        rejected: rows whose image could not be used, left out of `inputs`.
    """

    inputs: dict[str, Tensor]
    rows: dict[Modality, RowKeys]
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
        rows = {side: keys.to(device) for side, keys in self.rows.items()}
        return Batch(_move(self.inputs, device), rows, self.samples, self.rejected)

    def split(self, count: int) -> list[dict[str, Tensor]]:
        """`inputs` in nearly equal parts, each side cut on its own, for embeddings do not depend on one another."""
        parts = {name: tensor.tensor_split(count) for name, tensor in self.inputs.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(count)]


def _move(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
