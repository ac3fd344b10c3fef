"""Placing rows one by one, where chains of equal things would make dealing give up most of them."""

import pickle
from collections import Counter

import numpy as np
import pytest

from clipkit.data.batches.assignment import full_batches
from clipkit.data.batches.build_plan import build_plan
from clipkit.data.batches.no_duplicates import Placed
from clipkit.data.batches.samplers import NoDuplicatesSampler


def chained(n, seed=0):
    """Every title stands beside several products and every product beside several titles: all are joined."""
    rng = np.random.default_rng(seed)
    return [{"texts": [f"title {rng.integers(n // 6)}"], "product": f"p{rng.integers(n // 6)}"} for _ in range(n)]


@pytest.mark.parametrize(("n", "size"), [(120, 8), (300, 10), (1000, 64)])
def test_chains_do_not_make_it_give_up(n, size):
    for seed in range(3):
        source = chained(n, seed)
        plan = build_plan(source, batch_size=size, seed=seed, distinct=["texts", "product"])
        assert isinstance(plan.deck, Placed)  # dealing would find no batch at all: everything is one unit
        assert plan.steps_per_epoch >= 0.8 * (n // size)
        again = pickle.loads(pickle.dumps(plan))
        for epoch in range(4):
            seen = Counter()
            for k in range(plan.steps_per_epoch):
                draws = plan.batch(epoch, k)
                assert again.batch(epoch, k) == draws
                assert len({source[draw.row]["texts"][0] for draw in draws}) == size
                assert len({source[draw.row]["product"] for draw in draws}) == size
                seen.update(draw.row for draw in draws)
            assert max(seen.values()) == 1
            assert set(plan.left_out(epoch)) == set(range(n)) - set(seen)
        assert (sum(plan.shown(epoch) for epoch in range(12)) > 0).all()


def test_a_plan_that_forgets_what_a_batch_holds_repeats_itself():
    source = chained(300)
    plan = build_plan(source, batch_size=10, distinct=["texts", "product"])
    plan.deck.values = [[] for _ in source]
    titles = [{source[draw.row]["product"] for draw in plan.batch(0, k)} for k in range(plan.steps_per_epoch)]
    assert min(map(len, titles)) < 10


def test_one_key_is_dealt_and_as_many_batches_as_there_can_be():
    source = chained(300)
    plan = build_plan(source, batch_size=10, distinct=["product"])
    assert isinstance(plan.deck, NoDuplicatesSampler)
    assert plan.steps_per_epoch == full_batches(np.array(list(Counter(r["product"] for r in source).values())), 10)


def test_an_epoch_that_comes_out_short_shows_a_batch_again_rather_than_fail(monkeypatch):
    source = chained(300)
    plan = build_plan(source, batch_size=10, distinct=["texts", "product"])
    whole = Placed._place
    tried = []
    monkeypatch.setattr(Placed, "_place", lambda self, rng: tried.append(1) or whole(self, rng)[: self.steps - 2])
    batches = [[draw.row for draw in plan.batch(7, k)] for k in range(plan.steps_per_epoch)]
    assert len(tried) == 20
    assert batches[-2:] == batches[:2]
    assert plan.shown(7).max() == 2
