"""The built-in reference: does a model still find alike what it found alike before training?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipkit.embedding.embed import embed
from clipkit.errors import ModelError
from clipkit.evaluation.evaluator import Evaluator
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.forgetting.sample import captions, pictures

K = 5


_SAME = 1e-6  # cosines that are closer than this are one; the last bits depend on the device


_WAYS = (("text", "image"), ("image", "text"), ("image", "image"), ("text", "text"))


class SimilarityReference(Evaluator):
    """How much of a model's own ranking of a fixed sample is left, from 1.0 (all) down to chance.

    The sample (`sample.py` beside this file) ships with clipkit: captions, pictures. For every item the nearest other
    one is found by the model before training; the metric is the part of these that is still among the five nearest:
    recall@5, with the former model in the place of the truth. It is taken from texts to images, images to texts, and
    within each side; ``similarity`` is the mean of the four. Ties count against the model, so that embeddings that
    have all become one score 0.

    What it is not: it knows nothing of right and wrong, so that a change for the better counts as a loss, too; 64
    drawn pictures and 64 short English captions are far from most data; and a loss of 0.01 here is no loss of 0.01 in
    anybody's recall. A set of your own (`Trainer(reference=…)`) says what you want to keep.

    The first model that it is called with is the one that others are compared with.
    """

    name = "similarity of the built-in sample"

    def __init__(self) -> None:
        self.texts = captions()
        self.images = pictures()
        self.before: dict[str, Tensor] = {}

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """``similarity``, and ``similarity_text_to_image`` and so on; on every process.

        Raises:
            ModelError: an embedding is not finite.
        """
        now = {"text": embed(model, self.texts, kind="text").vectors, "image": embed(model, self.images).vectors}
        self.before = self.before or now
        if self.before["text"].shape != now["text"].shape:
            raise ModelError("the reference remembers embeddings of another length", where=self.name)
        ways = {
            f"similarity_{a}_to_{b}": kept(scores(self.before[a], self.before[b]), scores(now[a], now[b]))
            for a, b in _WAYS
        }
        return {"similarity": sum(ways.values()) / len(ways), **ways}

    def keys(self) -> list[str]:
        """The keys of the metrics."""
        return list(self.chance())

    def chance(self) -> dict[str, float]:
        """What embeddings that have nothing to do with the former ones score, under the same keys."""
        sizes = {"text": len(self.texts), "image": len(self.images)}
        ways = {f"similarity_{a}_to_{b}": K / (sizes[b] - (a == b)) for a, b in _WAYS}
        return {"similarity": sum(ways.values()) / len(ways), **ways}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"chance": self.chance()}

    def identity(self) -> dict[str, Any]:
        return {"texts": self.texts, "images": self.images}

    def counts(self) -> dict[str, int]:
        """How many items it rests on."""
        return {"images": len(self.images), "texts": len(self.texts)}

    def tensor_state(self) -> dict[str, Tensor]:
        """The embeddings before training, for a checkpoint."""
        return self.before

    def load_tensor_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare with these embeddings."""
        self.before = dict(tensors)


def scores(queries: Tensor, items: Tensor) -> Tensor:
    """(q, i) cosines in float64; where both are the same tensor no item finds itself."""
    found = queries.double() @ items.double().T
    return found.fill_diagonal_(-torch.inf) if queries is items else found


def kept(before: Tensor, now: Tensor, k: int = K) -> float:
    """The part of the queries whose nearest item of `before` is among the `k` nearest of `now`.

    Args:
        before, now: (queries, items) scores; several items may have been the nearest: one of them is enough.
    """
    nearest = before >= before.max(dim=1, keepdim=True).values - _SAME
    best = now.masked_fill(~nearest, -torch.inf).max(dim=1, keepdim=True).values
    others = ((now >= best - _SAME) & ~nearest).sum(dim=1)  # that stand above it, or beside
    return float((others < k).double().mean())
