"""embed(): makes every embedding outside the training step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.embedding.decoding import Decode, ImageBatches, smallest_side
from clipkit.embedding.distinct import identify
from clipkit.embedding.items import EmbedResult, batched, evaluating, reject, shown
from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.errors import ModelError, UsageError
from clipkit.images.load import describe
from clipkit.images.parallel import Workers, prepared
from clipkit.modality import Modality
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.encode import encode, report_cut, text_chunks
from clipkit.texts import is_text

logger = logging.getLogger("clipkit")
_GET = 4096  # rows fetched from the store at once


def embed(
    model: DualEncoder,
    items: Sequence[Any],
    *,
    kind: Modality = "image",
    store: EmbeddingStore | None = None,
    features: EmbeddingStore | None = None,
    batch_size: int = 64,
    workers: Workers = "auto",
    progress: bool = False,
    on_bad: Literal["error", "skip"] = "error",
    decode: Decode = "exact",
) -> EmbedResult:
    """Embeddings of images or texts, in order, each distinct item computed once.

    Under several processes every one must call this with the same items: they share the work by whole batches and all
    return the same result, which is that of one process (batches are the same however many share them).

    Args:
        items: images (paths, bytes, PIL images, arrays, undecoded `datasets` images) or texts. Any sequence with
            ``len`` and ``[i]``; it is read item by item.
        kind: which tower.
        store: keeps embeddings by content; what is there is not computed again, and every batch is committed as soon
            as it is done, so that a killed run goes on where it was. Without one nothing is hashed.
        features: while a tower is frozen, its images or texts are embedded from its features, which this store keeps by
            content and tower (`with_features`), and nothing is kept of their embeddings; else it is not read, and where
            neither tower is frozen the log says so.
        batch_size: items at once.
        workers: ``"auto"`` decodes in threads, as many as there are cores, and on an accelerator ahead of the model; a
            number: so many processes, 0 decodes here.
        progress: whether the main process shows how far it is.
        on_bad: "error" stops at an item that cannot be used, "skip" lists it in ``rejected``.
        decode: ``"fast"`` lets the decoder of a JPEG scale it down as long as three times the model's input remains: a
            12-megapixel photo then takes a fraction of the time, and its embedding differs by a cosine of about 0.001.
            In a store the two are kept apart. Kept features are always exact.

    Raises:
        BadImage, DataError: an item cannot be used and ``on_bad`` is "error".
        ModelError: an embedding is NaN or infinite; names the item.
    """
    _check_options(items, kind, batch_size, on_bad, decode)
    if features is not None and kind == "text":
        from clipkit.embedding.text_features import embed_locked_texts, is_text_locked

        if is_text_locked(model) and all(is_text(item) for item in items):
            return embed_locked_texts(model, items, features, batch_size=batch_size, progress=progress)
    if features is not None and kind == "image":
        from clipkit.embedding import image_features as locked

        if locked.is_locked(model):
            options: dict[str, Any] = {"workers": workers, "progress": progress, "on_bad": on_bad}
            return locked.embed_locked(model, items, features, batch_size=batch_size, **options)
        from clipkit.embedding.text_features import is_text_locked

        if not is_text_locked(model) and model.once("features") and distributed.is_main():
            logger.warning(
                "kept features are not used, for the image tower is not frozen, and each image runs through it again; "
                'a saved model is opened with nothing frozen: model.freeze("image") freezes it'
            )
    work = identify(items, kind, store, skip=on_bad == "skip", progress=progress)
    tower = _tower(model, kind) if work.content else ""  # once a call: it reads all the weights
    space = space_of(kind, decode)
    keys = [Key(content, space, tower) for content in work.content]
    vectors = torch.zeros(len(work.first), model.dim)
    known = _recall(store, keys, vectors) if store is not None else set()
    missing_by_rank = distributed.together(lambda: set(range(len(vectors))) - known)
    missing = set().union(*missing_by_rank)  # what any process lacks
    batches = list(batched(sorted(missing), batch_size))
    encode = Encoder(model, items, kind, work.first, work.content, workers, skip=on_bad == "skip", decode=decode)
    done: list[int] = []

    def compute() -> tuple[list[int], dict[int, Reject]]:
        mine = batches[distributed.rank() :: distributed.world_size()]
        with closing(shown(encode.batches(mine), [len(batch) for batch in mine], kind, progress)) as encoded:
            for numbers, fresh in encoded:
                vectors[numbers] = fresh
                done.extend(numbers)
                if store is not None and numbers:
                    store.put([keys[n] for n in numbers], fresh.numpy())
        return done, encode.rejected

    shares = distributed.together(compute)
    numbers = [n for share, _ in shares for n in share]
    vectors[numbers] = _gather(vectors[done], model.device)
    if kind == "text" and distributed.is_main():
        report_cut(model.processor, [items[row] for row in work.first], model.once)
    if store is not None and store.path is None and distributed.world_size() > 1 and numbers:
        store.put([keys[n] for n in numbers], vectors[numbers].numpy())  # each process has a memory of its own
    return work.assemble(vectors, {n: reject for _, rejects in shares for n, reject in rejects.items()})


def _check_options(items: Sequence[Any], kind: str, batch_size: int, on_bad: str, decode: str) -> None:
    if isinstance(items, (str, bytes)):
        raise UsageError(f"expected a list of items, found one {type(items).__name__}", fix="put it in a list: [item]")
    if kind not in ("image", "text") or on_bad not in ("error", "skip"):
        raise UsageError(f'kind is "image" or "text", on_bad "error" or "skip"; found {kind!r} and {on_bad!r}')
    if decode not in get_args(Decode):
        raise UsageError(f"decode is one of {', '.join(get_args(Decode))}; found {decode!r}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, found {batch_size}")


def space_of(kind: Modality, decode: Decode) -> str:
    """`Key.kind` of an embedding."""
    return "image fast" if (kind, decode) == ("image", "fast") else kind


def _tower(model: DualEncoder, kind: Modality) -> str:
    fingerprint = model.fingerprint()
    return fingerprint.image if kind == "image" else fingerprint.text


def _recall(store: EmbeddingStore, keys: Sequence[Key], vectors: Tensor) -> set[int]:
    """Copy what the store has into ``vectors``, and return the numbers of those rows."""
    known = set()
    for numbers in batched(range(len(keys)), _GET):
        stored = store.get([keys[n] for n in numbers])
        rows = [n for n in numbers if keys[n] in stored]
        if rows:
            vectors[rows] = torch.from_numpy(np.stack([stored[keys[n]] for n in rows]))
        known.update(rows)
    return known


def _gather(vectors: Tensor, device: torch.device) -> Tensor:
    if distributed.world_size() == 1:
        return vectors
    with torch.no_grad():
        return distributed.gather_rows(vectors.to(device)).cpu()


class Encoder:
    """Batches of distinct items to vectors; refused items are put into ``rejected``, by number."""

    def __init__(
        self,
        model: DualEncoder,
        items: Sequence[Any],
        kind: Modality,
        first: list[int],
        content: list[bytes],
        workers: Workers,
        *,
        skip: bool,
        decode: Decode,
    ) -> None:
        self.model, self.items, self.kind, self.workers, self.skip = model, items, kind, workers, skip
        self.at_least = smallest_side(decode, model.processor)
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
            yield numbers, encode(self.model.backend, chunks, "text", texts, forward=self.model)

    def _images(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        source = ImageBatches(self.items, self.first, self.content, self.model.processor, self.at_least)
        for numbers, pixels, refused in prepared(source, batches, self.workers, self.model.device):
            for n, error in refused:
                if not self.skip:
                    raise error.or_skip()
                self.rejected[n] = reject(self.first[n], self.items[self.first[n]], error)
            with evaluating(self.model):
                vectors = self.model(pixel_values=pixels.to(self.model.device)).image if numbers else pixels
            yield numbers, vectors.float().cpu().reshape(len(numbers), self.model.dim)
