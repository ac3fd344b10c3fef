"""The built-in reference: whether a model still finds the same things similar as before training."""

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

_SAME = 1e-6  # cosines that differ by less count as equal; the last bits depend on the device

_DIRECTIONS = (("text", "image"), ("image", "text"), ("image", "image"), ("text", "text"))


class SimilarityReference(Evaluator):
    """Measures how much of a model's own ranking of a fixed sample is left, from 1.0 (all) down to chance.

    The sample of captions and pictures ships with clipkit (see `sample.py` in this folder). For every item the model
    before training gives the nearest other item; the metric is the part of these that are still among the five
    nearest: recall@5 with the former model's answer as the truth. It is measured from texts to images, from images to
    texts, and within each side; ``similarity`` is the mean of the four. Ties count against the model, so that
    embeddings that have all become equal score 0.

    Its limits: it does not know what is right, so that an improvement also counts as a loss; 64 drawn pictures and
    64 short English captions differ from most data; and a loss of 0.01 here does not mean a loss of 0.01 in the recall
    on other data. With an evaluator of your own (`Trainer(reference=…)`) you say what you want to keep.

    It compares every model with the first one that it is called with.
    """

    name = "similarity of the built-in sample"

    def __init__(self) -> None:
        self.texts = captions()
        self.images = pictures()
        self.before: dict[str, Tensor] = {}

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """Return ``similarity``, ``similarity_text_to_image`` and so on; on every process.

        Raises:
            ModelError: an embedding is not finite.
        """
        now = {"text": embed(model, self.texts, kind="text").vectors, "image": embed(model, self.images).vectors}
        self.before = self.before or now
        if self.before["text"].shape != now["text"].shape:
            raise ModelError("the reference remembers embeddings of another length", where=self.name)
        metrics = {}
        for query, item in _DIRECTIONS:
            before_scores = scores(self.before[query], self.before[item])
            metrics[f"similarity_{query}_to_{item}"] = kept(before_scores, scores(now[query], now[item]))
        return {"similarity": sum(metrics.values()) / len(metrics), **metrics}

    def keys(self) -> list[str]:
        """Return the keys of the metrics."""
        return list(self.chance())

    def chance(self) -> dict[str, float]:
        """Return the scores of embeddings that are independent of the former ones, under the same keys."""
        sizes = {"text": len(self.texts), "image": len(self.images)}
        chances = {}
        for query, item in _DIRECTIONS:
            candidates = sizes[item] - 1 if query == item else sizes[item]  # an item does not find itself
            chances[f"similarity_{query}_to_{item}"] = K / candidates
        return {"similarity": sum(chances.values()) / len(chances), **chances}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"chance": self.chance()}

    def identity(self) -> dict[str, Any]:
        return {"texts": self.texts, "images": self.images}

    def counts(self) -> dict[str, int]:
        """Return how many images and texts the sample has."""
        return {"images": len(self.images), "texts": len(self.texts)}

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the embeddings before training, for a checkpoint."""
        return self.before

    def load_tensor_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the embeddings to compare with."""
        self.before = dict(tensors)


def scores(queries: Tensor, items: Tensor) -> Tensor:
    """Return the (q, i) cosines in float64; if both are the same tensor no item finds itself."""
    cosines = queries.double() @ items.double().T
    return cosines.fill_diagonal_(-torch.inf) if queries is items else cosines


def kept(before: Tensor, now: Tensor, k: int = K) -> float:
    """Return the part of the queries for which the nearest item of `before` is among the `k` nearest of `now`.

    Args:
        before, now: (queries, items) scores; if several items were the nearest, one of them is enough.
    """
    nearest = before >= before.max(dim=1, keepdim=True).values - _SAME
    best = now.masked_fill(~nearest, -torch.inf).max(dim=1, keepdim=True).values
    others = ((now >= best - _SAME) & ~nearest).sum(dim=1)  # items with a higher score than the best, or an equal one
    return float((others < k).double().mean())
