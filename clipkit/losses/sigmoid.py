"""The pairwise sigmoid loss over tiles: every pair stands for itself, so nothing has to be summed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed
from clipkit.losses.pairwise import Accumulate, PairwiseLoss, Tile, sum_dtype


@dataclass
class SigmoidLoss(PairwiseLoss):
    """The loss behind `sigmoid_loss`, tile by tile.

    1/N sum_ij [softplus(z_ij) - y_ij z_ij], with the affinity as label y; N is the number of anchors.

    Inputs: logits and affinity of a tile, (r, c) each.
    When to prefer it: call `sigmoid_loss`, which makes and runs one of these.
    Relations: `InfoNCE` first needs the sums of whole rows and columns, and so a second pass for its gradients.
    Args: as for `PairwiseLoss`.
    References: Zhai et al. 2023, equation 1.
    """

    one_pass: ClassVar[bool] = True

    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, accumulate: Accumulate | None
    ) -> tuple[Tensor, Tensor]:
        rows, cols = self.rows.weights(scale).sum(), self.cols.weights(scale).sum()
        anchors = (distributed.sum_over_ranks(rows) + cols) / 2
        self.factor = distributed.world_size() / anchors
        value = scale.new_zeros((), dtype=sum_dtype(scale))
        floor = value.clone()
        for tile, z, affinity in self.iter_tiles(a, b, scale, bias):
            label, weight = self._label(affinity), self._weight(tile, z, affinity)
            value += _sum(F.softplus(z) - label * z, weight)
            if self.similar.graded or self.smoothing:
                floor += _sum(torch.special.entr(label) + torch.special.entr(1 - label), weight)
            if accumulate is not None:
                accumulate(tile, self.dlogits(tile, z, affinity))
        return (self.factor * value).to(scale), (self.factor * (value - floor)).to(scale)

    def dlogits(self, tile: Tile, logits: Tensor, affinity: Tensor) -> Tensor:
        dz = logits.sigmoid().sub_(self._label(affinity).to(logits)).mul_(self.factor)
        weight = self._weight(tile, logits, affinity)
        return dz if weight is None else dz.mul_(weight)

    def _label(self, affinity: Tensor) -> Tensor:
        label = affinity.clamp(min=0) if self.has_ignored else affinity
        return label * (1 - self.smoothing) + self.smoothing / 2 if self.smoothing else label

    def _weight(self, tile: Tile, z: Tensor, affinity: Tensor) -> Tensor | None:
        """(r, c): the mean weight of those of the two that are anchors; 0 for what is not compared; None: all 1."""
        plain = all(side.weight is None and side.anchor is None for side in (self.rows, self.cols))
        if plain:
            return (affinity >= 0).to(z) if self.has_ignored else None
        r, c = tile
        rows, cols = self.rows.weights(z)[r].unsqueeze(1), self.cols.weights(z)[c]
        anchors = self.rows.anchors(z)[r].unsqueeze(1) + self.cols.anchors(z)[c]
        return (rows + cols).div_(anchors.clamp(min=1)).mul_(affinity >= 0)


def _sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return (values if weight is None else values * weight).sum()
