"""Dealing: as many full batches as there can be, and nothing that must not meet in one of them."""

import itertools

import numpy as np
import pytest

from clipkit.data.batches.assignment import assign, full_batches, joined, places


def brute(counts, size):
    """The most batches of `size` different units, by trying: take the fullest units first, which is optimal."""
    left, batches = sorted(counts), 0
    while sum(each > 0 for each in left) >= size:
        left = sorted(left[:-size] + [each - 1 for each in left[-size:]])
        batches += 1
    return batches


def test_full_batches_is_the_most_that_any_order_gives():
    for counts in itertools.combinations_with_replacement(range(1, 6), 5):
        for size in (1, 2, 3, 4, 5, 6):
            assert full_batches(np.array(counts), size) == brute(counts, size), (counts, size)


@pytest.mark.parametrize("seed", range(20))
def test_dealt_batches_are_full_and_keep_units_apart(seed):
    rng = np.random.default_rng(seed)
    units = np.unique(rng.zipf(1.4, 300) % 60, return_inverse=True)[1]
    for size in (2, 5, 13):
        steps = full_batches(np.bincount(units), size)
        dealt = assign(units, steps, size, rng)
        assert dealt.shape == (steps, size)
        assert len(np.unique(dealt)) == dealt.size
        assert all(len(np.unique(units[batch])) == size for batch in dealt)


def test_without_units_any_two_rows_meet_equally_often():
    rng, n, size, rounds = np.random.default_rng(0), 12, 4, 4000
    met = np.zeros((n, n))
    for _ in range(rounds):
        for batch in assign(np.arange(n), n // size, size, rng):
            met[np.ix_(batch, batch)] += 1
    rate = met[np.triu_indices(n, 1)] / rounds
    expected = (size - 1) / (n - 1)
    assert abs(rate - expected).max() < 5 * (expected * (1 - expected) / rounds) ** 0.5


def test_rows_that_share_a_value_are_joined_through_each_other():
    one = np.array([0, 1, 2]), np.array([7, 7, 3])
    other = np.array([1, 3, 4, 5]), np.array([0, 0, 1, 1])
    units = joined([one, other], 7)
    assert units[0] == units[1] == units[3]
    assert units[4] == units[5]
    assert len(set(units.tolist())) == 4
    assert set(units.tolist()) == {0, 1, 2, 3}


def test_places_count_within_runs():
    assert places(np.array([4, 4, 1, 4, 4, 4])).tolist() == [0, 1, 0, 0, 1, 2]
    assert places(np.array([], dtype=int)).tolist() == []
