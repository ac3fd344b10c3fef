from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from clipkit.errors import ClipkitError, DataError, UsageError
from clipkit.metrics import ranking
from clipkit.metrics.ranking import Ranks, Relevance, chance, concat, rank, tiles


def one_hot_scores(scores: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings whose products are exactly these scores: the scores themselves against unit vectors."""
    s = torch.tensor(scores)
    return s, torch.eye(s.shape[1])


def brute_hit(scores: np.ndarray, good: np.ndarray, k: int) -> float:
    """Mean hit@k of one query over every order that agrees with the scores (n! orders)."""
    orders = [o for o in itertools.permutations(range(len(scores))) if all(np.diff(scores[list(o)]) <= 0)]
    return float(np.mean([good[list(o[:k])].any() for o in orders]))


def test_hand_worked_matrix() -> None:
    q, x = one_hot_scores([[0.9, 0.1, 0.5], [0.8, 0.2, 0.7], [0.3, 0.6, 0.1]])
    r = rank(q, x, Relevance.by_group([0, 1, 2], [0, 1, 2]), top=2)
    assert r.above.tolist() == [0, 2, 2]
    assert [r.recall_at(k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 1])
    assert r.median_rank() == 3
    assert r.top.tolist() == [[0, 2], [0, 2], [1, 0]]
    assert r.margin.tolist() == pytest.approx([0.4, -0.6, -0.5])


def test_several_positives_and_groups_without_order() -> None:
    q, x = one_hot_scores([[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2]])
    r = rank(q, x, Relevance.by_group([7, -3], [-3, 7, -3, 99]))
    assert r.above.tolist() == [1, 0]
    assert r.positives.tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_ties_equal_the_mean_over_all_orders(seed: int) -> None:
    g = np.random.default_rng(seed)
    scores = g.integers(0, 3, size=(5, 6)).astype(np.float32)
    queries, items = g.integers(0, 3, size=5), np.array([0, 1, 2, 0, 1, 2])
    r = rank(torch.from_numpy(scores), torch.eye(6), Relevance.by_group(queries.tolist(), items.tolist()))
    for k in range(1, 8):
        expected = [brute_hit(s, items == c, k) for s, c in zip(scores, queries, strict=True)]
        assert r.hits(k).tolist() == pytest.approx(expected, abs=1e-12)


def test_expected_rank_under_ties() -> None:
    q, x = one_hot_scores([[1.0, 1.0, 1.0, 2.0]])
    assert rank(q, x, Relevance.by_group([0], [0, 1, 1, 1])).expected_rank().tolist() == [1 + 2.0]
    assert rank(q, x, Relevance.by_group([0], [0, 0, 1, 1])).expected_rank().tolist() == pytest.approx([1 + 4 / 3])


@pytest.mark.parametrize("tile", [2**24, 40, 1])
def test_random_embeddings_equal_numpy(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(ranking, "_TILE", tile)
    g = torch.Generator().manual_seed(0)
    q, x = torch.randn(37, 8, generator=g), torch.randn(53, 8, generator=g)
    a, b = torch.randint(0, 9, (37,), generator=g), torch.randint(0, 9, (53,), generator=g)
    r = rank(q, x, Relevance.by_group(a, b), top=5)
    order = np.argsort(-(q.double() @ x.double().T).numpy(), axis=1, kind="stable")
    first = [int(np.argmax(b.numpy()[o] == c)) for o, c in zip(order, a.tolist(), strict=True)]
    assert r.above.tolist() == first
    assert np.array_equal(r.top.numpy(), order[:, :5])
    assert r.recall_at(5) == pytest.approx(np.mean(np.array(first) < 5))
    assert r.median_rank() == np.median(np.array(first) + 1)


def test_parts_together_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_TILE", 60)
    g = torch.Generator().manual_seed(1)
    q, x, c = torch.randn(23, 4, generator=g), torch.randn(20, 4, generator=g), torch.arange(23) % 20
    relevance = Relevance.by_group(c, torch.arange(20))
    whole = rank(q, x, relevance)
    where = [i for p in range(3) for lo, hi in tiles(23, 20, p, 3) for i in range(lo, hi)]
    assert sorted(where) == list(range(23))
    shared = concat([rank(q, x, relevance, part=p, parts=3) for p in range(3)])
    assert torch.equal(whole.above[where], shared.above)
    assert len(rank(q, x, relevance, part=30, parts=31)) == 0


def test_relevance_need_not_be_an_equivalence() -> None:
    # captions: image 0 has {a, b}, image 1 has {b, c}; b is correct for both images, a only for the first
    r = Relevance.by_keys([frozenset({0}), frozenset({0, 1}), frozenset({1})], [frozenset({0}), frozenset({1})])
    assert r.counts().tolist() == [1, 2, 1]
    row, item = r.positives(1, 3)
    assert list(zip(row.tolist(), item.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_number_that_is_not_finite_is_never_a_score(bad: float, side: int) -> None:
    both = [torch.randn(6, 4), torch.randn(6, 4)]
    both[side][3, 1] = bad
    with pytest.raises(ClipkitError, match="1 of 6") as e:
        rank(both[0], both[1], Relevance.by_group(range(6), range(6)))
    assert e.value.where == ("query 3", "item 3")[side]


def test_constant_embeddings_score_chance_exactly() -> None:
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    relevance = Relevance.by_group(groups, groups)
    v = torch.nn.functional.normalize(torch.randn(1, 64), dim=1).expand(6, 64)
    r = rank(v, v, relevance)
    for k in (1, 2, 5, 10):
        assert r.recall_at(k) == chance(relevance, k)


def test_position_does_not_break_ties_in_big_products() -> None:
    # 997 columns of one vector: a blocked product may round its edges differently
    v = torch.randn(1, 515)
    groups = torch.arange(997)
    r = rank(v.expand(997, 515), v.expand(997, 515).contiguous(), Relevance.by_group(groups, groups))
    assert r.tied.unique().tolist() == [997]
    assert r.recall_at(10) == pytest.approx(10 / 997)


def test_chance_is_hypergeometric() -> None:
    from scipy.stats import hypergeom

    a, b = torch.tensor([0, 1, 2, 2]), torch.tensor([0] * 3 + [1] * 5 + [2] * 12)
    expected = np.mean([1 - hypergeom.pmf(0, 20, p, 7) for p in (3, 5, 12, 12)])
    assert chance(Relevance.by_group(a, b), 7) == pytest.approx(expected, abs=1e-12)
    assert chance(Relevance.by_group([0], [0]), 10) == 1.0


def test_query_without_positive() -> None:
    q, x = one_hot_scores([[1.0, 0.0], [1.0, 0.0]])
    r = rank(q, x, Relevance.by_group([0, 5], [0, 1]))
    with pytest.raises(DataError, match="1 of 2 have none"):
        r.recall_at(1)
    assert r.recall_at(1, missing="skip") == 1.0
    assert r.hits(2).tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match="no query"):
        rank(q, x, Relevance.by_group([7, 5], [0, 1])).median_rank(missing="skip")


def test_k_beyond_the_items_and_below_one() -> None:
    r = rank(torch.eye(2), torch.eye(2), Relevance.by_group([0, 1], [1, 0]))
    assert r.recall_at(50) == 1.0
    with pytest.raises(UsageError):
        r.recall_at(0)


def test_shapes_must_fit() -> None:
    with pytest.raises(ClipkitError, match="one dim"):
        rank(torch.eye(3), torch.eye(2), Relevance.by_group(range(3), range(2)))
    with pytest.raises(ClipkitError, match="relevance is for"):
        rank(torch.eye(3), torch.eye(3), Relevance.by_group(range(2), range(3)))


def test_negative_scores_count_like_any_other() -> None:
    q, x = one_hot_scores([[-3.0, -1.0, -2.0]])
    r = rank(q, x, Relevance.by_group([0], [1, 0, 1]))
    assert r.recall_at(1) == 1.0


def test_a_rank_by_greater_than_alone_would_be_caught() -> None:
    """Sabotage: the optimistic rank (ties count as won) scores a collapsed model as perfect; ours must not."""
    v = torch.ones(50, 4)
    groups = torch.arange(50)
    r = rank(v, v, Relevance.by_group(groups, groups))
    optimistic = Ranks(**{**r.__dict__, "tied": torch.ones_like(r.tied)})
    assert optimistic.recall_at(1) == 1.0
    assert r.recall_at(1) == pytest.approx(0.02)
