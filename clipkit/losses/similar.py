"""What "similar" means: the user's decision.

A notion of similarity says how alike two samples are, from keys that the samples carry. Losses,
gathers and the trainer know nothing else about it, so a new notion is one small class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Side = Literal["image", "text"]
Keys = Mapping[str, Tensor]  # column -> (n,), one code a sample


class Similar(Protocol):
    """A notion of similarity.

    Attributes:
        between: the two sides that are compared.
        columns: the key columns that `affinity` reads; the loader codes and carries them.
        weight: factor of this notion's loss where several are added.
    """

    @property
    def between(self) -> tuple[Side, Side]: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def weight(self) -> float: ...

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        """How alike each row is to each column: (r, c) in [0, 1]; -1 where the two are not to be compared."""
        ...


ROW = "row"
"""The key that every sample carries: its row in the data set."""


@dataclass(frozen=True)
class Paired:
    """This text belongs to this image, and to no other (Radford et al. 2021).

    Two captions of one image that meet in a batch both count as its own.

    Args:
        weight: factor of this notion's loss, default 1.
    """

    weight: float = 1.0
    between: tuple[Side, Side] = ("image", "text")
    columns: tuple[str, ...] = (ROW,)

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        return _same(rows[ROW], cols[ROW])


@dataclass(frozen=True)
class SameGroup:
    """Samples that share a value of `column` are alike (Khosla et al. 2020, SupCon; Yang et al. 2022, UniCL).

    All members of a group are positives with equal weight. Missing values (code -1) match only themselves.

    Args:
        column: a column of the data set: a label, a group, any hashable value.
        weight: factor of this notion's loss, default 1.
    """

    column: str
    weight: float = 1.0
    between: tuple[Side, Side] = ("image", "text")

    @property
    def columns(self) -> tuple[str, ...]:
        return (ROW, self.column)

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        ours, theirs = rows[self.column], cols[self.column]
        known = (ours >= 0).unsqueeze(1)
        same = (ours.unsqueeze(1) == theirs.unsqueeze(0)) & known
        return torch.where(same, 1.0, _same(rows[ROW], cols[ROW]))


def _same(rows: Tensor, cols: Tensor) -> Tensor:
    return (rows.unsqueeze(1) == cols.unsqueeze(0)).float()
