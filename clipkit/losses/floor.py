"""How low a contrastive loss can get, whatever the model: equal images and equal texts have equal embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce_floor(affinity: Tensor, row_item: Tensor, col_item: Tensor) -> float:
    """The least that symmetric InfoNCE can be, in nats: the mean of the least of its two directions.

    Rows that are the same item share their logits, and so do columns. For one direction, with T the affinity
    normalised per row, items rho of rows and c of columns, n_c the size of c and M = sum of T over rho and c:

        1/N * sum over (rho, c) of M(rho, c) * [ln n_c - ln (M(rho, c) / sum over c of M(rho, c))]

    which is the cross-entropy of the mean target of equal rows, plus ln n_c for columns that cannot be told apart.
    One caption on m images: ln m. Where entries are left uncompared (-1), each row
    is bounded alone: a floor that may lie a little low.

    Args:
        affinity: (r, c) in [0, 1], -1 where two are not compared, as `similar.target` gives it.
        row_item, col_item: (r,) and (c,), one number for each distinct image or text.
    """
    directions = [(affinity, row_item, col_item), (affinity.T, col_item, row_item)]
    return sum(_direction(*each) for each in directions) / 2


def _direction(affinity: Tensor, row_item: Tensor, col_item: Tensor) -> float:
    weight = affinity.clamp(min=0).double()
    mass = weight.sum(1)
    kept = mass > 0  # rows without a positive take no part
    target = weight[kept] / mass[kept, None]
    compared = affinity[kept] >= 0
    items, col = torch.unique(col_item, return_inverse=True)
    by_item = _sum_columns(target, col, len(items))
    if not compared.all():
        room = _sum_columns(compared.double(), col, len(items))
        return float(
            (torch.special.xlogy(by_item, room.clamp(min=1)) - torch.special.xlogy(by_item, by_item)).sum()
        ) / len(target)
    groups, row = torch.unique(row_item[kept], return_inverse=True)
    joint = torch.zeros(len(groups), len(items), dtype=torch.float64).index_add_(0, row, by_item)
    room = torch.bincount(col, minlength=len(items)).double()
    share = joint / joint.sum(1, keepdim=True)
    return float((torch.special.xlogy(joint, room.expand_as(joint)) - torch.special.xlogy(joint, share)).sum()) / len(
        target
    )


def sigmoid_floor(affinity: Tensor, row_item: Tensor, col_item: Tensor) -> float:
    """The least that the pairwise sigmoid loss can be, in nats: exact.

    Pairs of the same two items share one logit: with p of them called alike and q not, they cost at least
    ``-p ln (p / (p + q)) - q ln (q / (p + q))`` together; the sum is divided by the number of rows.

    Args:
        affinity: (r, c) in [0, 1], the label; -1 where two are not compared.
        row_item, col_item: as in `info_nce_floor`.
    """
    (rows, row), (cols, col) = (torch.unique(each, return_inverse=True) for each in (row_item, col_item))
    alike, all_pairs = torch.zeros(2, len(rows), len(cols), dtype=torch.float64)
    alike.index_add_(0, row, _sum_columns(affinity.clamp(min=0).double(), col, len(cols)))
    all_pairs.index_add_(0, row, _sum_columns((affinity >= 0).double(), col, len(cols)))
    other = all_pairs - alike
    costs = (torch.special.xlogy(part, part / all_pairs.clamp(min=1)) for part in (alike, other))
    return -float(sum(each.sum() for each in costs)) / len(affinity)


def _sum_columns(values: Tensor, col: Tensor, count: int) -> Tensor:
    """(r, c) to (r, count): the sums over columns of the same item."""
    return torch.zeros(len(values), count, dtype=torch.float64).index_add_(1, col, values)
