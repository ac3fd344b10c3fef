"""Dealing rows into batches as cards are dealt: what must not meet lies together in the deck, and so goes to different
hands.

A deck is cut into *units*; no two rows of a unit may meet in a batch. With S batches of B rows, a unit of m rows gives
at most min(m, S) of them, and S full batches exist if and only if the sum of these is at least S B: dealt one by one
to the S batches in turn, any S rows that follow each other go to S different batches. All of it is O(n log n) in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_MASK = (1 << 64) - 1


def hash64(*numbers: int) -> int:
    """A well-mixed 64-bit number of some integers (splitmix64, Steele et al. 2014, chained)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def rng_of(*numbers: int) -> np.random.Generator:
    """Randomness that is a function of some integers."""
    return np.random.Generator(np.random.Philox(hash64(*numbers)))


def joined(keys: Sequence[tuple[Ints, Ints]], n: int) -> Ints:
    """(n,) the unit of each row: rows that share a value of a key are in one, and so are their neighbours in turn.

    Args:
        keys: of each key, rows and the code that stands there, both (m,); a row may be there several times, or never.
        n: number of rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, values = [], []
    start = n
    for rows_of_key, codes in keys:
        rows.append(rows_of_key)
        values.append(codes + start)
        start += int(codes.max(initial=-1)) + 1
    one, other = np.concatenate([*rows, []]).astype(np.int64), np.concatenate([*values, []]).astype(np.int64)
    graph = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(start, start))
    units: Ints = connected_components(graph, directed=False)[1][:n].astype(np.int64)
    return np.unique(units, return_inverse=True)[1]


def full_batches(counts: Ints, size: int) -> int:
    """The greatest S for which units of these many rows fill S batches of `size` rows, each of other units."""
    low, high = 0, int(counts.sum()) // size
    while low < high:  # S size - sum(min(m, S)) is convex and 0 at S = 0, so what is possible is an interval
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= middle * size:
            low = middle
        else:
            high = middle - 1
    return low


def assign(units: Ints, steps: int, size: int, rng: np.random.Generator, strata: Ints | None = None) -> Ints:
    """(steps, size) indices into `units`, of which no two in a row have the same unit.

    Args:
        units: (n,), from 0.
        steps, size: of batches; `full_batches` says how many there can be.
        rng: which rows are taken, and who meets whom.
        strata: (n,) what is to be spread evenly over the batches; all rows are then dealt, and units are apart only
            while none has more than `steps` rows.
    """
    order = rng.permutation(len(units))
    rank = rng.permutation(int(units.max()) + 1)[units[order]]
    if strata is None:
        order = order[np.argsort(rank, kind="stable")]
        order = order[places(units[order]) < steps]
    else:
        outer = rng.permutation(int(strata.max()) + 1)[strata[order]]
        order = order[np.lexsort((rank, outer))]
    return order[: steps * size].reshape(size, steps).T[rng.permutation(steps)]


def places(runs: NDArray[np.generic]) -> Ints:
    """(n,) the place of each entry within its run of equal entries, from 0."""
    starts = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]]))
    return np.arange(len(runs)) - np.repeat(starts, np.diff(np.append(starts, len(runs))))
