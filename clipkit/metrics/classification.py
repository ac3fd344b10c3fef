"""Classification metrics from scores, with the baselines that make them readable.

A top-k accuracy is the exact expectation under random tie-breaking (see `ranking`): taking the first of equal scores
would hand every tie to the class with the lowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.errors import ClipkitError, DataError, UsageError
from clipkit.metrics.ranking import Ranks, require_finite


def hits(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """(n,) float64: the probability that the true class is among the k best-scored ones.

    Args:
        scores: (n, classes), any monotone score; logits rather than probabilities, which saturate into ties.
        labels: (n,) long, class indices.
        k: from 1.

    Raises:
        ClipkitError: a score is not finite, or shapes do not fit.
        DataError: a label is outside the classes.
    """
    _check(scores, labels)
    true_score = scores.gather(1, labels[:, None])
    above = (scores > true_score).sum(1)
    tied = (scores == true_score).sum(1)
    one = torch.ones(len(labels), dtype=torch.long)  # the true class is the only positive
    no_top = scores[:, :0]
    return Ranks(above, tied, one, one, true_score[:, 0], no_top.long(), no_top).hits(k)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose true class is among the k best, in [0, 1]. Arguments and errors as for `hits`."""
    return float(hits(scores, labels, k).mean())


def per_class_recall(scores: Tensor, labels: Tensor) -> Tensor:
    """(classes,) float64: top-1 accuracy within each class; NaN for a class that no label names."""
    return recall_of_hits(hits(scores, labels), labels, scores.shape[1])


def recall_of_hits(hit: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`per_class_recall` from what `hits` gives, for scores that were never in memory at once."""
    counts = torch.bincount(labels, minlength=classes)
    right = torch.zeros(classes, dtype=torch.float64).scatter_add(0, labels, hit)
    return right / torch.where(counts > 0, counts, torch.nan)


def mean_per_class(scores: Tensor, labels: Tensor) -> float:
    """Mean of the recalls of the classes that are present (scikit-learn's balanced accuracy), in [0, 1]."""
    return float(per_class_recall(scores, labels).nanmean())


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes) long: rows are true classes, columns predicted ones (first of equal scores)."""
    _check(scores, labels)
    return confusion_of(scores.argmax(1), labels, scores.shape[1])


def confusion_of(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`confusion` from the predicted classes."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def chance(classes: int, k: int = 1) -> float:
    """Top-k accuracy of guessing at random among ``classes``."""
    if classes < 1 or k < 1:
        raise UsageError(f"expected at least one class and k >= 1, found {classes} and {k}")
    return min(1.0, k / classes)


def majority(labels: Tensor, classes: int, k: int = 1) -> float:
    """Top-k accuracy of always naming the k most frequent classes of these very labels."""
    counts = torch.bincount(labels, minlength=classes).sort(descending=True).values
    return int(counts[:k].sum()) / len(labels)


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ClipkitError(
            f"scores must be (n, classes) and labels (n,), found {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not len(labels):
        raise DataError("there is nothing to score: no labelled row")
    if int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
        bad = ((labels < 0) | (labels >= scores.shape[1])).nonzero().flatten()
        raise DataError(
            f"a label must be one of the {scores.shape[1]} classes; {len(bad)} rows are not, "
            f"the first has {int(labels[bad[0]])}",
            where=f"row {int(bad[0])}",
        )
    require_finite(scores, "score")
