"""All pairs of two sides, tile by tile, with gradients that are computed again instead of stored.

A loss over pairs is a function of the logits z = scale * a @ b.T (+ bias). Whatever it is, its gradient needs dz alone:
da = scale * dz @ b, db = scale * dz.T @ a, dscale = sum(a * (dz @ b)), dbias = sum(dz). So a loss here is two methods,
its value and dz of a tile; gathers, tiles and the rest of the chain rule are written once, for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.losses.similarity import ROW, Keys, Similarity, target

Tile = tuple[slice, slice]

Accumulate = Callable[[Tile, Tensor], None]  # of a tile and its dz


@dataclass(frozen=True)
class Known:
    """Facts about the rows of one side: keys, (n,) bool anchors (None: all), (n,) weights (None: all 1)."""

    count: int
    keys: Keys
    anchor: Tensor | None
    weight: Tensor | None

    def anchors(self, like: Tensor) -> Tensor:
        """(n,): 1 for anchors, 0 for rows that are only ever a negative."""
        return like.new_ones(self.count) if self.anchor is None else self.anchor.to(like)

    def weights(self, like: Tensor) -> Tensor:
        """(n,): the weight of each row, 0 for those that are not anchors."""
        anchors = self.anchors(like)
        return anchors if self.weight is None else torch.where(anchors > 0, self.weight.to(like), 0)


@dataclass
class PairwiseLoss(ABC):
    """A loss over all pairs of this rank's rows and all ranks' columns.

    Args:
        rows: this rank's.
        cols: all ranks'.
        similar: what counts as alike.
        smoothing: part of the target that is spread over everything.
        tile: rows and columns that are looked at together; None: all.
        dtype: of the logits; afterwards of the affinity, if that is wider.
        keep: whether there will be a backward pass; logits and target are kept for it where all fit into one tile.
    """

    rows: Known
    cols: Known
    similar: Similarity
    smoothing: float
    tile: int | None
    dtype: torch.dtype
    keep: bool

    one_pass: ClassVar[bool] = False
    """Whether dz of a tile needs no sums over the others: gradients are then made beside the value."""

    def __post_init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._start = distributed.rows_before(self.rows.count) if self.similar.same_modality else None
        one = _cut(self.cols.keys, slice(0, 1))
        self.dtype = torch.promote_types(target(self.similar, one, one).dtype, self.dtype)
        self.has_ignored = False  # whether any pair is not compared: known once `forward` has seen every tile
        self.measured = False  # whether `forward` has seen every tile

    @abstractmethod
    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, accumulate: Accumulate | None
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the loss, and of what the loss lies above its floor.

        With `one_pass`, the dz of each tile is given to `accumulate`, where there is one.
        """

    @abstractmethod
    def dlogits(self, tile: Tile, logits: Tensor, affinity: Tensor) -> Tensor:
        """dz of a tile, (r, c), of W times the loss of the global batch."""

    def tiles(self) -> Iterator[Tile]:
        size = self.tile or max(self.rows.count, self.cols.count, 1)
        for r in range(0, self.rows.count, size):
            for c in range(0, self.cols.count, size):
                yield slice(r, min(r + size, self.rows.count)), slice(c, min(c + size, self.cols.count))

    def iter_tiles(
        self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """Every tile with its logits and its affinity."""
        for tile in self.tiles():
            if self._kept is not None:
                yield tile, *self._kept
                return
            rows, cols = tile
            logits = (scale * a[rows]) @ b[cols].T
            logits = logits if bias is None else logits.add_(bias)
            affinity = self.affinity(tile)
            if not self.measured:
                self.has_ignored = self.has_ignored or bool(affinity.min() < 0)
            if self.keep and not self.one_pass and logits.shape == (self.rows.count, self.cols.count):
                self._kept = logits, affinity
            yield tile, logits, affinity

    def affinity(self, tile: Tile) -> Tensor:
        """(r, c): the target before it is normalised, -1 where a pair is not compared."""
        rows, cols = tile
        row_keys, col_keys = _cut(self.rows.keys, rows), _cut(self.cols.keys, cols)
        affinity = target(self.similar, row_keys, col_keys, self._hard_negative(tile)).to(self.dtype)
        if self._start is not None:  # nothing is compared with itself
            first = self._start + rows.start
            shared = range(max(first, cols.start), min(first + len(affinity), cols.stop))
            if shared:
                at = torch.arange(shared.start, shared.stop, device=affinity.device)
                affinity = affinity.index_put((at - first, at - cols.start), affinity.new_tensor(-1.0))
        return affinity

    def _hard_negative(self, tile: Tile) -> Tensor | None:
        if self.rows.anchor is None and self.cols.anchor is None:
            return None
        like = self.cols.keys[ROW]
        rows, cols = (side.anchors(like)[part] for side, part in zip((self.rows, self.cols), tile, strict=True))
        return (rows.unsqueeze(1) * cols.unsqueeze(0)) == 0

    def forget(self) -> None:
        """Free the kept logits and affinity."""
        self._kept = None


def sum_dtype(like: Tensor) -> torch.dtype:
    """The dtype of sums over tiles: float64, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _cut(keys: Keys, part: slice) -> Keys:
    return {name: values[part] for name, values in keys.items()}


class Gradients:
    """The gradients of a, b, scale and bias, summed over tiles."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.a, self.b, self.scale, self.bias = a, b, scale, bias
        self.da, self.db = torch.zeros_like(a), torch.zeros_like(b)
        self.dbias = torch.zeros_like(scale, dtype=sum_dtype(scale))

    def accumulate(self, tile: Tile, dz: Tensor) -> None:
        rows, cols = tile
        self.da[rows].addmm_(dz, self.b[cols])
        self.db[cols].addmm_(dz.T, self.a[rows])
        if self.bias is not None:
            self.dbias += dz.sum()

    def finish(self, grad: Tensor, size: int) -> tuple[Tensor | None, ...]:
        """The gradients of a, b, scale and bias, times `grad`; in place, so only once."""
        dscale = torch.zeros_like(self.dbias)
        for ours, theirs in zip(torch.split(self.a, size), torch.split(self.da, size), strict=True):
            dscale += (ours * theirs).sum(dtype=dscale.dtype)
        self.da.mul_(self.scale * grad)
        self.db.mul_(self.scale * grad)
        dbias = None if self.bias is None else (self.dbias * grad).to(self.bias)
        return self.da, self.db, (dscale * grad).to(self.scale), dbias


class PairwiseLossFunction(torch.autograd.Function):
    """The value of a `PairwiseLoss`, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, pairs: PairwiseLoss
    ) -> tuple[Tensor, Tensor]:
        ctx.pairs = pairs
        ctx.save_for_backward(a, b, scale, bias)
        ctx.gradients = Gradients(a, b, scale, bias) if pairs.keep and pairs.one_pass else None
        value, above = pairs.forward(a, b, scale, bias, None if ctx.gradients is None else ctx.gradients.accumulate)
        pairs.measured = True
        ctx.mark_non_differentiable(above)
        return value, above

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pairs, gradients = ctx.pairs, ctx.gradients
        ctx.gradients = None  # a second backward pass makes its own
        if gradients is None:
            gradients = Gradients(*ctx.saved_tensors)
            with torch.autocast(gradients.a.device.type, enabled=False):
                for tile, logits, affinity in pairs.iter_tiles(*ctx.saved_tensors):
                    gradients.accumulate(tile, pairs.dlogits(tile, logits, affinity))
        pairs.forget()
        return *gradients.finish(grads[0], pairs.tile or len(gradients.a) or 1), None
