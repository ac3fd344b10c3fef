"""Lists of images or texts to embeddings: in batches, in eval mode, checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from clipkit.errors import BadImage, DataError, ModelError, UsageError
from clipkit.images.load import load_image
from clipkit.images.parallel import Workers, decode_batch, prepared
from clipkit.modality import Modality
from clipkit.models.allocator import keep_freed_memory
from clipkit.models.backend import Backend, Embeddings
from clipkit.models.eval_mode import eval_mode
from clipkit.models.processor import Processor
from clipkit.progress import Progress
from clipkit.texts import checked_text, is_broken

logger = logging.getLogger("clipkit")

_CPU = torch.device("cpu")


def encode(
    backend: Backend,
    chunks: Iterable[dict[str, Tensor]],
    side: Modality,
    items: Sequence[Any],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    dim: int | None = None,
    forward: Callable[..., Embeddings] | None = None,
) -> Tensor:
    """(n, dim) float32 on the CPU, in the order of `items`, from which `chunks` were made.

    Args:
        device, dtype, progress, dim: as in `DualEncoder.encode_images`.
        forward: computes a chunk; `backend.embed` if None. In training it is the model, for Accelerate has patched
            autocast into its forward.
    """
    if dim is not None and not 1 <= dim <= backend.dim:
        raise UsageError(f"dim={dim}, but the model's embeddings have {backend.dim} components")
    if device is not None:
        backend.to(device)
    if backend.device.type == "cpu":
        keep_freed_memory()
    forward = forward or backend.embed
    embeddings = torch.empty(len(items), dim or backend.dim)
    done = 0
    bar = Progress(len(items), f"embedding {side}s", unit=side, shown=progress)
    with eval_mode(backend), torch.inference_mode(), _autocast(backend, dtype), bar:
        for inputs in chunks:
            vectors = getattr(forward(**{name: value.to(backend.device) for name, value in inputs.items()}), side)
            finite = torch.isfinite(vectors).all(1)
            if not finite.all():
                bad = done + int((~finite).int().argmax())
                _refuse(side, bad, items[bad])
            if dim is not None:
                vectors = F.normalize(vectors[:, :dim], dim=-1)
            embeddings[done : done + len(vectors)] = vectors
            done += len(vectors)
            bar.advance(len(vectors))
    return embeddings


def _refuse(side: Modality, index: int, item: Any) -> None:
    shown = item if isinstance(item, str | os.PathLike) else type(item).__name__
    fix = "fp16 overflows in some models: use bfloat16 or float32; else look for bad weights"
    raise ModelError(f"the {side} embedding is not finite", where=f"item {index}: {shown}", fix=fix)


def _autocast(backend: Backend, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    kind = backend.device.type
    if dtype is None:
        return nullcontext()
    if dtype is torch.float32:  # also inside an outer autocast
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype)


class _ImageBatches(Dataset[Any]):
    """Item i is batch i, ready for the model, or the `BadImage` in it."""

    def __init__(self, items: Sequence[Any], processor: Processor, batch_size: int) -> None:
        self.items, self.processor, self.batch_size = items, processor, batch_size
        self.pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, index: int) -> Tensor | BadImage:
        start = index * self.batch_size
        rows = range(start, min(start + self.batch_size, len(self.items)))
        images, refused = decode_batch(rows, lambda row: load_image(self.items[row]), self.pool)
        if refused:
            return refused[0][1]  # raised by the reader: a DataLoader would rebuild it from its text, and fail
        return self.processor.images(list(images.values()))


def image_chunks(
    items: Sequence[Any], processor: Processor, batch_size: int, workers: Workers, device: torch.device = _CPU
) -> Iterator[dict[str, Tensor]]:
    """Inputs of the model for all images; worker processes carry the processor, no weights."""
    batches = _ImageBatches(items, processor, _positive(batch_size))
    for batch in prepared(batches, range(len(batches)), workers, device):
        if isinstance(batch, BadImage):
            raise batch
        yield {"pixel_values": batch}


def text_chunks(items: Sequence[Any], processor: Processor, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Inputs of the model for all texts."""
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise DataError(f"a text was expected, found {type(text).__name__}: {text!r}", where=f"item {index}")
        if is_broken(text):
            checked_text(text)
    for start in range(0, len(items), _positive(batch_size)):
        yield processor.texts(items[start : start + batch_size])


def report_cut(processor: Processor, texts: Sequence[str], once: Callable[[Hashable], bool]) -> None:
    """One line in the log if texts were longer than the model reads; none if it has told of all of them before.

    `once` is the model's: whether something is said for the first time.
    """
    length = processor.context_length
    # A token stands for at least one byte, and the special ones are few: most texts need no second look.
    long = [text for text in texts if len(text.encode(errors="replace")) + 4 > length]
    counts = processor.token_counts(long) if long else []
    cut = [text for text, count in zip(long, counts, strict=True) if count > length]
    if sum(once(("cut", length, hash(text))) for text in cut):
        logger.warning("%d of %d texts were cut at %d tokens", len(cut), len(texts), length)


def listed(items: Any, caller: str, single: tuple[type, ...]) -> list[Any]:
    """`items` as a list; one item alone is an error (a path is a sequence of letters)."""
    if isinstance(items, single):
        raise UsageError(f"{caller} takes a list, found one {type(items).__name__}", fix=f"{caller}([...])")
    return list(items)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, found {batch_size}")
    return batch_size
