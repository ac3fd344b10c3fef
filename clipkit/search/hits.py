"""The images nearest to a query, out of its scores with all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from clipkit.search.presence import FilePresence


@dataclass(frozen=True)
class Hit:
    """One image that a search returned.

    Attributes:
        path: the image, where it was when the index was built or last updated.
        score: cosine similarity with the query, in [-1, 1]. Between a text and an image a good match may have 0.25;
            scores of text queries and of image queries cannot be compared.
        rank: from 1.
        missing: whether the file no longer exists; such hits are returned only on request.
    """

    path: Path
    score: float
    rank: int
    missing: bool = False


def nearest(scores: Tensor, k: int, files: FilePresence) -> list[Hit]:
    """Return the k best hits, best first; of equal scores, the first in the index.

    Args:
        scores: (images,) cosine similarities with the query.
        k: how many; all if there are fewer.
        files: the images; those whose file is missing are passed over if it requires files.
    """
    k = min(k, len(scores))
    rows = highest_rows(scores, k)
    if files.required:
        rows = _rows_with_file(rows, scores, k, files)
    return [
        Hit(files.paths[row], float(scores[row]), rank, missing=not files.exists(row))
        for rank, row in enumerate(rows, start=1)
    ]


def _rows_with_file(rows: list[int], scores: Tensor, k: int, files: FilePresence) -> list[int]:
    """The k highest rows whose file exists: looks at twice as many rows until there are enough."""
    reach = k
    existing = [row for row in rows if files.exists(row)]
    while len(existing) < k and reach < len(scores):
        reach = min(2 * reach, len(scores))
        existing = [row for row in highest_rows(scores, reach) if files.exists(row)]
    return existing[:k]


def highest_rows(scores: Tensor, k: int) -> list[int]:
    """Return the rows of the k highest scores, best first; of equal ones the first."""
    if k == 0:
        return []
    lowest_of_best = scores.topk(k).values[-1]
    candidates = (scores >= lowest_of_best).nonzero().flatten()  # more than k where scores are equal
    order: list[int] = candidates[scores[candidates].argsort(descending=True, stable=True)][:k].tolist()
    return order
