"""From the plan to tensors: this rank's part of each global batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit.data.augment import Augmentation, augment
from clipkit.data.keys import key_values
from clipkit.data.plan import Draw, Plan
from clipkit.errors import BadImage, ClipkitError, DataError
from clipkit.images import load_image

ROW = "row"  # the key that every sample carries, for every notion of similarity


class Transform(Protocol):
    """What the loader needs of a model's processor."""

    def images(self, images: Sequence[Any]) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass
class Batch:
    """This rank's rows of one global batch.

    Args:
        inputs: keyword arguments of the model's forward, first dimension n_local.
        keys: column -> (n_local,) int64, for `Similar.affinity`.
        rejected: rows whose image could not be used, left out of `inputs`.
    """

    inputs: dict[str, Tensor]
    keys: dict[str, Tensor]
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return Batch(move(self.inputs), move(self.keys), self.rejected)


def codes(pairs: Any, column: str) -> Tensor:
    """(n,) int64: one number for each distinct value, given once per data set; -1 for empty cells."""
    numbers: dict[Any, int] = {}
    found = [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in key_values(pairs, column)]
    return torch.tensor(found, dtype=torch.int64)


class Loader:
    """Yields this rank's `Batch` for each step from `start`.

    A global batch is cut into contiguous, nearly equal parts, one a rank; the parts may differ by one row.

    Args:
        source: a data set with `image` (or `image_features`), `texts` and the key columns.
        transform: the model's processor.
        plan: which rows make batch k.
        columns: key columns beside `row`.
        augmentation: of training images.
        rank, world_size: which part is ours.
        workers: processes that decode; 0 decodes in this one.
        on_bad: ``error`` stops at an image that cannot be used, ``skip`` leaves it out and lists it.
    """

    def __init__(
        self,
        source: Any,
        transform: Transform,
        plan: Plan,
        *,
        columns: Sequence[str] = (),
        augmentation: Augmentation = "none",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        keys = {column: codes(source, column) for column in columns if column != ROW}
        self.workers = workers
        self.steps = _Steps(source, transform, plan, keys, augmentation, rank, world_size, on_bad)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` - 1, counted over all epochs from 0."""
        if self.workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns, once forked, if unset
        for batch in DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.workers,
            worker_init_fn=_quiet_worker,
            prefetch_factor=2 if self.workers else None,
        ):
            if isinstance(batch, ClipkitError):
                raise batch
            yield batch


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides when to stop


@dataclass
class _Steps(Dataset["Batch | ClipkitError"]):
    """step -> Batch. Goes to the workers, so it carries no weights.

    Errors come back as values: a worker that raises would have its exception rebuilt from a mere text.
    """

    source: Any
    transform: Transform
    plan: Plan
    keys: Mapping[str, Tensor]
    augmentation: Augmentation
    rank: int
    world_size: int
    on_bad: str

    def __getitem__(self, step: int) -> Batch | ClipkitError:
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        draws = self.plan.batch(epoch, k)
        mine = np.array_split(np.arange(len(draws)), self.world_size)[self.rank]
        try:
            return self._load([draws[i] for i in mine])
        except ClipkitError as error:
            return error

    def _load(self, draws: list[Draw]) -> Batch:
        records = _records(self.source, [draw.row for draw in draws])
        images, kept, rejected = self._images(draws, records)
        texts = [records[i]["texts"][draws[i].caption] for i in kept]
        rows = torch.tensor([draws[i].row for i in kept], dtype=torch.int64)
        keys = {ROW: rows, **{name: values[rows] for name, values in self.keys.items()}}
        return Batch({**images, **self.transform.texts(texts)}, keys, rejected)

    def _images(
        self, draws: list[Draw], records: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], list[int], list[dict[str, Any]]]:
        everything = list(range(len(draws)))
        if records and "image_features" in records[0]:  # of a locked tower, computed beforehand
            features = np.asarray([record["image_features"] for record in records], dtype=np.float32)
            return {"image_features": torch.from_numpy(features)}, everything, []
        images, kept, rejected = [], [], []
        for i, (draw, record) in enumerate(zip(draws, records, strict=True)):
            try:
                images.append(augment(load_image(record["image"]), self.augmentation, draw.seed))
                kept.append(i)
            except BadImage as error:
                if self.on_bad == "error":
                    raise
                rejected.append({"row": draw.row, "path": error.where, "code": error.code, "message": error.message})
        if not images:
            where = rejected[0]["path"] if rejected else f"rank {self.rank}"
            raise DataError(
                f"none of the {len(draws)} images of this process's part of a batch can be used",
                where=where,
                fix="`clipkit check data` lists what is broken",
            )
        return {"pixel_values": self.transform.images(images)}, kept, rejected


def _records(source: Any, rows: list[int]) -> list[dict[str, Any]]:
    fetch = getattr(source, "__getitems__", None)  # datasets: one Arrow look-up instead of n
    return list(fetch(rows)) if fetch else [source[row] for row in rows]
