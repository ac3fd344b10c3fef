"""The items of `embed`: their batches, its result, and the report of items that were refused."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.errors import DataError
from clipkit.modality import Modality
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.eval_mode import eval_mode
from clipkit.progress import track

T = TypeVar("T")


@dataclass(frozen=True)
class EmbedResult:
    """What `embed` gives: ``len(rows) + len(rejected)`` is the number of items, always.

    Attributes:
        vectors: (n, dim) float32 on the CPU, unit length; row i belongs to item ``rows[i]``.
        rows: the items that were used, in order.
        rejected: the items that were not, in order.
        content: SHA-256 of each used item's content; empty without a store.
    """

    vectors: Tensor
    rows: list[int]
    rejected: list[Reject]
    content: list[bytes]


def shown(batches: Iterator[T], sizes: Sequence[int], kind: Modality, progress: bool) -> Generator[T, None, None]:
    """Yield this process's batches, and show how many of their items are done."""
    main = progress and distributed.is_main()
    return track(batches, sum(sizes), f"embedding {kind}s", unit=kind, shown=main, sizes=sizes)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def reject(row: int, item: Any, error: DataError) -> Reject:
    """Return the load report\'s entry for an item that was refused."""
    return Reject(row, error.code or "BAD_DATA", error.detail, error.where or f"item {row}", _path(item))


def _path(item: object) -> str | None:
    path = item.get("path") if isinstance(item, Mapping) else item
    return os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else None


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is as it was."""
    with eval_mode(model), torch.inference_mode():
        yield
