"""The pairwise sigmoid loss over tiles: every pair is a question of its own, so nothing has to be summed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed
from clipkit.losses.pairwise import PairwiseLoss, Take, Tile, widest


@dataclass
class SigmoidLoss(PairwiseLoss):
    """1/N sum_ij [softplus(z_ij) - y_ij z_ij], with the affinity as label y; N is the number of anchors."""

    one_pass: ClassVar[bool] = True

    def measure(
        self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, take: Take | None
    ) -> tuple[Tensor, Tensor]:
        rows, cols = self.rows.weights(scale).sum(), self.cols.weights(scale).sum()
        anchors = (distributed.sum_over_ranks(rows) + cols) / 2
        self.factor = distributed.world_size() / anchors
        value = scale.new_zeros((), dtype=widest(scale))
        floor = value.clone()
        for tile, z, affinity in self.each(a, b, scale, bias):
            label, weight = self._label(affinity), self._weight(tile, z, affinity)
            value += _sum(F.softplus(z) - label * z, weight)
            if self.similar.graded or self.smoothing:
                floor += _sum(torch.special.entr(label) + torch.special.entr(1 - label), weight)
            if take is not None:
                take(tile, self.slope(tile, z, affinity))
        return (self.factor * value).to(scale), (self.factor * (value - floor)).to(scale)

    def slope(self, tile: Tile, logits: Tensor, affinity: Tensor) -> Tensor:
        found = logits.sigmoid().sub_(self._label(affinity).to(logits)).mul_(self.factor)
        weight = self._weight(tile, logits, affinity)
        return found if weight is None else found.mul_(weight)

    def _label(self, affinity: Tensor) -> Tensor:
        label = affinity.clamp(min=0) if self.ignores else affinity
        return label * (1 - self.smoothing) + self.smoothing / 2 if self.smoothing else label

    def _weight(self, tile: Tile, z: Tensor, affinity: Tensor) -> Tensor | None:
        """(r, c): the mean weight of those of the two that are anchors; 0 for what is not compared; None: all 1."""
        plain = all(side.weight is None and side.anchor is None for side in (self.rows, self.cols))
        if plain:
            return (affinity >= 0).to(z) if self.ignores else None
        r, c = tile
        rows, cols = self.rows.weights(z)[r].unsqueeze(1), self.cols.weights(z)[c]
        anchors = self.rows.anchors(z)[r].unsqueeze(1) + self.cols.anchors(z)[c]
        return (rows + cols).div_(anchors.clamp(min=1)).mul_(affinity >= 0)


def _sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return (values if weight is None else values * weight).sum()
