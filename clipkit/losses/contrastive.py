"""Contrastive losses as pure functions of embeddings and affinities.

The value and the gradients are those of one process that holds the whole batch, for any number of
ranks: each rank returns ``W * (sum over its own anchors) / N_global`` against the gathered columns,
so that DDP's mean over the W ranks is the loss of the big batch. (A mean over each rank's own rows
is not, where ranks hold unequal numbers.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.losses.similar import Keys, Similar


@dataclass(frozen=True)
class Embedded:
    """Embeddings with what is known of their samples.

    Args:
        emb: (n, dim), unit length.
        keys: column -> (n,), what `Similar.affinity` reads.
        anchor: (n,) bool, false for rows that are only ever a negative; None: all are anchors.
    """

    emb: Tensor
    keys: Keys
    anchor: Tensor | None = None

    def gathered(self) -> Embedded:
        """The rows of all ranks; embeddings carry gradient back to their owners."""
        anchor = None if self.anchor is None else distributed.gather_rows(self.anchor)
        keys = {name: distributed.gather_rows(values) for name, values in self.keys.items()}
        return Embedded(distributed.gather_rows(self.emb), keys, anchor)

    def anchors(self) -> Tensor:
        """(n,) bool."""
        if self.anchor is None:
            return torch.ones(len(self.emb), dtype=torch.bool, device=self.emb.device)
        return self.anchor


def info_nce(a: Embedded, b: Embedded, similar: Similar, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE with any number of positives a row.

    ``1/2N * sum_i CE(softmax(scale a_i.B), T_i) + 1/2N * sum_j CE(softmax(scale b_j.A), T'_j)``, where T
    is the affinity normalised per row, and T' per column (Radford et al. 2021, fig. 3, for one
    positive; Khosla et al. 2020, eq. 2, for several). With m exact duplicates of each sample the
    lowest possible value is ln m.

    Args:
        a: this rank's rows of one side, (n, dim).
        b: this rank's rows of the other side, (n, dim).
        similar: what counts as alike.
        scale: 0-dim, exp of the learnt log scale.

    Returns:
        0-dim float32: this rank's share, such that the mean over ranks is the loss of the global batch.
    """
    all_a, all_b = a.gathered(), b.gathered()
    with torch.autocast(a.emb.device.type, enabled=False):  # bf16 logits near 100 are 0.5 apart
        a_to_b = _half(a, all_b, similar, scale) / all_a.anchors().sum()
        b_to_a = _half(b, all_a, similar, scale) / all_b.anchors().sum()
    return distributed.world_size() / 2 * (a_to_b + b_to_a)


def _half(rows: Embedded, cols: Embedded, similar: Similar, scale: Tensor) -> Tensor:
    """Sum of the cross-entropies of this rank's anchors against all columns."""
    logits = scale.float() * rows.emb.float() @ cols.emb.float().T  # (r, c)
    affinity = similar.affinity(rows.keys, cols.keys).to(logits)
    logits = logits.masked_fill(affinity < 0, float("-inf"))
    affinity = affinity.clamp(min=0)
    weight = affinity.sum(dim=1)
    positive = torch.where(affinity > 0, affinity * logits, 0).sum(dim=1)  # where: 0 * -inf is NaN
    losses = logits.logsumexp(dim=1) - positive / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return losses[rows.anchors() & (weight > 0)].sum()
