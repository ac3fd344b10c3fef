"""What a zero-shot evaluation saw, beyond its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipkit.labelling.classifier import Prediction


@dataclass(frozen=True)
class ClassFigures:
    """One class of the report: its images, the share of them that was recognised, and how often it was named."""

    name: str
    n: int
    recall: float | None  # None where there is no image of it
    named: int


@dataclass(frozen=True)
class ZeroShotResult:
    """What the last evaluation saw, beyond its figures.

    Attributes:
        metrics: the figures.
        class_names: in the order of the labels.
        labels: (n,) long, the true classes.
        hits: (n,) float64, the probability that the true class is on top (a fraction under ties).
        predictions: for each image, with its best classes.
        confusion: (classes, classes) long, rows are true classes.
        per_class: a row for each class.
    """

    metrics: dict[str, float]
    class_names: tuple[str, ...]
    labels: Tensor
    hits: Tensor
    predictions: Sequence[Prediction]
    confusion: Tensor
    per_class: list[ClassFigures]

    def most_confused(self, limit: int = 20) -> list[tuple[str, str, int]]:
        """(true class, named class, images), the most frequent mistakes first."""
        wrong = self.confusion.clone().fill_diagonal_(0).flatten()
        order = wrong.argsort(descending=True, stable=True)[:limit].tolist()
        c = len(self.class_names)
        return [(self.class_names[i // c], self.class_names[i % c], int(wrong[i])) for i in order if wrong[i]]
