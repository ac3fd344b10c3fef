"""The orders in which an epoch can show its rows: shuffled, with equal things apart, balanced by class, in groups.

Each has `steps`, the full batches of every epoch, `notes` in words, and `epoch(number, rng)`: rows and laps, both
(steps, batch). A lap counts how often a row was shown before (where each is shown once an epoch: the epoch).
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np

from clipkit.data.batches.assignment import Ints, assign, full_batches, places
from clipkit.errors import UsageError, option

Shown: TypeAlias = tuple[Ints, Ints]
LEAST = 0.5  # of the rows an epoch has to show: a demand that leaves out more than it trains on is taken for an error


class Sampler(Protocol):
    steps: int

    @property
    def notes(self) -> tuple[str, ...]: ...

    def epoch(self, number: int, rng: np.random.Generator) -> Shown: ...


class ShuffledSampler:
    """Each row once an epoch; a last batch that is not full is dropped."""

    def __init__(self, n: int, size: int) -> None:
        self.n, self.size, self.steps = n, size, n // size
        left = f"{n % size:,} of {n:,} rows are left out an epoch, others each time: they fill no batch"
        self.notes = (left,) if n % size else ()

    def epoch(self, number: int, rng: np.random.Generator) -> Shown:
        rows = rng.permutation(self.n)[: self.steps * self.size].reshape(self.steps, self.size)
        return rows, np.full_like(rows, number)


class NoDuplicatesSampler:
    """Each row at most once an epoch, and none in a batch with another row of its unit.

    Args:
        units: (n,) from 0.
        size: of a batch.
    """

    def __init__(self, units: Ints, size: int) -> None:
        self.units, self.size = units, size
        self.steps = full_batches(np.bincount(units), size)
        left = len(units) - self.steps * size
        self.notes = (f"distinct: {left:,} of {len(units):,} rows are left out an epoch",)

    def epoch(self, number: int, rng: np.random.Generator) -> Shown:
        rows = assign(self.units, self.steps, self.size, rng)
        return rows, np.full_like(rows, number)


class ClassBalancedSampler:
    """Every class equally often: its rows in turn, over and over; spread evenly over an epoch's batches.

    Up to the end of any epoch two classes were shown equally often, and two rows of a class too, but for one time.

    Args:
        classes: (n,) from 0.
        units: (n,) from 0, rows that must not meet; without any, each row is its own.
        size: of a batch.
        strict: whether a unit that cannot be kept apart is an error.
        rng: the order of the rows of a class.

    Raises:
        UsageError: `strict`, and a unit has rows of two classes or would have to meet itself.
    """

    def __init__(self, classes: Ints, units: Ints, size: int, *, strict: bool, rng: np.random.Generator) -> None:
        self.size, self.steps, self.classes, self.units = size, len(classes) // size, classes, units
        self.counts = np.bincount(classes)
        order = rng.permutation(len(classes))
        self.order = order[np.argsort(classes[order], kind="stable")]  # rows by class
        self.starts = np.cumsum(self.counts) - self.counts
        most = -(-self.steps * size // len(self.counts))  # draws of a class an epoch
        if strict:
            _nested(units, classes, "balanced")
            sizes = np.bincount(units)
            inner = np.zeros_like(sizes)
            inner[units] = self.counts[classes]
            drawn = np.minimum(most, sizes * -(-most // inner))
            if (worst := int(drawn.argmax())) >= 0 and drawn[worst] > self.steps:
                raise UsageError(
                    f"balanced batches show {sizes[worst]:,} rows that share a value of `distinct` up to "
                    f"{drawn[worst]:,} times an epoch, which has {self.steps:,} batches of {size}: they would meet",
                    where=f"row {int(np.flatnonzero(units == worst)[0])}",
                    fix=f"{option('batch_size', len(self.counts))} (the number of classes) or less, or leave out "
                    f"{option('distinct')}",
                )
        rare, common = int(self.counts.min()), int(self.counts.max())
        often = self.steps * size / len(self.counts)
        again = -(-most // rare) > self.steps
        left = int(np.maximum(0, self.counts - self._draws(0)[1] + self._draws(0)[0]).sum())
        self.notes = (
            f"balanced: {len(self.counts):,} classes of {rare:,} to {common:,} rows; an epoch shows each row of the "
            f"rarest {often / rare:.3g} times, of the commonest {often / common:.3g} times"
            + (f", and leaves out {left:,} of {len(classes):,} rows, others each time" if left else "")
            + ("; rows of the rarest meet themselves in a batch" if again else ""),
        )

    def epoch(self, number: int, rng: np.random.Generator) -> Shown:
        before, after = self._draws(number)
        classes = np.repeat(np.arange(len(self.counts)), after - before)
        turn = before[classes] + places(classes)
        rows = self.order[self.starts[classes] + turn % self.counts[classes]]
        at = assign(self.units[rows], self.steps, self.size, rng, strata=classes)
        return rows[at], (turn // self.counts[classes])[at]

    def _draws(self, number: int) -> tuple[Ints, Ints]:
        """How many rows of each class were shown before an epoch, and after it."""
        total = self.steps * self.size
        classes = np.arange(len(self.counts))
        # sum over c < C of floor((x + c) / C) is x (Hermite), so the classes' turns always add up
        before = (number * total + classes) // len(classes)
        after = ((number + 1) * total + classes) // len(classes)
        return before, after


class PKSampler:
    """Batches of P groups with K rows each (PK sampling, Hermans et al. 2017), each row at most once an epoch.

    Args:
        groups: (n,) from 0.
        units: (n,) from 0, rows that must not meet; without any, each row is its own.
        size: of a batch, P K.
        group_size: K.
        strict: whether there are units of several rows.

    Raises:
        UsageError: `size` is not a multiple of K; a unit has rows of two groups; an epoch could show less than half of
            the rows.
    """

    def __init__(self, groups: Ints, units: Ints, size: int, group_size: int, *, strict: bool) -> None:
        self.groups, self.units, self.size, self.group_size = groups, units, size, group_size
        n = len(groups)
        if group_size < 2 or size % group_size:
            raise UsageError(
                f"grouped batches hold P groups of group_size rows, at least 2; found batch_size={size}, "
                f"group_size={group_size}",
                fix=f"a {option('batch_size')} that is a multiple of {option('group_size')}",
            )
        counts = np.bincount(groups)
        self.chunks = counts // group_size
        if strict:
            _nested(units, groups, "grouped")
            order = np.argsort(groups, kind="stable")
            parts = np.split(units[order], np.cumsum(counts)[:-1])
            inner = [np.unique(part, return_counts=True)[1] for part in parts]
            self.chunks = np.array([full_batches(sizes, group_size) for sizes in inner])
        self.steps = full_batches(self.chunks, size // group_size)
        small = int(counts[self.chunks == 0].sum())
        if self.steps * size < LEAST * n:
            raise UsageError(
                f"batches of {size // group_size} groups with {group_size} rows each can show {self.steps * size:,} of "
                f"{n:,} rows an epoch: {np.count_nonzero(self.chunks):,} groups have that many rows that may meet, "
                f"{small:,} rows are of smaller ones, and the largest group has {counts.max():,}",
                where="grouped",
                fix=f"lower {option('batch_size')} or {option('group_size')}, or leave out the rows of small groups",
            )
        self.notes = (
            f"grouped: {np.count_nonzero(self.chunks):,} groups; {n - self.steps * size:,} of {n:,} rows are left out "
            f"an epoch, {small:,} of them always, for their group has fewer than {group_size}",
        )

    def epoch(self, number: int, rng: np.random.Generator) -> Shown:
        order = rng.permutation(len(self.groups))
        rank = rng.permutation(int(self.units.max()) + 1)[self.units[order]]
        order = order[np.lexsort((rank, self.groups[order]))]  # by group, in it by unit
        order = order[places(self.units[order]) < self.chunks[self.groups[order]]]
        groups = self.groups[order]
        place, chunks = places(groups), self.chunks[groups]
        kept = place < chunks * self.group_size
        order, groups, place, chunks = order[kept], groups[kept], place[kept], chunks[kept]
        first = (np.cumsum(self.chunks) - self.chunks)[groups]
        chunk = np.argsort(first + place % chunks, kind="stable").reshape(-1, self.group_size)
        chosen = assign(groups[chunk[:, 0]], self.steps, self.size // self.group_size, rng)
        rows = order[chunk[chosen]].reshape(self.steps, self.size)
        return rows, np.full_like(rows, number)


def _nested(units: Ints, outer: Ints, name: str) -> None:
    """Raises UsageError where rows that must not meet are of two classes or groups."""
    first = np.zeros(int(units.max()) + 1, dtype=np.int64)
    first[units[::-1]] = np.arange(len(units))[::-1]
    wrong = np.flatnonzero(outer != outer[first[units]])
    if wrong.size:
        row = int(wrong[0])
        raise UsageError(
            f"`distinct` with `{name}` needs equal things to be of one class or group; rows {first[units[row]]} and "
            f"{row} are not, but share a value",
            where=f"row {row}",
            fix=f"leave out `distinct` or `{name}`, or fix the column",
        )
