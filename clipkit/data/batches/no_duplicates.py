"""Keeping equal things apart: by dealing where that shows nearly all rows, else by placing them one by one.

Dealing (see `dealing`) keeps apart whatever is joined, even through others: A and C, where A shares a caption with B
and B an image with C. It is fast, and no order gives more batches where one key alone joins rows. Long chains make it
give up rows that need not be: then each row goes to the first batch with room that holds none of its values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from clipkit.data.batches.assignment import Ints, full_batches, rng_of
from clipkit.data.batches.samplers import LEAST, NoDuplicatesSampler, Sampler, Shown
from clipkit.errors import UsageError, option

_LOOKS = 64  # at batches a row, so that an epoch takes time in proportion to its rows; a row that fits nowhere waits
_TRIES = 20
Key = tuple[Ints, Ints]


"""Rows, and the code that stands in each; a row may be there several times with different codes, or never."""


def kept_apart(keys: Mapping[str, Key], units: Ints, size: int, seed: int) -> Sampler:
    """The deck in which no batch holds a value of a key twice.

    Args:
        keys: by column.
        units: (n,) of `joined`, by these keys.
        size: of a batch.
        seed: of the plan.

    Raises:
        UsageError: an epoch could show less than half of the rows.
    """
    n = len(units)
    most = min((full_batches(_counts(rows, codes, n), size) for rows, codes in keys.values()), default=n // size)
    sampler: Sampler = NoDuplicatesSampler(units, size)
    if sampler.steps < 0.95 * most and len(_shared(keys)[0]):
        placed = Placed(keys, n, size, most, seed)
        if placed.steps > sampler.steps:
            sampler = placed
    if sampler.steps * size < LEAST * n:
        raise _impossible(keys, units, size, sampler.steps)
    return sampler


class Placed:
    """Each row in the first batch with room that holds none of its values; batches that stay short are left out.

    How many are full differs a little by epoch. `steps` is the least of three that were tried; an epoch that gives
    fewer is placed anew, and should that fail 20 times, shows its first batches again.

    Args:
        keys: by column.
        n: number of rows.
        size: of a batch.
        most: batches there can be.
        seed: of the plan.
    """

    def __init__(self, keys: Mapping[str, Key], n: int, size: int, most: int, seed: int) -> None:
        self.n, self.size, self.most = n, size, most
        rows, values = _shared(keys)
        self.values = [part.tolist() for part in np.split(values, np.searchsorted(rows, np.arange(1, n)))]
        self.steps = len(self._place(rng_of(seed, -2, 0)))
        if self.steps * size >= LEAST * n:  # else it is refused
            self.steps = min(self.steps, *(len(self._place(rng_of(seed, -2, trial))) for trial in (1, 2)))
        left = n - self.steps * size
        self.notes = (f"distinct: {left:,} of {n:,} rows are left out an epoch",)

    def epoch(self, number: int, rng: np.random.Generator) -> Shown:
        batches: list[list[int]] = []
        for _ in range(_TRIES):
            batches = max(batches, self._place(rng), key=len)
            if len(batches) >= self.steps:
                break
        rows = np.array(batches, dtype=np.int64)[np.arange(self.steps) % len(batches)]
        return rows, np.full_like(rows, number)

    def _place(self, rng: np.random.Generator) -> list[list[int]]:
        """The full batches, in random order."""
        batches: list[list[int]] = [[] for _ in range(self.most)]
        after = list(range(self.most + 1))  # itself while there is room, else a later one
        used: set[tuple[int, int]] = set()
        start: dict[int, int] = {}  # value -> before this every batch is full or holds it

        def room(at: int) -> int:
            while after[at] != at:
                after[at] = at = after[after[at]]
            return at

        for row in rng.permutation(self.n).tolist():
            values = self.values[row]
            at = room(max((start.get(value, 0) for value in values), default=0))
            looks = _LOOKS
            while looks and at < self.most and any((value, at) in used for value in values):
                at, looks = room(at + 1), looks - 1
            if not looks or at == self.most:
                continue
            for value in values:
                used.add((value, at))
                if room(start.get(value, 0)) == at:
                    start[value] = at + 1
            batches[at].append(row)
            if len(batches[at]) == self.size:
                after[at] = at + 1
        full = [batch for batch in batches if len(batch) == self.size]
        return [full[i] for i in rng.permutation(len(full))]


def _counts(rows: Ints, codes: Ints, n: int) -> Ints:
    """How many rows each value has, of rows with just one; the others count as if nothing were equal to them."""
    single = np.bincount(rows, minlength=n)[rows] == 1
    counts = np.bincount(codes[single]) if single.any() else np.zeros(0, dtype=np.int64)
    return np.concatenate([counts[counts > 0], np.ones(n - int(single.sum()), dtype=np.int64)])


def _shared(keys: Mapping[str, Key]) -> Key:
    """Rows in order, and their values that other rows have too, numbered over all keys."""
    rows, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    start = 0
    for rows_of_key, codes in keys.values():
        shared = np.bincount(codes)[codes] > 1 if len(codes) else np.zeros(0, dtype=bool)
        rows.append(rows_of_key[shared])
        values.append(codes[shared] + start)
        start += int(codes.max(initial=-1)) + 1
    row, value = np.concatenate(rows), np.concatenate(values)
    order = np.argsort(row, kind="stable")
    return row[order], value[order]


def _impossible(keys: Mapping[str, Key], units: Ints, size: int, steps: int) -> UsageError:
    n, counts = len(units), np.bincount(units)
    often = {name: np.bincount(codes, minlength=1) for name, (_, codes) in keys.items()}
    column = max(often, key=lambda name: int(often[name].max()))
    rows, codes = keys[column]
    row = int(rows[codes == often[column].argmax()].min(initial=n))
    sizes = [size // 2**halved for halved in range(1, size.bit_length() - 1)]
    possible = [smaller for smaller in sizes if full_batches(counts, smaller) * smaller >= LEAST * n]
    python = f'known={{"{column}": "positive"}}'
    lower = f"{option('batch_size', possible[0])}, or " if possible else ""
    alike = option("similar", f"[{{known: {{{column}: positive}}}}]", python=python)
    return UsageError(
        f"batches of {size} without a repeated {' or '.join(f'`{key}`' for key in keys)} can show {steps * size:,} of "
        f"{n:,} rows an epoch: one value of `{column}` stands in {often[column].max():,} rows, and a batch takes one",
        where=f"distinct, row {row}: {column}",
        fix=f"{lower}leave out repeated rows, or take {column!r} from {option('distinct')} and let what is equal "
        f"count as alike: {alike}",
    )
