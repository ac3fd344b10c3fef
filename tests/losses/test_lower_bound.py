"""The floor against hand-worked cases, and against the best that an optimiser finds over shared logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses import lower_bound as floor
from clipkit.losses.lower_bound import info_nce_floor, sigmoid_floor, whole_items


def tiles(affinity: Tensor) -> floor.Affinity:
    return lambda rows, cols: affinity[rows][:, cols]


def best(
    affinity: Tensor,
    row_item: Tensor,
    col_item: Tensor,
    sigmoid: bool = False,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> float:
    """The least loss over free logits of each two items."""
    free = torch.zeros(int(row_item.max()) + 1, int(col_item.max()) + 1, dtype=torch.float64, requires_grad=True)
    free_back = torch.zeros_like(free, requires_grad=True)  # the two directions have their own least
    optimizer = torch.optim.LBFGS([free, free_back], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    value = torch.tensor(0.0)

    scores = torch.ones(len(affinity)).double() if weight is None else weight

    def one(weights: Tensor, logits: Tensor) -> Tensor:
        kept = weights.clamp(min=0).sum(1) > 0
        target = weights.clamp(min=0)[kept] / weights.clamp(min=0)[kept].sum(1, keepdim=True)
        even = (weights >= 0)[kept] / (weights >= 0)[kept].sum(1, keepdim=True)
        target = (1 - smoothing) * target + smoothing * even
        each = F.cross_entropy(logits.masked_fill(weights < 0, -1e9)[kept], target, reduction="none")
        return (scores[kept] * each).sum() / scores[kept].sum()

    def closure() -> Tensor:
        nonlocal value
        optimizer.zero_grad()
        z, back = free[row_item][:, col_item], free_back[row_item][:, col_item]
        if sigmoid:
            label = affinity.clamp(min=0) * (1 - smoothing) + smoothing / 2
            each = F.binary_cross_entropy_with_logits(z, label, reduction="none")
            each = each * (scores[:, None] + scores) / 2
            value = each[affinity >= 0].sum() / scores.sum()
        else:
            value = (one(affinity, z) + one(affinity.T, back.T)) / 2
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return float(value.detach())


def test_one_caption_on_m_images_is_ln_m() -> None:
    images, texts = torch.arange(12), torch.arange(12) // 4
    assert info_nce_floor(tiles(torch.eye(12)), images, texts) == pytest.approx(math.log(4))
    group = (texts[:, None] == texts[None]).float()
    assert info_nce_floor(tiles(group), images, texts) == pytest.approx(math.log(4))  # the entropy of four positives
    assert info_nce_floor(tiles(torch.eye(12)), images, images) == 0


def test_duplicates_that_are_not_compared_cost_nothing() -> None:
    images, texts = torch.arange(6), torch.tensor([0, 0, 0, 1, 2, 3])
    affinity = torch.eye(6)
    affinity[:3, :3] = -1
    affinity.fill_diagonal_(1)
    assert info_nce_floor(tiles(affinity), images, texts) == 0


@pytest.mark.parametrize("kind", ["paired", "group", "graded", "both sides"])
def test_no_logits_do_better(kind: str) -> None:
    torch.manual_seed(0)
    images, texts = torch.randint(0, 6, (9,)), torch.randint(0, 5, (9,))
    if kind != "both sides":
        images = torch.arange(9)
    group = torch.randint(0, 3, (9,))
    affinity = {"group": (group[:, None] == group[None]).double(), "graded": torch.rand(9, 9).double()}.get(
        kind, torch.eye(9).double()
    )
    assert info_nce_floor(tiles(affinity), images, texts) == pytest.approx(best(affinity, images, texts), abs=1e-5)
    assert sigmoid_floor(tiles(affinity), images, texts) == pytest.approx(best(affinity, images, texts, True), abs=1e-5)


@pytest.mark.parametrize(("smoothing", "scored"), [(0.1, False), (0.0, True), (0.2, True)])
def test_smoothing_and_scores_have_their_own_floor(smoothing: float, scored: bool) -> None:
    torch.manual_seed(3)
    images, texts, affinity = torch.arange(9), torch.randint(0, 5, (9,)), torch.eye(9).double()
    weight = torch.rand(9).double() if scored else None
    for floor_of, sigmoid in ((info_nce_floor, False), (sigmoid_floor, True)):
        found = floor_of(tiles(affinity), images, texts, smoothing=smoothing, weight=weight)
        assert found == pytest.approx(best(affinity, images, texts, sigmoid, smoothing, weight), abs=1e-5)


def test_left_out_entries_give_a_bound() -> None:
    torch.manual_seed(1)
    images, texts = torch.randint(0, 6, (9,)), torch.randint(0, 5, (9,))
    affinity = torch.where(torch.rand(9, 9) < 0.2, -1.0, torch.eye(9)).double()
    affinity.fill_diagonal_(1)
    floor, found = info_nce_floor(tiles(affinity), images, texts), best(affinity, images, texts)
    assert 0.5 * found < floor <= found + 1e-6
    assert sigmoid_floor(tiles(affinity), images, texts) == pytest.approx(best(affinity, images, texts, True), abs=1e-5)


def test_parts_never_cut_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    images, texts = torch.randint(0, 30, (100,)), torch.randint(0, 40, (100,))
    whole = info_nce_floor(tiles(torch.eye(100)), images, texts), sigmoid_floor(tiles(torch.eye(100)), images, texts)
    monkeypatch.setattr(floor, "_ROWS", 7)
    parts = list(whole_items(images))
    assert len(parts) > 5
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(100))
    assert info_nce_floor(tiles(torch.eye(100)), images, texts) == pytest.approx(whole[0], abs=1e-12)
    assert sigmoid_floor(tiles(torch.eye(100)), images, texts) == pytest.approx(whole[1], abs=1e-12)
