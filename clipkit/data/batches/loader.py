"""Load this rank's part of each global batch of a plan."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clipkit.data.batches.augment import Augmentation
from clipkit.data.batches.batch import CONTENT, HARD, ROW, Batch, Transform
from clipkit.data.batches.collate import Collator
from clipkit.data.batches.plan import Plan
from clipkit.data.batches.records import RecordReader
from clipkit.data.dataset import as_dataset, column_codes, number_values
from clipkit.errors import ClipkitError, UsageError


class Loader:
    """Yields this rank's `Batch` for each step from `start`.

    A global batch is cut into contiguous, nearly equal parts, one a rank; the parts may differ by one row.

    Args:
        source: a data set with `image` (or `image_features`), `texts` and the key columns: a `datasets.Dataset`, or
            anything with `len` and `source[i]`, a mapping. Its columns `hard_texts` and `hard_images`, one or several
            of a row, are carried along as hard negatives.
        transform: the model's processor.
        plan: which rows make batch k.
        columns: key columns beside `row`, carried as codes; `texts` and `image` are hashes of what was drawn.
        numbers: key columns carried as float32.
        sides: which sides are prepared.
        base: whether the image itself is among the rows of the image side, beside its views.
        views: augmented views of each image.
        augmentation, view_augmentation: of training images, and of views.
        rank, world_size: which part of each batch to load.
        workers: processes that decode; 0 decodes in this one.
        on_bad: ``error`` stops at an image that cannot be used, ``skip`` leaves its row out and lists it.
        at_least: as for `load_image`: the decoder of a JPEG may scale it down to so many pixels a side.

    Raises:
        UsageError: a column that does not exist or cannot be a key; views or hard images of a locked tower; a stream.
    """

    def __init__(
        self,
        source: Any,
        transform: Transform,
        plan: Plan,
        *,
        columns: Sequence[str] = (),
        numbers: Sequence[str] = (),
        sides: Sequence[str] = ("image", "text"),
        base: bool = True,
        views: int = 0,
        augmentation: Augmentation = "none",
        view_augmentation: Augmentation = "simclr",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        on_bad: Literal["error", "skip"] = "error",
        at_least: int | None = None,
    ) -> None:
        source = as_dataset(source)
        keys = {column: column_codes(source, column) for column in columns if column not in (ROW, *CONTENT)}
        keys |= {column: number_values(source, column) for column in numbers}
        content = tuple(name for name in CONTENT if name in columns)
        hard = frozenset(name for name in HARD if name in source.column_names)
        if "image_features" in source.column_names and (views or "hard_images" in hard):
            raise UsageError(
                "views and hard images need pixels, and this data set holds the features of a locked tower",
                where="image_features",
                fix="train on the images themselves",
            )
        if "text_features" in source.column_names and "hard_texts" in hard:
            raise UsageError(
                "hard texts need tokens, and this data set holds the features of a frozen text tower",
                where="text_features",
                fix="train on the texts themselves",
            )
        shown = range(0 if base else 1, views + 1)
        augmentations = [augmentation if view == 0 else view_augmentation for view in shown]
        self.workers = workers
        self.steps = _Steps(
            Collator(
                RecordReader(source),
                transform,
                keys,
                content,
                hard,
                tuple(sides),
                tuple(zip(shown, augmentations, strict=True)),
                on_bad,
                at_least,
            ),
            plan,
            rank,
            world_size,
        )

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they reach all processes; the main one decides when to stop


@dataclass
class _Steps(Dataset["Batch | ClipkitError"]):
    """Makes the `Batch` of a step. It is sent to the workers, so it has no weights.

    Errors come back as values: a worker that raises would have its exception rebuilt from its text alone.
    """

    collator: Collator
    plan: Plan
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> Batch | ClipkitError:
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        draws = self.plan.batch(epoch, k)
        own = np.array_split(np.arange(len(draws)), self.world_size)[self.rank]
        try:
            return self.collator.batch([draws[i] for i in own])
        except ClipkitError as error:
            return error
