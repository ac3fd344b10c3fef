"""Ranking metrics from embeddings, exact under ties and without the full score matrix.

A query's *positives* are the items that count as correct. Its hit@k (what the CLIP papers call recall@k) is 1 if at
least one positive is among the k best-scored items. Scores tie in practice (duplicate images, truncated captions,
collapsed models), and every library breaks ties in its own way; here a tied hit@k is its exact expectation under random
tie-breaking, so that embeddings which are all alike score chance, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from clipkit.errors import ClipkitError, DataError, UsageError
from clipkit.metrics.codes import assign_codes

_TILE = 2**24  # scores held at once: 64 MiB of float32, and as much again in comparisons


@dataclass(frozen=True)
class Relevance:
    """Which items are correct for which query. Build one with `by_group` or `by_keys`.

    Attributes:
        code: (queries,) long; queries of one code share their positives.
        start: (codes + 1,) long; the positives of code c are ``item[start[c]:start[c + 1]]``.
        item: long, indices into the items.
        items: number of items.
    """

    code: Tensor
    start: Tensor
    item: Tensor
    items: int

    @classmethod
    def by_group(cls, query_groups: Tensor | Sequence[int], item_groups: Tensor | Sequence[int]) -> Relevance:
        """An item is correct for every query of its group.

        Args:
            query_groups: (queries,) integer group codes; they need not be consecutive.
            item_groups: (items,) codes of the same numbering.
        """
        queries, items = torch.as_tensor(query_groups).long(), torch.as_tensor(item_groups).long()
        groups, code = torch.unique(queries, return_inverse=True)
        order = torch.argsort(items, stable=True)
        ranked = items[order]
        low, high = torch.searchsorted(ranked, groups), torch.searchsorted(ranked, groups, right=True)
        start = torch.cat([torch.zeros(1, dtype=torch.long), (high - low).cumsum(0)])
        kept = torch.isin(ranked, groups)
        return cls(code, start, order[kept], len(items))

    @classmethod
    def by_keys(cls, query_keys: Sequence[frozenset[int]], item_keys: Sequence[frozenset[int]]) -> Relevance:
        """An item is correct for every query that shares a key with it: a caption of two images has two keys.

        Args:
            query_keys: (queries,) the keys of each query.
            item_keys: (items,) the keys of each item.
        """
        holders: dict[int, list[int]] = {}
        for number, keys in enumerate(item_keys):
            for key in keys:
                holders.setdefault(key, []).append(number)
        codes = {keys: code for code, keys in enumerate(dict.fromkeys(query_keys))}
        positives = [sorted({number for key in keys for number in holders.get(key, ())}) for keys in codes]
        start = torch.tensor([0, *accumulate(len(own) for own in positives)]).long()
        item = torch.tensor([i for own in positives for i in own]).long()
        return cls(torch.tensor([codes[keys] for keys in query_keys]).long(), start, item, len(item_keys))

    def __len__(self) -> int:
        return len(self.code)

    def counts(self) -> Tensor:
        """(queries,) how many positives each query has."""
        return self.start.diff()[self.code]

    def positives(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """The positives of queries ``low`` to ``high``: (row counted from ``low``, item), both (pairs,) long."""
        first, count = self.start[self.code[low:high]], self.counts_of(low, high)
        row = torch.repeat_interleave(torch.arange(high - low), count)
        offset = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        return row, self.item[first[row] + offset]

    def counts_of(self, low: int, high: int) -> Tensor:
        """(high - low,) how many positives each of these queries has."""
        code = self.code[low:high]
        return self.start[code + 1] - self.start[code]


@dataclass(frozen=True)
class Ranks:
    """Where each query's best positive stands; every ranking figure follows from these counts.

    Attributes:
        above: (queries,) items that score higher than the best positive.
        tied: (queries,) items that score exactly as much, itself included.
        tied_positives: (queries,) positives among the tied.
        positives: (queries,) positives in all; 0 marks a query that cannot be answered.
        margin: (queries,) best positive's score minus the best other item's; negative where top-1 is wrong, infinite
            where there is no other (or no positive) item.
        top: (queries, t) best-scored items, best first.
        top_scores: (queries, t) their scores.
    """

    above: Tensor
    tied: Tensor
    tied_positives: Tensor
    positives: Tensor
    margin: Tensor
    top: Tensor
    top_scores: Tensor

    def __len__(self) -> int:
        return len(self.above)

    def at(self, rows: Tensor) -> Ranks:
        """The ranks of these queries, in this order."""
        return Ranks(*(getattr(self, f.name)[rows] for f in fields(Ranks)))

    def answerable(self, missing: Literal["error", "skip"] = "error") -> Tensor:
        """(queries,) bool: which queries have a positive.

        Raises:
            DataError: some have none, and ``missing`` is "error".
        """
        answerable = self.positives > 0
        if missing == "error" and not bool(answerable.all()):
            lost = (~answerable).nonzero().flatten().tolist()
            raise DataError(
                f"every query needs at least one correct item; {len(lost)} of {len(answerable)} have none",
                where=f"query {', '.join(map(str, lost[:5]))}{', ...' if len(lost) > 5 else ''}",
                fix='check the groups, or pass missing="skip" to leave such queries out',
            )
        return answerable

    def hits(self, k: int) -> Tensor:
        """(queries,) float64: the probability that a positive is among the k best, ties broken at random.

        With a items above, t tied and p positives among the tied: 0 if a >= k, 1 if a + t <= k, else
        1 - C(t - p, k - a) / C(t, k - a). Queries without a positive get 0.
        """
        if k < 1:
            raise UsageError(f"k must be at least 1, found {k}")
        left = k - self.above  # places for the tied
        miss = torch.ones(len(self), dtype=torch.float64)
        for j in range(min(k, int(self.tied.max()) if len(self) else 0)):
            factor = (self.tied - self.tied_positives - j).clamp(min=0).double() / (self.tied - j).clamp(min=1)
            miss = torch.where(j < left, miss * factor, miss)
        hit = torch.where(left >= self.tied, 1.0, 1.0 - miss)
        return torch.where((left > 0) & (self.positives > 0), hit, 0.0)

    def expected_rank(self) -> Tensor:
        """(queries,) float64, from 1: the best positive's mean rank over random tie-breaks, a + (t + 1) / (p + 1)."""
        return self.above.double() + (self.tied + 1).double() / (self.tied_positives + 1).double()

    def recall_at(self, k: int, *, missing: Literal["error", "skip"] = "error") -> float:
        """Share of queries with a positive among the k best, in [0, 1]."""
        return float(_mean(self.hits(k)[self.answerable(missing)]))

    def median_rank(self, *, missing: Literal["error", "skip"] = "error") -> float:
        """Median over the queries of the best positive's expected rank; 1 is best."""
        ranks = self.expected_rank()[self.answerable(missing)].sort().values
        return float(_mean(ranks[(len(ranks) - 1) // 2 : len(ranks) // 2 + 1]))


def chance(relevance: Relevance, k: int) -> float:
    """The recall@k of a ranking drawn at random, exactly: the mean of 1 - C(n - p, k) / C(n, k) over the queries."""
    count = relevance.counts()
    n = torch.full_like(count, relevance.items)
    empty = torch.zeros(len(count), 0)
    blind = Ranks(torch.zeros_like(count), n, count, count, torch.zeros(len(count)), empty.long(), empty)
    return blind.recall_at(k)


def rank(queries: Tensor, items: Tensor, relevance: Relevance, *, top: int = 0, part: int = 0, parts: int = 1) -> Ranks:
    """Ranks every item for every query by dot product, a tile of queries at a time.

    Args:
        queries: (queries, dim) float embeddings.
        items: (items, dim) float embeddings. Identical rows tie exactly.
        relevance: what is correct for what.
        top: how many of the best items to keep per query.
        part, parts: do only every ``parts``-th tile, from ``part`` on, so that processes share the work; tiles are the
            same however they are shared, hence so are the figures. `tiles` tells which queries those are.

    Raises:
        ClipkitError: an embedding is NaN or infinite (a NaN compares as "not higher", which reads as a perfect rank),
            or the shapes do not fit.
    """
    _check(queries, items, relevance)
    distinct, expand = distinct_rows(items)
    columns = distinct.T.float()
    done = []
    for low, high in tiles(len(queries), len(items), part, parts):
        scores = queries[low:high].float() @ columns
        done.append(_rank_tile(scores if expand is None else scores[:, expand], relevance, low, high, top))
    return concat(done or [_rank_tile(torch.zeros(0, len(items)), relevance, 0, 0, top)])


def tiles(queries: int, items: int, part: int = 0, parts: int = 1) -> Iterator[tuple[int, int]]:
    """The ranges of queries that `rank` holds at once; with ``parts``, those of one part."""
    step = max(1, min(256, _TILE // max(1, items)))  # not of `parts`: a row's last bits may depend on its tile
    for i, low in enumerate(range(0, queries, step)):
        if i % parts == part:
            yield low, min(low + step, queries)


def concat(parts: Sequence[Ranks]) -> Ranks:
    """Joins the ranks of several ranges of queries."""
    return Ranks(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Ranks)))


def _rank_tile(scores: Tensor, relevance: Relevance, low: int, high: int, top: int) -> Ranks:
    row, item = relevance.positives(low, high)
    row, item = row.to(scores.device), item.to(scores.device)
    positive_scores = scores[row, item]
    best = scores.new_full((high - low,), float("inf")).scatter_reduce(
        0, row, positive_scores, "amax", include_self=False
    )
    above, tied = (scores > best[:, None]).sum(1), (scores == best[:, None]).sum(1)
    tied_positives = torch.zeros_like(tied).scatter_add(0, row, (positive_scores == best[row]).long())
    t = min(top, scores.shape[1])
    top_scores, top_items = scores.topk(t) if t else (scores[:, :0], scores[:, :0].long())
    scores[row, item] = -torch.inf  # last use: what is left are the wrong ones
    other = scores.amax(1) if scores.shape[1] else best
    counts = relevance.counts_of(low, high)
    result = (above, tied, tied_positives, counts, best - other, top_items, top_scores)
    return Ranks(*(x.cpu() for x in result))


def distinct_rows(items: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct rows, and which of them each item is (None if all differ).

    A matrix product rounds equal columns differently at the edge of a block (measured: 7 columns of 768 numbers);
    scored once, equal items tie exactly.
    """
    rows = items.detach().cpu().contiguous().numpy()
    codes = assign_codes(blake2b(row, digest_size=16).digest() for row in rows)
    count = max(codes, default=-1) + 1
    if count == len(items):
        return items, None
    expand = torch.tensor(codes, device=items.device)
    first = torch.full((count,), len(items), device=items.device).scatter_reduce(
        0, expand, torch.arange(len(items), device=items.device), "amin"
    )
    return items[first], expand


def _check(queries: Tensor, items: Tensor, relevance: Relevance) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise ClipkitError(
            "queries and items must be (n, dim) embeddings of one dim, "
            f"found {tuple(queries.shape)} and {tuple(items.shape)}"
        )
    if len(relevance) != len(queries) or relevance.items != len(items):
        raise ClipkitError(
            f"relevance is for {len(relevance)} queries and {relevance.items} items, "
            f"found {len(queries)} and {len(items)}"
        )
    for side, x in (("query", queries), ("item", items)):
        require_finite(x, side)


def require_finite(x: Tensor, what: str) -> None:
    """Raises ClipkitError, naming the first bad row, unless every number of (n, d) ``x`` is finite."""
    fine = torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else torch.isfinite(x)
    if not bool(fine.all()):
        bad = (~fine).nonzero().flatten()
        raise ClipkitError(
            f"every score must be a finite number; {len(bad)} of {len(x)} {what} rows hold NaN or infinity",
            where=f"{what} {int(bad[0])}",
            fix="the model gives unusable embeddings: check its weights (did training diverge?) and precision",
        )


def _mean(x: Tensor) -> Tensor:
    if not len(x):
        raise DataError("there is no query to average over", fix="give at least one query that has a correct item")
    return x.mean()


def greater_is_better(key: str) -> bool:
    """Whether a higher value of a metric is better, by its key: False for keys that end in ``loss`` or ``_rank``."""
    return not key.endswith(("loss", "_rank"))
