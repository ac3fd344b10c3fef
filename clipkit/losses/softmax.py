"""Symmetric InfoNCE over tiles: running sums of rows and columns, then dz from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.losses.pairwise import Accumulate, PairwiseLoss, Tile, sum_dtype

_MASS, _PULL, _OWN, _Z, _COUNT = range(5)


@dataclass
class RunningSums:
    """Of each row (or column), over all that it is compared with. float64: errors of many tiles would add up.

    Args:
        lse: (n,) log of the sum of exp z.
        sums: (5, n): of the affinity a, of a * z, of a * ln a, of z, and the number.
    """

    lse: Tensor
    sums: Tensor

    def add(self, part: slice, axis: int, z: Tensor, parts: dict[int, Tensor]) -> None:
        """Add a tile, where `axis` is the one to sum over, and z is -inf for what is not compared."""
        self.lse[part] = torch.logaddexp(self.lse[part], z.logsumexp(axis))
        for at, values in parts.items():
            self.sums[at, part] += values.sum(axis)

    def finish(self, weight: Tensor, total: Tensor, smoothing: float) -> None:
        """Fix each one's part of the loss, once all is summed: `weight` / `total` where there is a positive."""
        mass, count = self.sums[_MASS].clamp(min=torch.finfo(self.sums.dtype).tiny), self.sums[_COUNT].clamp(min=1)
        self.coefficient = weight / total
        self.lse = self.lse.nan_to_num(neginf=0.0)
        self.cross_entropy = self.lse - (1 - smoothing) * self.sums[_PULL] / mass - smoothing * self.sums[_Z] / count
        self.shift = self.lse - self.coefficient.log()  # exp(z - shift) = coefficient * softmax
        self.pull = (1 - smoothing) * self.coefficient / mass
        self.spread = smoothing * self.coefficient / count

    def share(self, values: Tensor) -> Tensor:
        return torch.where(self.coefficient > 0, self.coefficient * values, 0).sum()


@dataclass
class InfoNCE(PairwiseLoss):
    """The loss behind `info_nce`, tile by tile.

    1/2 [mean over rows of CE(softmax(z_i), T_i) + mean over columns of CE(softmax(z_.j), T'_j)].
    T is the affinity divided by its sum over a row, T' over a column. Rows without a positive are left out of the mean.
    One pass serves both directions: this rank's rows are complete, columns are summed over ranks.

    Inputs: logits and affinity of a tile, (r, c) each.
    When to prefer it: call `info_nce`, which makes and runs one of these.
    Relations: `SigmoidLoss` needs no sums over other tiles, so it makes its gradients in the first pass.
    Args: as for `PairwiseLoss`.
    References: Radford et al. 2021, figure 3; Khosla et al. 2020, equation 2.
    """

    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, accumulate: Accumulate | None
    ) -> tuple[Tensor, Tensor]:
        self.row, self.col = self._sum_up(a, b, scale, bias)
        self.col.lse = _logsumexp_over_ranks(self.col.lse)
        self.col.sums = distributed.sum_over_ranks(self.col.sums)
        weights = [
            known.weights(side.sums) * (side.sums[_MASS] > 0)
            for known, side in ((self.rows, self.row), (self.cols, self.col))
        ]
        totals = distributed.sum_over_ranks(weights[0].sum()), weights[1].sum()
        world = distributed.world_size()
        for side, weight, total in zip((self.row, self.col), weights, totals, strict=True):
            side.finish(weight * world / 2, total.clamp(min=torch.finfo(total.dtype).tiny), self.smoothing)
        value = self.row.share(self.row.cross_entropy) + self.col.share(self.col.cross_entropy) / world
        entropies = self._smoothed_entropies() if self.smoothing else (_entropy(self.row), _entropy(self.col))
        floor = self.row.share(entropies[0]) + self.col.share(entropies[1]) / world
        return value.to(scale), (value - floor).to(scale)

    def dlogits(self, tile: Tile, logits: Tensor, affinity: Tensor) -> Tensor:
        r, c = tile
        ignored = affinity < 0 if self.has_ignored else None
        if ignored is not None:
            logits, affinity = logits.masked_fill(ignored, -torch.inf), affinity.clamp(min=0)
        dz = (logits - self.row.shift[r].to(logits).unsqueeze(1)).exp_()
        dz += (logits - self.col.shift[c].to(logits)).exp_()
        dz -= (self.row.pull[r].to(affinity).unsqueeze(1) + self.col.pull[c].to(affinity)).mul_(affinity)
        if self.smoothing:
            spread = self.row.spread[r].to(logits).unsqueeze(1) + self.col.spread[c].to(logits)
            dz -= spread if ignored is None else spread.masked_fill_(ignored, 0)
        return dz

    def _sum_up(self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[RunningSums, RunningSums]:
        sides = [
            RunningSums(
                scale.new_full((n,), -torch.inf, dtype=sum_dtype(scale)),
                scale.new_zeros((5, n), dtype=sum_dtype(scale)),
            )
            for n in (self.rows.count, self.cols.count)
        ]
        for tile, z, affinity in self.iter_tiles(a, b, scale, bias):
            ignored = affinity < 0 if self.has_ignored else None
            affinity = affinity if ignored is None else affinity.clamp(min=0)
            parts = {_MASS: affinity, _PULL: affinity * z}
            if self.similar.graded:
                parts[_OWN] = torch.xlogy(affinity, affinity)
            if self.smoothing:
                seen = torch.ones_like(z) if ignored is None else (~ignored).to(z)
                parts |= {_Z: z * seen, _COUNT: seen}
            z = z if ignored is None else z.masked_fill(ignored, -torch.inf)
            for side, part, axis in zip(sides, tile, (1, 0), strict=True):
                side.add(part, axis, z, parts)
        return sides[0], sides[1]

    def _smoothed_entropies(self) -> tuple[Tensor, Tensor]:
        """(n,), (N,): entropies of the targets that label smoothing makes; its own pass, for it needs their sums."""
        rows, cols = torch.zeros_like(self.row.sums[0]), torch.zeros_like(self.col.sums[0])
        for r, c in self.tiles():
            affinity = self.affinity((r, c))
            for entropy, side, part, axis in ((rows, self.row, r, 1), (cols, self.col, c, 0)):
                mass, count = side.sums[_MASS, part].unsqueeze(axis), side.sums[_COUNT, part].unsqueeze(axis)
                target = (1 - self.smoothing) * affinity.clamp(min=0) / mass + self.smoothing / count
                entropy[part] += torch.special.entr(target.masked_fill(affinity < 0, 0)).nan_to_num().sum(axis)
        return rows, distributed.sum_over_ranks(cols)


def _entropy(side: RunningSums) -> Tensor:
    mass = side.sums[_MASS].clamp(min=torch.finfo(side.sums.dtype).tiny)
    return mass.log() - side.sums[_OWN] / mass


def _logsumexp_over_ranks(lse: Tensor) -> Tensor:
    if distributed.world_size() == 1:
        return lse
    highest = distributed.max_over_ranks(lse)
    safe = highest.nan_to_num(neginf=0.0)
    return safe + distributed.sum_over_ranks((lse - safe).exp()).log()
