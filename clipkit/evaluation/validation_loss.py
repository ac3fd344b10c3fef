"""The loss on held-out pairs, in batches that never change: comparable across batch sizes, ranks and runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.data.batches.assignment import hash64
from clipkit.data.dataset import require_column, require_texts
from clipkit.data.reading.rejects import Reject
from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import DataError, UsageError
from clipkit.evaluation.evaluator import Evaluator
from clipkit.images.parallel import Workers
from clipkit.models.dual_encoder import DualEncoder


class ValidationLoss(Evaluator):
    """Symmetric InfoNCE, or the sigmoid loss of models with a bias, of given pairs; low is good.

    The pairs, each image with its first caption, are mixed once by a fixed rule (or a table that is sorted by class
    would give batches of one class) and cut into batches of nearly equal size; the figure is the mean over all pairs.
    It depends on these batches (a uniform guess gives ln of their size under
    InfoNCE), but not on the batch size, the augmentation, or the number of processes of a training. Equal captions in a
    batch count against each other, as in training with `Paired()`: where captions repeat, it cannot reach 0.

    Inputs: a model, on every process where there are several. It returns ``{name}/loss``, in nats.

    When to prefer it: to see overfitting, and where a test set is too small for recall@k to move.

    Relations: `RetrievalEvaluator` ranks among all pairs, not within batches. `info_nce` and `sigmoid_loss` are
    the losses of training, for any `Similarity`.

    Args:
        pairs: a data set with `image` and `texts`.
        name: the key is ``{name}/loss``.
        size: pairs of a batch, about; fewer where there are fewer pairs.
        store, features, batch_size, workers, progress, on_bad: as for `embed`.

    Raises:
        UsageError: fewer than two pairs in a batch; no such columns.
        DataError: a row without captions.

    References:
        Radford et al. 2021 (CLIP), figure 3; with a bias Zhai et al. 2023 (SigLIP), algorithm 1.

    Example: with `model` a `DualEncoder` and `pairs` from `load_pairs`.
        >>> evaluator = ValidationLoss(pairs)
        >>> list(evaluator(model))
        ['validation/loss']
    """

    def __init__(
        self,
        pairs: Any,
        *,
        name: str = "validation",
        size: int = 256,
        store: EmbeddingStore | None = None,
        features: EmbeddingStore | None = None,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        require_column(pairs, "image")
        require_texts(pairs)
        if size < 2:
            raise UsageError(f"a batch needs at least 2 pairs to have a negative, found size={size}")
        self.name, self.size, self.store, self.features = name, size, store, features
        self.batch_size, self.workers, self.progress, self.on_bad = batch_size, workers, progress, on_bad
        self.images: Sequence[Any] = pairs["image"]
        self.texts = [_first(texts, row) for row, texts in enumerate(pairs["texts"])]
        self.rejected: list[Reject] = []
        self.used = len(self.texts)
        if len(self.texts) < 2:
            raise UsageError(f"a loss needs at least 2 pairs, found {len(self.texts)}", where=name)

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """``{name}/loss``, the same on every process.

        Raises:
            BadImage: an image cannot be used.
            DataError: none of the images can be used.
            ModelError: an embedding is not finite.
        """
        options: dict[str, Any] = {"store": self.store, "batch_size": self.batch_size, "progress": self.progress}
        images = embed(model, self.images, features=self.features, workers=self.workers, on_bad=self.on_bad, **options)
        texts = embed(model, [self.texts[row] for row in images.rows], kind="text", features=self.features, **options)
        self.rejected, self.used = images.rejected, len(images.rows)
        if not self.used:
            raise DataError("none of the images can be used", where=self.rejected[0].where)
        mixed = np.array(sorted(range(self.used), key=lambda i: hash64(0, images.rows[i])))
        scale = model.logit_scale.detach().float().cpu().exp()
        bias = None if model.logit_bias is None else model.logit_bias.detach().float().cpu()
        parts = np.array_split(mixed, self._batches())
        sums = [_loss(images.vectors[rows], texts.vectors[rows], scale, bias) * len(rows) for rows in parts]
        return {f"{self.name}/loss": float(torch.stack(sums).sum() / self.used)}

    def keys(self) -> list[str]:
        """The key of the metric."""
        return [f"{self.name}/loss"]

    def identity(self) -> dict[str, Any]:
        return {"texts": self.texts, "size": self.size, "images": self.images}

    def counts(self) -> dict[str, int]:
        """How many pairs there are, and in how many batches."""
        return {f"{self.name}/pairs": self.used, f"{self.name}/batches": self._batches()}

    def _batches(self) -> int:
        return max(1, math.ceil(self.used / self.size))


def _first(texts: Sequence[str], row: int) -> str:
    if not texts:
        raise DataError("a row without captions", where=f"row {row}")
    return texts[0]


def _loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Of one batch: Radford et al. 2021, figure 3; with a bias Zhai et al. 2023, algorithm 1."""
    logits = scale * images @ texts.T
    if bias is None:
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    signs = 2 * torch.eye(len(logits)) - 1
    return F.softplus(-signs * (logits + bias)).sum() / len(logits)
