"""Which samples make global batch k.

The plan is a pure function of (seed, epoch, k) and the data: not of the number of ranks or workers,
nor of where a run was interrupted. Nothing about it has to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import UsageError

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


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: its row, which of its captions, and the seed of its augmentation."""

    row: int
    caption: int
    seed: int


class Plan:
    """Batches without replacement, one permutation an epoch; a last batch that is not full is dropped.

    A sample with several captions shows another one each epoch, and all of them in turn.

    Args:
        captions: number of captions of each row.
        batch_size: rows of a global batch.
        seed: any integer.

    Raises:
        UsageError: the batch is larger than the data, or smaller than two (its loss would be zero).
    """

    def __init__(self, captions: Sequence[int] | NDArray[np.int64], *, batch_size: int, seed: int = 0) -> None:
        self.captions = np.asarray(captions, dtype=np.int64)
        self.batch_size, self.seed = batch_size, seed
        if batch_size < 2:
            raise UsageError(
                f"a batch needs at least 2 pairs to have a negative, found batch_size={batch_size}",
                fix="raise batch_size",
            )
        if batch_size > len(self.captions):
            raise UsageError(
                f"batch_size={batch_size} is larger than the data ({len(self.captions)} pairs)",
                fix=f"set batch_size to at most {len(self.captions)}, or add data",
            )
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.captions) // self.batch_size

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.Philox(hash64(self.seed, epoch))).permutation(len(self.captions))

    def batch(self, epoch: int, k: int) -> list[Draw]:
        """Global batch `k` of `epoch`, both from 0."""
        rows = self._order(epoch)[k * self.batch_size : (k + 1) * self.batch_size]
        return [self._draw(epoch, int(row)) for row in rows]

    def _draw(self, epoch: int, row: int) -> Draw:
        turn = hash64(self.seed, row) + epoch
        return Draw(row, turn % int(self.captions[row]), hash64(self.seed, epoch, row))

    def __getstate__(self) -> dict[str, object]:  # caches do not cross to workers
        return {"captions": self.captions, "batch_size": self.batch_size, "seed": self.seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._permutation)
