"""Contrastive losses as pure functions of embeddings and affinities.

The value and the gradients are those of one process that holds the whole batch, for any number of ranks: each rank
gives ``W * (its part of the loss of the global batch)`` against the gathered columns, so that DDP's mean over the W
ranks is the loss of the big batch. (A mean over each rank's own rows is not, where ranks hold unequal numbers.)
With `tile`, no matrix of all pairs is ever stored, forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UsageError
from clipkit.losses.pairwise import Known, PairwiseLoss, PairwiseLossFunction
from clipkit.losses.sigmoid import SigmoidLoss
from clipkit.losses.similarity import Keys, Similarity
from clipkit.losses.softmax import InfoNCE

TILE = 1024
"""Rows and columns of one tile by default."""


class Loss(NamedTuple):
    """This rank's share of a loss; the mean over ranks is that of the global batch. Both are 0-dim float32.

    `kl` is the loss minus the entropy of its target: its minimum is 0, whatever counts as similar, while the loss
    itself cannot fall below ln m with m equal positives a row. It carries no gradient.
    """

    loss: Tensor
    kl: Tensor


@dataclass(frozen=True)
class EmbeddedBatch:
    """Embeddings with the keys of their samples.

    Args:
        emb: (n, dim), unit length.
        keys: column -> (n,) or (n, d), what `Similarity.affinity` reads.
        anchor: (n,) bool, false for hard negatives: rows that are only ever a negative; None: all are anchors.
    """

    emb: Tensor
    keys: Keys
    anchor: Tensor | None = None

    def gathered(self) -> EmbeddedBatch:
        """The rows of all ranks; embeddings carry gradient back to their owners."""
        counts = distributed.all_gather_object(len(self.emb))
        anchor = None if self.anchor is None else distributed.gather_rows(self.anchor, counts)
        keys = {name: distributed.gather_rows(values, counts) for name, values in self.keys.items()}
        return EmbeddedBatch(distributed.gather_rows(self.emb, counts), keys, anchor)

    def cut(self, dim: int) -> EmbeddedBatch:
        """The first `dim` dimensions, brought to unit length."""
        return replace(self, emb=F.normalize(self.emb[:, :dim], dim=1))

    def known(self, similar: Similarity) -> Known:
        """The facts about these rows that a pairwise loss needs."""
        weight = None if similar.score is None else self.keys[similar.score]
        return Known(len(self.emb), self.keys, self.anchor, weight)


def info_nce(
    a: EmbeddedBatch,
    b: EmbeddedBatch,
    similar: Similarity,
    scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    tile: int | None = None,
) -> Loss:
    """Symmetric InfoNCE with any number of positives a row: the loss of CLIP.

    ``1/2N * sum_i CE(softmax(scale a_i.B), T_i) + 1/2N * sum_j CE(softmax(scale b_j.A), T'_j)``, where T
    is the affinity normalised per row, and T' per column (Radford et al. 2021, fig. 3, for one
    positive; Khosla et al. 2020, eq. 2, for several). With m exact duplicates of each sample the
    lowest possible value is ln m. Rows without a positive are left out of the mean; with scores it is weighted.
    A side compared with itself leaves each row out of its own columns.

    Inputs: two sides of unit embeddings, (n, dim) and (m, dim), with the keys that `similar` reads.

    When to prefer it: for most training. It needs negatives, so it gains from large batches.

    Relations: `sigmoid_loss` judges every pair by itself and learns a bias besides the scale; `matryoshka` averages
    either loss over shorter embeddings.

    Args:
        a: this rank's rows of the side ``similar.between[0]``, (n, dim).
        b: this rank's rows of the side ``similar.between[1]``, (m, dim).
        similar: what counts as alike.
        scale: 0-dim, exp of the learnt log scale.
        label_smoothing: part of each target that is spread evenly over all that a row is compared with.
        tile: rows and columns that are looked at together, so that memory grows linearly; None: all at once.

    Raises:
        UsageError: `label_smoothing` is not in [0, 1).

    References:
        Radford et al. 2021 (CLIP), figure 3: one positive. Khosla et al. 2020 (SupCon), equation 2: several.
        Chen et al. 2020 (SimCLR): a side compared with itself.

    Example:
        >>> import torch
        >>> from clipkit import Paired, info_nce
        >>> from clipkit.losses.contrastive import EmbeddedBatch
        >>> batch = EmbeddedBatch(torch.eye(4), {"row": torch.arange(4)})  # each image equals its own text
        >>> result = info_nce(batch, batch, Paired(), scale=torch.tensor(10.0))
        >>> round(result.loss.item(), 5)
        0.00014
    """
    return _loss(InfoNCE, a, b, similar, scale, None, label_smoothing, tile)


def sigmoid_loss(
    a: EmbeddedBatch,
    b: EmbeddedBatch,
    similar: Similarity,
    scale: Tensor,
    bias: Tensor,
    *,
    label_smoothing: float = 0.0,
    tile: int | None = None,
) -> Loss:
    """The pairwise sigmoid loss: ``1/N * sum_ij [softplus(z_ij) - y_ij z_ij]``, z = scale a_i.b_j + bias.

    The affinity is the label y (Zhai et al. 2023, eq. 1, for one positive a row: a sum over j, divided by N).
    Hard negatives count against anchors, not against each other. With scores a pair weighs the mean of its two rows'.

    Inputs: two sides of unit embeddings, (n, dim) and (m, dim), with the keys that `similar` reads.

    When to prefer it: for SigLIP models, and where every label should be judged by itself (several may be right).

    Relations: `info_nce` compares a row's pairs with each other, and has no bias.

    Args:
        bias: 0-dim; begins at `prior_bias` where heads are fresh.
        label_smoothing: labels become ``y (1 - label_smoothing) + label_smoothing / 2``.

    The other arguments are those of `info_nce`.

    Raises:
        UsageError: `label_smoothing` is not in [0, 1).

    References:
        Zhai et al. 2023 (SigLIP), equation 1.

    Example:
        >>> import torch
        >>> from clipkit import Paired, sigmoid_loss
        >>> from clipkit.losses.contrastive import EmbeddedBatch
        >>> batch = EmbeddedBatch(torch.eye(4), {"row": torch.arange(4)})
        >>> result = sigmoid_loss(batch, batch, Paired(), scale=torch.tensor(10.0), bias=torch.tensor(-5.0))
        >>> round(result.loss.item(), 4)  # 4 pairs in each row, each ln(1 + exp(-5))
        0.0269
    """
    return _loss(SigmoidLoss, a, b, similar, scale, bias, label_smoothing, tile)


def _loss(
    loss_type: type[PairwiseLoss],
    a: EmbeddedBatch,
    b: EmbeddedBatch,
    similar: Similarity,
    scale: Tensor,
    bias: Tensor | None,
    smoothing: float,
    tile: int | None,
) -> Loss:
    if not 0 <= smoothing < 1:
        raise UsageError(f"label_smoothing lies between 0 and 1; found {smoothing}")
    everyone = b.gathered()
    with torch.autocast(a.emb.device.type, enabled=False):  # bf16 logits near 100 are 0.5 apart
        inputs = (_full(a.emb), _full(everyone.emb), _full(scale), None if bias is None else _full(bias))
        keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        pairs = loss_type(a.known(similar), everyone.known(similar), similar, smoothing, tile, inputs[0].dtype, keep)
        return Loss(*PairwiseLossFunction.apply(*inputs, pairs))


def _full(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def matryoshka(
    loss: Callable[[EmbeddedBatch, EmbeddedBatch], Loss], a: EmbeddedBatch, b: EmbeddedBatch, dims: Sequence[int]
) -> Loss:
    """The mean of a loss over the first d dimensions, for each d: embeddings that can be shortened afterwards.

    Inputs: two sides of unit embeddings, (n, dim) and (m, dim).

    When to prefer it: where an index should be able to store fewer dimensions than the model gives.

    Relations: works on top of `info_nce` or `sigmoid_loss`.

    Args:
        loss: of two sides, such as ``lambda a, b: info_nce(a, b, similar, scale)``.
        a, b: embeddings.
        dims: how many dimensions; each between 1 and all.

    Raises:
        UsageError: a number of dimensions that the embeddings do not have.

    References:
        Kusupati et al. 2022 (Matryoshka Representation Learning).

    Example:
        >>> import torch
        >>> from clipkit import Paired
        >>> batch = EmbeddedBatch(torch.eye(4), {"row": torch.arange(4)})
        >>> result = matryoshka(lambda a, b: info_nce(a, b, Paired(), torch.tensor(10.0)), batch, batch, dims=[4])
        >>> round(result.loss.item(), 5)
        0.00014
    """
    full = a.emb.shape[1]
    for dim in dims:
        if not 1 <= dim <= full:
            raise UsageError(f"matryoshka dimensions lie between 1 and {full}; found {dim}")
    losses = [loss(a, b) if dim == full else loss(a.cut(dim), b.cut(dim)) for dim in dims]
    return Loss(torch.stack([part.loss for part in losses]).mean(), torch.stack([part.kl for part in losses]).mean())


def prior_bias(batch_size: int) -> float:
    """The bias at which a fresh sigmoid model expects one positive in each row of a batch: -ln(B - 1)."""
    return -math.log(max(1, batch_size - 1))
