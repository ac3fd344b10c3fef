"""What a locked image tower sees, computed once: training then costs the text side alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipkit import distributed
from clipkit.data.map_style import as_table
from clipkit.embedding.embed import batched, shown
from clipkit.embedding.store import EmbeddingStore, Key, content_hash
from clipkit.errors import ModelError, UsageError
from clipkit.images import bytes_of
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.encode import image_chunks
from clipkit.models.fingerprint import tower_hash


def with_image_features(
    model: DualEncoder,
    pairs: Any,
    *,
    store: EmbeddingStore | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Any:
    """`pairs` with a column `image_features`, which `Trainer` takes in place of the images (LiT, Zhai et al. 2022).

    The features are those of `model.vision_features`, before the projection, of the images as they are: training on
    them is training without image augmentation.

    Args:
        model: its image tower must be frozen (``model.freeze("image")``); its heads may train on.
        pairs: a data set with a column `image`, as `Trainer` takes it.
        store: keeps features by the image's content and the tower's fingerprint, for the next run.
        batch_size, workers, progress: as for `embed`.

    Raises:
        UsageError: the image tower is not frozen.
        BadImage: an image cannot be used.
        ModelError: a feature is not finite.
    """
    backend = model.backend
    trained = [n for n, p in backend.named_parameters() if p.requires_grad and backend.owns("image", n, head=False)]
    if trained:
        raise UsageError(
            "features can be kept only of a tower that stands still", where=trained[0], fix='model.freeze("image")'
        )
    pairs = as_table(pairs)
    images: Sequence[Any] = pairs["image"]
    features: dict[int, NDArray[np.float32]] = {}
    keys: list[Key] = []
    if store is not None:
        tower = tower_hash(backend, model.processor)
        keys = [Key(content_hash(bytes_of(image)), "image_features", tower) for image in images]
        found = store.get(keys)
        features = {row: found[key] for row, key in enumerate(keys) if key in found}
    # of any process: another one may have put a row into the store a moment ago
    shares = distributed.together(lambda: [row for row in range(len(images)) if row not in features])
    missing = sorted({row for share in shares for row in share})
    mine = missing[distributed.rank() :: distributed.world_size()]

    def compute() -> dict[int, NDArray[np.float32]]:
        done: dict[int, NDArray[np.float32]] = {}
        chunks = image_chunks(_Rows(images, mine), model.processor, batch_size, workers)
        parts = list(batched(mine, batch_size))
        for rows, inputs in shown(zip(parts, chunks, strict=True), len(parts), "image", progress):
            vectors = _features(model, inputs["pixel_values"], rows)
            if store is not None:
                store.put([keys[row] for row in rows], vectors)
            done.update(zip(rows, vectors, strict=True))
        return done

    for share in distributed.together(compute):
        features |= share
    return pairs.add_column("image_features", [features[row] for row in range(len(images))])


def _features(model: DualEncoder, pixels: torch.Tensor, rows: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        vectors: NDArray[np.float32] = model.vision_features(pixels.to(model.device)).float().cpu().numpy()
    if not np.isfinite(vectors).all():
        bad = rows[int((~np.isfinite(vectors).all(axis=1)).argmax())]
        raise ModelError("an image feature is not finite", where=f"row {bad}")
    return vectors


class _Rows(Sequence[Any]):
    def __init__(self, items: Sequence[Any], rows: list[int]) -> None:
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return (
            [self.items[row] for row in self.rows[index]] if isinstance(index, slice) else self.items[self.rows[index]]
        )
