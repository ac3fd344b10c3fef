"""How low a contrastive loss can get, whatever the model: equal images and equal texts have equal embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Affinity = Callable[[Tensor, Tensor], Tensor]  # positions of rows (r,) and of columns (c,) -> (r, c)

_ROWS = 1024  # at once


def info_nce_floor(
    affinity: Affinity,
    row_item: Tensor,
    col_item: Tensor,
    *,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> float:
    """The least that symmetric InfoNCE can be, in nats: the mean of the least of its two directions.

    Rows that are the same item share their logits, and so do columns. For one direction, with T the affinity
    normalised per row, items rho of rows and c of columns, n_c the size of c and M = sum of T over rho and c:

        1/N * sum over (rho, c) of M(rho, c) * [ln n_c - ln (M(rho, c) / sum over c of M(rho, c))]

    which is the cross-entropy of the mean target of equal rows, plus ln n_c for columns that cannot be told apart.
    One caption on m images: ln m. Where entries are left uncompared (-1), each row
    is bounded alone: a floor that may lie a little low.

    Args:
        affinity: of rows and columns by their positions, in [0, 1]; -1 where two are not compared.
        row_item, col_item: (r,) and (c,), one number for each distinct image or text.
        smoothing: the label smoothing of the loss.
        weight: (r,) the scores of samples, where rows and columns are the same ones; None: all weigh the same.
    """
    forth = _direction(affinity, row_item, col_item, smoothing, weight)
    back = _direction(lambda rows, cols: affinity(cols, rows).T, col_item, row_item, smoothing, weight)
    return (forth + back) / 2


def _direction(
    affinity: Affinity, row_item: Tensor, col_item: Tensor, smoothing: float, weight: Tensor | None
) -> float:
    total = 0.0
    count = 0.0
    items, col = torch.unique(col_item, return_inverse=True)
    everyone = torch.arange(len(col_item))
    for rows in whole_items(row_item):
        affinities = affinity(rows, everyone)
        positive = affinities.clamp(min=0).double()
        kept = positive.sum(1) > 0  # rows without a positive take no part
        positive, compared = positive[kept], affinities[kept] >= 0
        target = (1 - smoothing) * positive / positive.sum(1, keepdim=True)
        target += smoothing * compared / compared.sum(1, keepdim=True)
        if weight is not None:
            target = target * weight[rows][kept].double().unsqueeze(1)
        total += _bound(target, compared, row_item[rows][kept], col, len(items))
        count += float(target.sum())
    return total / max(count, 1e-300)


def _bound(target: Tensor, compared: Tensor, row_item: Tensor, col: Tensor, items: int) -> float:
    by_item = _sum_columns(target, col, items)
    if compared.all():
        _, row = torch.unique(row_item, return_inverse=True)
        by_item = torch.zeros(int(row.max()) + 1 if len(row) else 0, items).double().index_add_(0, row, by_item)
        room = torch.bincount(col, minlength=items).double().expand_as(by_item)
    else:
        room = _sum_columns(compared.double(), col, items).clamp(min=1)
    share = (by_item / by_item.sum(1, keepdim=True)).nan_to_num()  # of a row that weighs nothing
    return float((torch.special.xlogy(by_item, room) - torch.special.xlogy(by_item, share)).sum())


def sigmoid_floor(
    affinity: Affinity,
    row_item: Tensor,
    col_item: Tensor,
    *,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> float:
    """The least that the pairwise sigmoid loss can be, in nats: exact.

    Pairs of the same two items share one logit: with p of them called alike and q not, they cost at least
    ``-p ln (p / (p + q)) - q ln (q / (p + q))`` together; the sum is divided by the number of rows.

    Args:
        affinity: as in `info_nce_floor`, read as labels.
        row_item, col_item, smoothing, weight: as in `info_nce_floor`; a pair weighs the mean of its two samples.
    """
    total = 0.0
    row_weight = torch.ones(len(row_item), dtype=torch.float64) if weight is None else weight.double()
    col_weight = 1 if weight is None else row_weight  # with scores, rows and columns are the same samples
    items, col = torch.unique(col_item, return_inverse=True)
    everyone = torch.arange(len(col_item))
    for rows in whole_items(row_item):
        affinities = affinity(rows, everyone)
        pair = (row_weight[rows].unsqueeze(1) + col_weight) / 2
        pair = pair * (affinities >= 0)  # a pair that is not compared weighs nothing
        label = pair * (affinities.clamp(min=0).double() * (1 - smoothing) + smoothing / 2)
        _, row = torch.unique(row_item[rows], return_inverse=True)
        alike, all_pairs = torch.zeros(2, int(row.max()) + 1, len(items), dtype=torch.float64)
        alike.index_add_(0, row, _sum_columns(label, col, len(items)))
        all_pairs.index_add_(0, row, _sum_columns(pair, col, len(items)))
        for part in (alike, all_pairs - alike):
            total -= float(torch.special.xlogy(part, (part / all_pairs).nan_to_num()).sum())
    return total / max(float(row_weight.sum()), 1e-300)


def whole_items(item: Tensor) -> Iterator[Tensor]:
    """Positions in parts of about a thousand, where no item is in two parts."""
    order = item.argsort(stable=True)
    ends = torch.cat([torch.nonzero(item[order].diff()).flatten() + 1, torch.tensor([len(item)])])
    start = 0
    for end in ends.tolist():
        if end - start >= _ROWS or end == len(item):
            yield order[start:end]
            start = end


def _sum_columns(values: Tensor, col: Tensor, count: int) -> Tensor:
    """(r, c) to (r, count): the sums over columns of the same item."""
    return torch.zeros(len(values), count, dtype=torch.float64).index_add_(1, col, values)
