"""ZeroShotClassifier: labels for images from class names alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

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

_SCORES = 2**24  # held at once: 64 MiB


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


class Predictions(Sequence[Prediction]):
    """Predictions that are made when they are asked for: a million of them take 100 MB.

    Args:
        class_names: of all classes.
        classes, scores: (n, k), as `ZeroShotClassifier.best` gives them.
        rows: the number to call each image by.
    """

    def __init__(self, class_names: Sequence[str], classes: Tensor, scores: Tensor, rows: Sequence[int]) -> None:
        self._class_names, self._classes, self._scores, self._rows = class_names, classes, scores, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Prediction: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prediction]: ...
    def __getitem__(self, place: int | slice) -> Prediction | list[Prediction]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        best = self._classes[place].tolist()
        scores = self._scores[place].tolist()
        labels = [self._class_names[index] for index in best]
        return Prediction(labels[0], scores[0], best[0], self._rows[place], list(zip(labels, scores, strict=True)))


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
        return list(Predictions(self.class_names, *self.best(vectors, top_k), rows))

    def best(self, vectors: Tensor, top_k: int = 5) -> tuple[Tensor, Tensor]:
        """The best classes of each of (n, dim) image embeddings and their probabilities, both (n, top_k).

        Of equal probabilities the first class comes first. Never holds the scores of all images at once.
        """
        k = min(top_k, len(self.class_names))
        classes = torch.zeros(len(vectors), k, dtype=torch.int64)
        scores = torch.zeros(len(vectors), k)
        for start, stop in self.tiles(len(vectors)):
            ranked = self.probabilities(vectors[start:stop]).sort(dim=1, descending=True, stable=True)
            classes[start:stop], scores[start:stop] = ranked.indices[:, :k], ranked.values[:, :k]
        return classes, scores

    def tiles(self, images: int) -> Iterator[tuple[int, int]]:
        """Ranges of images whose scores for all classes take at most 64 MiB."""
        step = max(1, _SCORES // len(self.class_names))
        for start in range(0, images, step):
            yield start, min(start + step, images)

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
