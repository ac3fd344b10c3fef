"""Which samples make global batch k.

The plan is a pure function of (seed, epoch, k) and the data: not of the number of ranks or workers,
nor of where a run was interrupted. Nothing about it has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.batches.assignment import Ints, hash64, joined, rng_of
from clipkit.data.batches.no_duplicates import kept_apart
from clipkit.data.batches.samplers import ClassBalancedSampler, PKSampler, Sampler, Shown, ShuffledSampler
from clipkit.errors import UsageError, option

__all__ = ["Draw", "Plan", "hash64"]


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: its row, which of its captions, and the seed of its augmentation."""

    row: int
    caption: int
    seed: int


class Plan:
    """Batches without replacement, one permutation an epoch; a last batch that is not full is dropped.

    A sample with several captions shows another one each time, and all of them in turn.

    Args:
        captions: number of captions of each row.
        batch_size: rows of a global batch.
        seed: any integer.
        distinct: what stands at most once in a batch: column -> (n,) codes, negative for what is never equal; of
            `texts` one code for each caption, those of row 0 first. Where the caption drawn is in the batch already,
            the next one of the row that is not is taken. What finds no place is left out of the epoch; see `left_out`.
        balanced: (n,) classes from 0: every class is shown equally often, rows of rare ones several times an epoch.
        grouped: (n,) groups from 0: batches of groups with `group_size` rows each (PK sampling, Hermans et al. 2017).
        group_size: rows of a group in a batch.

    Raises:
        UsageError: the batch is larger than the data, or smaller than two (its loss would be zero); the data cannot
            give such batches: with figures.
    """

    def __init__(
        self,
        captions: Sequence[int] | NDArray[np.int64],
        *,
        batch_size: int,
        seed: int = 0,
        distinct: Mapping[str, Ints] | None = None,
        balanced: Ints | None = None,
        grouped: Ints | None = None,
        group_size: int = 4,
    ) -> None:
        self.captions = np.asarray(captions, dtype=np.int64)
        self.batch_size, self.seed = batch_size, seed
        if batch_size < 2:
            raise UsageError(
                f"a batch needs at least 2 pairs to have a negative, found batch_size={batch_size}",
                fix=f"raise {option('batch_size')}",
            )
        if batch_size > len(self.captions):
            raise UsageError(
                f"batch_size={batch_size} is larger than the data ({len(self.captions)} pairs)",
                fix=f"{option('batch_size', len(self.captions))} or less, or add data",
            )
        if balanced is not None and grouped is not None:
            raise UsageError("batches are either balanced or grouped", fix="leave out one of the two")
        distinct = distinct or {}
        self.texts = _Texts(self.captions, distinct["texts"]) if "texts" in distinct else None
        n = len(self.captions)
        keys = {name: self._shared(name, values) for name, values in distinct.items()}
        units = joined(list(keys.values()), n)
        self.deck: Sampler
        if balanced is not None:
            self.deck = ClassBalancedSampler(balanced, units, batch_size, strict=bool(keys), rng=rng_of(seed, -1))
        elif grouped is not None:
            self.deck = PKSampler(grouped, units, batch_size, group_size, strict=bool(keys))
        elif keys:
            self.deck = kept_apart(keys, units, batch_size, seed)
        else:
            self.deck = ShuffledSampler(n, batch_size)
        self._order = lru_cache(maxsize=2)(self._epoch)

    @property
    def steps_per_epoch(self) -> int:
        return self.deck.steps

    @property
    def notes(self) -> tuple[str, ...]:
        """In words: how many rows an epoch leaves out, or shows several times."""
        return self.deck.notes

    def shown(self, epoch: int) -> Ints:
        """(n,) how often an epoch shows each row."""
        return np.bincount(self._order(epoch)[0].ravel(), minlength=len(self.captions))

    def left_out(self, epoch: int) -> Ints:
        """The rows that an epoch does not show."""
        return np.flatnonzero(self.shown(epoch) == 0)

    def batch(self, epoch: int, k: int) -> list[Draw]:
        """Global batch `k` of `epoch`, both from 0."""
        order, lap_order = self._order(epoch)
        rows, laps = order[k].tolist(), lap_order[k].tolist()
        turns = [hash64(self.seed, row) + lap for row, lap in zip(rows, laps, strict=True)]
        if self.texts is None:
            captions = [turn % int(self.captions[row]) for row, turn in zip(rows, turns, strict=True)]
        else:
            captions = self.texts.choose(rows, turns)
        seeds = [hash64(self.seed, lap, row) for row, lap in zip(rows, laps, strict=True)]
        return [Draw(row, caption, seed) for row, caption, seed in zip(rows, captions, seeds, strict=True)]

    def _epoch(self, epoch: int) -> Shown:
        return self.deck.epoch(epoch, rng_of(self.seed, epoch))

    def _shared(self, name: str, codes: Ints) -> tuple[Ints, Ints]:
        """Rows and codes of a key; of captions, those of rows that have none to themselves."""
        if name == "texts" and self.texts is not None:
            return self.texts.bound()
        rows = np.flatnonzero(codes >= 0)
        return rows, codes[rows]

    def __getstate__(self) -> dict[str, Any]:  # caches do not cross to workers
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._epoch)


class _Texts:
    """Which captions are equal.

    A row with a caption that no other row has can always show that one, so it need not be kept apart from any. Rows
    without one are *bound*: two that share a caption never meet, and so each may show any of its own.
    """

    def __init__(self, captions: Ints, codes: Ints) -> None:
        self.codes, self.counts = codes, captions
        self.starts = np.cumsum(captions) - captions
        rows = np.repeat(np.arange(len(captions)), captions)
        once = np.unique(codes * len(captions) + rows)  # a row may repeat itself
        self.pairs = np.stack([once // len(captions), once % len(captions)])
        alone = np.bincount(self.pairs[0])[codes] == 1
        self.free = np.zeros(len(captions), dtype=bool)
        self.free[rows[alone]] = True

    def bound(self) -> tuple[Ints, Ints]:
        """Rows and the codes of their captions, each once, of rows that are bound."""
        among = ~self.free[self.pairs[1]]
        return self.pairs[1, among], self.pairs[0, among]

    def choose(self, rows: Sequence[int], turns: Sequence[int]) -> list[int]:
        """A caption for each row, from its turn on, so that none is there twice."""
        chosen, taken = [0] * len(rows), set[int]()
        for i in sorted(range(len(rows)), key=lambda i: bool(self.free[rows[i]])):  # who can give way comes last
            start, count = int(self.starts[rows[i]]), int(self.counts[rows[i]])
            chosen[i] = turns[i] % count
            for more in range(count):
                caption = (turns[i] + more) % count
                if int(self.codes[start + caption]) not in taken:
                    chosen[i] = caption
                    break
            taken.add(int(self.codes[start + chosen[i]]))
        return chosen
