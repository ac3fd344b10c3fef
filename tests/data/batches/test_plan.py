"""The plan: a pure function of (seed, epoch, k)."""

import pickle

import pytest

from clipkit.data.batches.batch import ROW
from clipkit.data.batches.plan import Plan, hash64
from clipkit.errors import UsageError
from clipkit.losses import similarity as similar


def rows(plan, epoch):
    return [draw.row for k in range(plan.steps_per_epoch) for draw in plan.batch(epoch, k)]


@pytest.mark.parametrize(("n", "size"), [(12, 4), (13, 4), (5, 5), (101, 7)])
def test_an_epoch_shows_each_row_at_most_once_and_drops_only_the_rest(n, size):
    plan = Plan([1] * n, batch_size=size)
    for epoch in range(3):
        seen = rows(plan, epoch)
        assert len(seen) == len(set(seen)) == n - n % size
        assert set(seen) <= set(range(n))
    assert rows(plan, 0) != rows(plan, 1)


def test_batches_do_not_depend_on_what_was_asked_before():
    one, two = Plan([1, 2, 3] * 10, batch_size=4, seed=5), Plan([1, 2, 3] * 10, batch_size=4, seed=5)
    backwards = [two.batch(epoch, k) for epoch in (3, 0) for k in (6, 1)]
    assert backwards == [one.batch(3, 6), one.batch(3, 1), one.batch(0, 6), one.batch(0, 1)]
    assert pickle.loads(pickle.dumps(one)).batch(2, 2) == one.batch(2, 2)
    assert Plan([1, 2, 3] * 10, batch_size=4, seed=6).batch(0, 0) != one.batch(0, 0)


def test_all_captions_are_shown_in_turn():
    plan = Plan([5] * 8, batch_size=8)
    shown = {row: [] for row in range(8)}
    for epoch in range(5):
        for draw in plan.batch(epoch, 0):
            shown[draw.row].append(draw.caption)
    assert all(sorted(captions) == [0, 1, 2, 3, 4] for captions in shown.values())
    assert len({tuple(captions) for captions in shown.values()}) > 1  # they do not move in step


def test_augmentation_seeds_differ_by_row_and_epoch():
    plan = Plan([1] * 50, batch_size=50)
    seeds = {draw.seed for epoch in range(4) for draw in plan.batch(epoch, 0)}
    assert len(seeds) == 200


def test_hash64_is_fixed():
    # the plan of a seed must not change between releases: an interrupted run would go on with other batches
    assert hash64(0) == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0
    assert hash64(1, 2) != hash64(2, 1)


@pytest.mark.parametrize(("size", "words"), [(1, "at least 2 pairs"), (11, r"larger than the data \(10 pairs\)")])
def test_impossible_batches_are_refused(size, words):
    with pytest.raises(UsageError, match=words):
        Plan([1] * 10, batch_size=size)


def test_the_loader_and_the_losses_name_the_row_key_alike():
    assert ROW == similar.ROW
