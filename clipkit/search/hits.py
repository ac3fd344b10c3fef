"""The rows of an index nearest to queries, and what a search returns of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipkit.search.matrix import Matrix
from clipkit.search.presence import FilePresence

_QUERIES = 256  # at once: their scores with a tile take 64 MiB


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


def find_hits(queries: Tensor, matrix: Matrix, k: int, files: FilePresence) -> list[list[Hit]]:
    """Return the k best hits of each query, best first; of equal scores, the first in the index.

    Args:
        queries: (queries, dim), unit length.
        matrix: the embeddings to search.
        k: how many; all if there are fewer.
        files: the images; missing files are left out if it requires files, and the next ones take their place.

    Raises:
        CorruptArtefact: a tile of the matrix is damaged.
    """
    scores, rows = nearest(queries, matrix, k)
    files.add(rows.flatten().tolist())
    hits = []
    for query, (query_rows, query_scores) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True)):
        scored_rows = list(zip(query_rows, query_scores, strict=True))
        if files.required:
            scored_rows = _with_file(scored_rows, queries[query : query + 1], matrix, k, files)
        hits.append(
            [
                Hit(files.path(row), score, rank, missing=not files.exists(row))
                for rank, (row, score) in enumerate(scored_rows, start=1)
            ]
        )
    return hits


def _with_file(
    scored_rows: list[tuple[int, float]], query: Tensor, matrix: Matrix, k: int, files: FilePresence
) -> list[tuple[int, float]]:
    """The k nearest rows whose file exists: looks at twice as many rows until there are enough."""
    reach = k
    existing = [(row, score) for row, score in scored_rows if files.exists(row)]
    while len(existing) < min(k, len(matrix)) and reach < len(matrix):
        reach = min(2 * reach, len(matrix))
        scores, rows = nearest(query, matrix, reach)
        files.add(rows[0].tolist())
        candidates = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        existing = [(row, score) for row, score in candidates if files.exists(row)]
    return existing[:k]


def nearest(queries: Tensor, matrix: Matrix, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and rows of the k nearest, best first; of equal scores, the first row.

    Args:
        queries: (queries, dim), unit length.
        matrix: the embeddings to search.
        k: how many; all if there are fewer.

    Returns:
        (queries, k) float32 cosine similarities, and (queries, k) int64 rows.

    Raises:
        CorruptArtefact: a tile of the matrix is damaged.
    """
    results = [_nearest(chunk, matrix, k) for chunk in torch.split(queries, _QUERIES)]
    if not results:
        return torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64)
    scores, rows = zip(*results, strict=True)
    return torch.cat(scores), torch.cat(rows)


def _nearest(queries: Tensor, matrix: Matrix, k: int) -> tuple[Tensor, Tensor]:
    best_scores = [torch.zeros(len(queries), 0)]
    best_rows = [torch.zeros(len(queries), 0, dtype=torch.int64)]
    for first_row, tile in matrix.tiles():
        scores, rows = highest(queries @ tile.T, k)
        best_scores.append(scores)
        best_rows.append(rows + first_row)
    # tiles come in the order of their rows, and a stable sort keeps it among equal scores
    scores, order = torch.cat(best_scores, dim=1).sort(dim=1, descending=True, stable=True)
    rows = torch.cat(best_rows, dim=1).gather(1, order)
    return scores[:, :k], rows[:, :k]


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of each row and their columns, best first; of equal ones the first.

    Args:
        scores: (queries, columns).
        k: how many; all if there are fewer.
    """
    if k >= scores.shape[1]:
        values, columns = scores.sort(dim=1, descending=True, stable=True)
        return values, columns
    values, columns = scores.topk(k + 1)
    ties = (values[:, k - 1] == values[:, k]).nonzero().flatten()  # topk may then have left out an earlier column
    columns = columns[:, :k].sort(dim=1).values
    for query in ties.tolist():
        candidates = (scores[query] >= values[query, k - 1]).nonzero().flatten()
        order = scores[query, candidates].argsort(descending=True, stable=True)[:k]
        columns[query] = candidates[order].sort().values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
