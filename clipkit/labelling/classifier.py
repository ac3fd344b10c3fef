"""ZeroShotClassifier: labels for images from class names alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clipkit.data.reading.rejects import Reject
from clipkit.embedding.decoding import Decode
from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import ClipkitError, UsageError
from clipkit.images.parallel import Workers
from clipkit.labelling.prompts import class_embeddings
from clipkit.metrics.ranking import distinct_rows
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.text_notices import class_notices, tell
from clipkit.prompts import DEFAULT_TEMPLATE, Names, Templates, names_of, prompts


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, with their probabilities.

    Attributes:
        label: the best class.
        score: its probability by the model's own temperature, in [0, 1]. For a softmax model it is relative to the
            other classes; it is not calibrated.
        index: the best class's place among ``class_names``.
        row: the image's place among the images that were passed.
        top: the best classes with their probabilities, best first.
    """

    label: str
    score: float
    index: int
    row: int
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Labelled:
    """Predictions for the images that could be used, and the others."""

    predictions: list[Prediction]
    rejected: list[Reject]

    @property
    def rows(self) -> list[int]:
        """For each prediction the place of its image among the images that were passed."""
        return [prediction.row for prediction in self.predictions]


class ZeroShotClassifier:
    """Labels images with the class whose text they match best (Radford et al. 2021, 3.1).

    Args:
        model: any dual encoder. Its weights are read when the classifier is made: make a new one after training.
        class_names: the classes; or a mapping from each class to the names its prompts use.
        templates: one or several, with the slot ``{}`` or ``{c}``; or a mapping from each class to its own templates or
            whole prompts.
        store: keeps text and image embeddings for the next time.
        progress: whether to show how far the prompts are embedded.

    Attributes:
        class_names: as a tuple, in order.
        prompts: the prompts of each class.
        weights: (classes, dim) float32, unit length.
        notices: what the model cannot see of the classes (unknown words, classes that become the same tokens); also
            told in the log.

    Raises:
        UsageError: see `prompts`.
    """

    def __init__(
        self,
        model: DualEncoder,
        class_names: Names,
        *,
        templates: Templates = DEFAULT_TEMPLATE,
        store: EmbeddingStore | None = None,
        progress: bool = False,
    ) -> None:
        self.prompts = prompts(class_names, templates)
        self.class_names = tuple(self.prompts)
        self.model, self.store = model, store
        self.weights = class_embeddings(model, self.prompts, store=store, progress=progress)
        self.notices = class_notices(model.processor, names_of(class_names), self.prompts)
        tell(self.notices, model.processor.text_side)

    def __call__(
        self,
        images: Iterable[Any],
        *,
        top_k: int = 5,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "error",
        decode: Decode = "fast",
    ) -> list[Prediction]:
        """A prediction for each image, in order.

        Args:
            images: paths, bytes, PIL images, arrays, or the undecoded images of `datasets`.
            top_k: how many classes to list.
            batch_size, workers, progress, decode: as for `embed`.
            on_bad: "skip" leaves unusable images out; ``row`` then tells which image a prediction is for, and
                `label` also gives the list of those left out.

        Raises:
            BadImage: an image cannot be used and ``on_bad`` is "error".
        """
        options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
        return self.label(images, top_k=top_k, on_bad=on_bad, decode=decode, **options).predictions

    def label(
        self,
        images: Iterable[Any],
        *,
        top_k: int = 5,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "skip",
        decode: Decode = "fast",
    ) -> Labelled:
        """As calling the classifier, with the images that could not be used beside the predictions."""
        if isinstance(images, (str, bytes)):
            raise UsageError("expected a list of images, found one", fix="put it in a list: classify([image])[0]")
        if top_k < 1:
            raise UsageError(f"top_k must be at least 1, found {top_k}")
        embedded = embed(
            self.model,
            images if isinstance(images, Sequence) else list(images),
            store=self.store,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
            on_bad=on_bad,
            decode=decode,
        )
        return Labelled(self.predict(embedded.vectors, embedded.rows, top_k=top_k), embedded.rejected)

    def predict(self, vectors: Tensor, rows: Sequence[int], *, top_k: int = 5) -> list[Prediction]:
        """Predictions from (n, dim) image embeddings; ``rows`` are the numbers to call the images by."""
        ranked = self.probabilities(vectors).sort(dim=1, descending=True, stable=True)
        k = min(top_k, len(self.class_names))
        best, scores = ranked.indices[:, :k].tolist(), ranked.values[:, :k].tolist()
        return [self._prediction(*parts) for parts in zip(rows, best, scores, strict=True)]

    def _prediction(self, row: int, best: list[int], scores: list[float]) -> Prediction:
        labels = [self.class_names[i] for i in best]
        return Prediction(labels[0], scores[0], best[0], row, list(zip(labels, scores, strict=True)))

    def logits(self, vectors: Tensor) -> Tensor:
        """(n, classes): cosine times the model's logit scale, plus its bias if it has one. Ranks like `probabilities`,
        which saturate."""
        if vectors.ndim != 2 or vectors.shape[1] != self.weights.shape[1]:
            raise ClipkitError(f"expected (n, {self.weights.shape[1]}) embeddings, found {tuple(vectors.shape)}")
        weights, expand = distinct_rows(self.weights)
        with torch.no_grad():
            scale, bias = self.model.logit_scale.float().exp().cpu(), self.model.logit_bias
            logits = scale * (vectors.float() @ weights.T)
            logits = logits if bias is None else logits + bias.float().cpu()
        return logits if expand is None else logits[:, expand]

    def probabilities(self, vectors: Tensor) -> Tensor:
        """(n, classes): softmax over the classes, or for a sigmoid model (SigLIP) each class for itself."""
        logits = self.logits(vectors)
        return logits.sigmoid() if self.model.similarity == "sigmoid" else logits.softmax(dim=1)
