"""Prepare batches of images beside the model: in threads, for Pillow lets others run while it decodes, or processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader

from clipkit.errors import BadImage

Workers: TypeAlias = int | Literal["auto"]
"""``"auto"``: threads, as many as there are cores; a number: so many processes, 0 being the calling thread alone."""

K = TypeVar("K", bound=Hashable)
_AHEAD = 2  # batches prepared while an accelerator computes


class BatchSource(Protocol):
    """What prepares one batch. It decodes with `pool`, if it has one."""

    pool: ThreadPoolExecutor | None

    def __getitem__(self, batch: Any) -> Any: ...


def prepared(source: BatchSource, batches: Sequence[Any], workers: Workers, device: torch.device) -> Iterator[Any]:
    """Yield ``source[batch]`` for each batch, in order.

    With "auto" on a CPU, threads decode a batch, then the model computes it: torch's threads and the decoders never
    compete for the cores. Elsewhere the next batches are prepared while the device computes.
    """
    if workers != "auto":
        count = min(workers, len(batches))
        if count == 0:
            yield from (source[batch] for batch in batches)
        else:
            yield from DataLoader(source, batch_size=None, sampler=batches, num_workers=count, collate_fn=_as_it_is)  # type: ignore[arg-type]
        return
    with ThreadPoolExecutor(decoders(device), "clipkit-decode") as source.pool:
        try:
            if device.type == "cpu":
                yield from (source[batch] for batch in batches)
            else:
                yield from _ahead(source, batches)
        finally:
            source.pool = None


def _ahead(source: BatchSource, batches: Sequence[Any]) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1, "clipkit-prepare") as thread:
        try:
            for batch in batches:
                waiting.append(thread.submit(source.__getitem__, batch))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def decoders(device: torch.device) -> int:
    """How many threads decode: on a CPU as many as torch computes with, else this rank's share of the cores."""
    if device.type == "cpu":
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def decode_batch(
    keys: Iterable[K], load: Callable[[K], Image.Image], pool: ThreadPoolExecutor | None = None
) -> tuple[dict[K, Image.Image], list[tuple[K, BadImage]]]:
    """Return the images of a batch that could be loaded, by key, and the errors of the others."""

    def attempt(key: K) -> Image.Image | BadImage:
        try:
            return load(key)
        except BadImage as error:
            return error

    keys = list(keys)
    loaded = map(attempt, keys) if pool is None else pool.map(attempt, keys)
    images: dict[K, Image.Image] = {}
    refused: list[tuple[K, BadImage]] = []
    for key, image in zip(keys, loaded, strict=True):
        if isinstance(image, BadImage):
            refused.append((key, image))
        else:
            images[key] = image
    return images, refused


def _as_it_is(batch: Any) -> Any:
    return batch
