from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from clipkit.errors import ClipkitError, DataError
from clipkit.metrics.classification import (
    chance,
    confusion,
    hits,
    majority,
    mean_per_class,
    per_class_recall,
    top_k_accuracy,
)


def example(n: int = 200, classes: int = 7, present: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=g), torch.randint(0, present, (n,), generator=g)


def test_hand_worked() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2, 0])
    assert top_k_accuracy(scores, labels) == 0.75
    assert top_k_accuracy(scores, labels, 2) == 1.0
    assert mean_per_class(scores, labels) == pytest.approx(2 / 3)
    assert confusion(scores, labels).tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_scikit_learn(k: int) -> None:
    scores, labels = example()
    theirs = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=np.arange(7))
    assert top_k_accuracy(scores, labels, k) == pytest.approx(theirs)


def test_mean_per_class_is_balanced_accuracy_over_present_classes() -> None:
    scores, labels = example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "y_pred contains classes not in y_true"
        theirs = balanced_accuracy_score(labels.numpy(), scores.argmax(1).numpy())
    assert mean_per_class(scores, labels) == pytest.approx(theirs)
    assert per_class_recall(scores, labels).isnan().tolist() == [False] * 5 + [True] * 2
    assert np.array_equal(confusion(scores, labels), confusion_matrix(labels, scores.argmax(1), labels=range(7)))


def test_constant_scores_are_worth_chance_whatever_the_label() -> None:
    scores = torch.zeros(40, 8)
    for labels in (torch.zeros(40).long(), torch.arange(40) % 8):
        assert top_k_accuracy(scores, labels) == pytest.approx(chance(8))
        assert top_k_accuracy(scores, labels, 5) == pytest.approx(chance(8, 5))
        assert mean_per_class(scores, labels) == pytest.approx(1 / 8)
    # sabotage: argmax gives the tie to class 0 and reports 100 % for an all-zero model
    assert float((scores.argmax(1) == torch.zeros(40)).float().mean()) == 1.0


def test_majority_baseline() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    assert majority(labels, 4) == 0.7
    assert majority(labels, 4, 2) == 0.9
    constant = torch.zeros(10, 4)
    constant[:, 0] = 1
    assert top_k_accuracy(constant, labels) == majority(labels, 4)
    assert mean_per_class(constant, labels) == pytest.approx(1 / 3)


def test_top_k_with_as_many_classes() -> None:
    scores, labels = example(classes=5)
    assert top_k_accuracy(scores, labels, 5) == 1.0
    assert chance(5, 5) == chance(3, 5) == 1.0


def test_bad_input() -> None:
    scores, labels = example()
    scores[3, 2] = math.nan
    with pytest.raises(ClipkitError, match="finite"):
        hits(scores, labels)
    with pytest.raises(DataError, match="row 1"):
        hits(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(DataError, match="nothing to score"):
        hits(torch.zeros(0, 3), torch.zeros(0).long())
    with pytest.raises(ClipkitError, match="labels"):
        hits(torch.zeros(4, 3), torch.zeros(3).long())
