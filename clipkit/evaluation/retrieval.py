"""RetrievalEvaluator: recall@k and median rank, text to image and image to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.data.dataset import key_values, require_texts
from clipkit.data.reading.rejects import Reject
from clipkit.embedding.embed import embed
from clipkit.embedding.items import EmbedResult, reject
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, DataError, UsageError
from clipkit.evaluation.dataset import Subset, caption_rows, filled, require_columns
from clipkit.evaluation.evaluator import Evaluator
from clipkit.evaluation.retrieval_result import Direction, RetrievalResult
from clipkit.evaluation.small import small_test
from clipkit.files import content_hash
from clipkit.images.load import bytes_of
from clipkit.images.parallel import Workers
from clipkit.metrics.codes import assign_codes
from clipkit.metrics.ranking import Ranks, Relevance, chance, concat, rank, tiles
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.processor import Processor, TextSide
from clipkit.models.text_notices import Notice, caption_notices, tell
from clipkit.progress import track

_TOP = 10  # items kept for each query, for reports


class RetrievalEvaluator(Evaluator):
    """Finds the image for each caption and a caption for each image, among all of a data set.

    Every caption is a query and an item of its own, as in the papers (Flickr30k, MS-COCO); recall@k is the share of
    queries with at least one correct item among the k best. Equal captions (the same characters) are one query and one
    item, and so are byte-identical images: a model cannot tell them apart, and copies would take the ranks of others.
    *What is correct:* what is paired in any row, so that a caption of fifteen images has fifteen right answers; with
    ``group``, whatever stands in a row with the same value in that column. `last.n` says how many duplicates there are.
    Ties give their exact expectation, see `metrics.ranking`.

    Inputs: a model, on every process where there are several. It returns ``{name}/text_to_image_recall@1``,
    ``{name}/text_to_image_median_rank`` and the same for ``image_to_text``.

    When to prefer it: images with captions, and search in either direction.

    Relations: `ZeroShotEvaluator` scores labels; `ValidationLoss` gives the loss of the same pairs.

    Args:
        pairs: a data set with ``image`` and ``texts``, as `load_pairs` gives it.
        name: the prefix of the metric keys.
        ks: the k of recall@k.
        group: a column of numbers or strings; None for pairs.
        store: keeps the embeddings by content, for the next evaluation of the same weights.
        features, batch_size, workers, progress: as for `embed`.
        on_bad: "skip" leaves an image that cannot be used out, with its captions, and lists it in ``rejected``.

    Raises:
        DataError: no pair, a row without a caption, or an empty cell in ``group``.
        UsageError: a column is missing; there are labels alone, and no texts.

    ``notices`` holds, and the log tells, what the data set is too small to tell and what the model cannot see of the
    captions.

    References:
        Radford et al. 2021 (CLIP), table 13; Karpathy and Fei-Fei 2015, for recall@k and the median rank.

    Example: with `model` a `DualEncoder` and `pairs` from `load_pairs`.
        >>> evaluator = RetrievalEvaluator(pairs, ks=(1,))
        >>> metrics = evaluator(model)
        >>> list(metrics)[:2]
        ['retrieval/text_to_image_recall@1', 'retrieval/image_to_text_recall@1']
    """

    def __init__(
        self,
        pairs: Any,
        *,
        name: str = "retrieval",
        ks: Sequence[int] = (1, 5, 10),
        group: str | None = None,
        store: EmbeddingStore | None = None,
        features: EmbeddingStore | None = None,
        batch_size: int = 64,
        workers: Workers = "auto",
        progress: bool = False,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        require_texts(pairs)
        require_columns(pairs, ["image", *([group] if group else [])])
        if not ks or min(ks) < 1:
            raise UsageError(f"ks must be numbers from 1, found {list(ks)}")
        self.name, self.ks, self.store, self.features = name, tuple(ks), store, features
        self.batch_size, self.workers, self.progress, self.on_bad = batch_size, workers, progress, on_bad
        self.images: Sequence[Any] = pairs["image"]
        self.texts, self.image_of_text = caption_rows(pairs["texts"])
        self.groups = None if group is None else assign_codes(filled(key_values(pairs, group), group))
        self.last: RetrievalResult | None = None
        self.rejected: list[Reject] = []
        self._rows = list(range(len(self.images)))  # of the data set
        self._hashes: list[bytes] | None = None  # of the images' contents
        self._captions: tuple[TextSide, list[Notice]] | None = None
        self.notices = self._small(list(range(len(self.images))))  # before an hour of training

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """The figures of this model, the same on every process.

        Raises:
            ModelError: the model gives embeddings that are not finite.
            BadImage: an image cannot be used.
        """
        images = self._image_vectors(model)  # first: it may leave images out
        texts = self._embed(model, self._distinct_texts(), "text").vectors
        towards_images, towards_texts = self._relevance(self._image_codes())
        ranks = {
            "text_to_image": _shared_rank(texts, images, towards_images, model.device),
            "image_to_text": _shared_rank(images, texts, towards_texts, model.device),
        }
        metrics = {}
        for direction, ranked in ranks.items():
            for k in self.ks:
                metrics[f"{self.name}/{direction}_recall@{k}"] = ranked.recall_at(k)
        for direction, ranked in ranks.items():
            metrics[f"{self.name}/{direction}_median_rank"] = ranked.median_rank()
        self.last = self._result(metrics, ranks)
        self.notices = [*self._small(self._image_codes()), *self._unseen(model.processor)]
        return metrics

    def _small(self, images: list[int]) -> list[Notice]:
        queries = {"images": len(set(images)), "texts": len(self._distinct_texts())}
        notices = small_test(self.name, queries, self._chance(images))
        tell(notices, self)
        return notices

    def _unseen(self, processor: Processor) -> list[Notice]:
        if self._captions is None or self._captions[0] is not processor.text_side:  # the same at every evaluation
            self._captions = processor.text_side, caption_notices(processor, self._distinct_texts())
        tell(self._captions[1], self)
        return self._captions[1]

    def _result(self, metrics: dict[str, float], ranks: dict[str, Ranks]) -> RetrievalResult:
        codes, texts = self._image_codes(), self._distinct_texts()
        first = {text: codes[row] for text, row in reversed(list(zip(self.texts, self.image_of_text, strict=True)))}
        rows = [self._rows[row] for row in _first(codes)]
        return RetrievalResult(
            metrics, self._n(), **ranks, texts=texts, images=rows, image_of_text=[first[t] for t in texts]
        )

    def keys(self) -> list[str]:
        """The keys of the metrics, in their order."""
        directions = get_args(Direction)
        recalls = [f"{self.name}/{direction}_recall@{k}" for direction in directions for k in self.ks]
        return recalls + [f"{self.name}/{direction}_median_rank" for direction in directions]

    def chance(self) -> dict[str, float]:
        """The recall of a ranking drawn at random, exactly, under the same keys."""
        return self._chance(self._image_codes())

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"chance": self.chance()}

    def identity(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "image_of_text": self.image_of_text,
            "ks": self.ks,
            "groups": self.groups,
            "images": self.images,
        }

    def _chance(self, images: list[int]) -> dict[str, float]:
        figures = {}
        for direction, relevance in zip(get_args(Direction), self._relevance(images), strict=True):
            for k in self.ks:
                figures[f"{self.name}/{direction}_recall@{k}"] = chance(relevance, k)
        return figures

    def counts(self) -> dict[str, int]:
        """How many images and texts that differ there are, by ``{name}/images``, and how many more are duplicates."""
        return {f"{self.name}/{item}": count for item, count in self._n().items()}

    def _n(self) -> dict[str, int]:
        images, texts = len(set(self._image_codes())), len(self._distinct_texts())
        return {
            "images": images,
            "texts": texts,
            "duplicate_images": len(self.images) - images,
            "duplicate_texts": len(self.texts) - texts,
        }

    def _image_vectors(self, model: DualEncoder) -> Tensor:
        """(distinct images, dim)"""
        codes = self._image_codes()
        embedded = self._embed(model, Subset(self.images, _first(codes)), "image")
        if embedded.rejected:
            refused = {reject.row: reject for reject in embedded.rejected}
            self._drop({row: refused[code] for row, code in enumerate(codes) if code in refused})
        return embedded.vectors

    def _drop(self, refused: Mapping[int, Reject]) -> None:
        """Leaves images out, with their captions, for this and every later call."""
        self.rejected += [replace(reject, row=self._rows[row]) for row, reject in refused.items()]
        kept = [row for row in range(len(self.images)) if row not in refused]
        if not kept:
            raise DataError("none of the images can be used", where=self.rejected[0].where)
        number = {row: i for i, row in enumerate(kept)}
        pairs = [(t, number[i]) for t, i in zip(self.texts, self.image_of_text, strict=True) if i in number]
        self.texts, self.image_of_text = [text for text, _ in pairs], [row for _, row in pairs]
        self._rows = [self._rows[row] for row in kept]
        self.groups = None if self.groups is None else [self.groups[row] for row in kept]
        self._hashes = None if self._hashes is None else [self._hashes[row] for row in kept]
        self.images = Subset(self.images, kept)

    def _embed(self, model: DualEncoder, items: Sequence[Any], kind: Literal["image", "text"]) -> EmbedResult:
        return embed(
            model,
            items,
            kind=kind,
            store=self.store,
            features=self.features,
            batch_size=self.batch_size,
            workers=self.workers,
            progress=self.progress,
            on_bad=self.on_bad,
        )

    def _distinct_texts(self) -> list[str]:
        return list(dict.fromkeys(self.texts))

    def _image_codes(self) -> list[int]:
        """A code for the content of each image, from 0; the images are read once, shared over the ranks."""
        if self._hashes is None:
            here, world, n = distributed.rank(), distributed.world_size(), len(self.images)
            rows, main = range(here, n, world), self.progress and distributed.is_main()
            read = track(rows, len(rows), "reading images", unit="image", shown=main)
            shares = distributed.together(lambda: [self._content(row) for row in read])
            hashes = [shares[i % world][i // world] for i in range(n)]
            refused = {row: content for row, content in enumerate(hashes) if isinstance(content, Reject)}
            if refused:
                self._drop(refused)
            self._hashes = [content for content in hashes if not isinstance(content, Reject)]
        return assign_codes(self._hashes)

    def _content(self, row: int) -> bytes | Reject:
        try:
            return content_hash(bytes_of(self.images[row]))
        except BadImage as error:
            if self.on_bad == "error":
                raise error.or_skip() from error
            return reject(row, self.images[row], error)

    def _relevance(self, images: list[int]) -> tuple[Relevance, Relevance]:
        """Which distinct images are correct for each distinct text, and the other way; ``images`` are their codes.

        A row's key is its group, or else its image; texts and images have the keys of all rows where they stand.
        """
        keys = images if self.groups is None else self.groups
        of_images = _keys(images, keys)
        of_texts = _keys(assign_codes(self.texts), [keys[row] for row in self.image_of_text])
        return Relevance.by_keys(of_texts, of_images), Relevance.by_keys(of_images, of_texts)


def _first(codes: list[int]) -> list[int]:
    """For each code the row where it stands first."""
    first = {code: row for row, code in reversed(list(enumerate(codes)))}
    return [first[code] for code in range(len(first))]


def _keys(codes: list[int], keys: list[int]) -> list[frozenset[int]]:
    """For each code all keys that it has in one row or another."""
    keys_of_code: list[set[int]] = [set() for _ in range(max(codes) + 1)]
    for code, key in zip(codes, keys, strict=True):
        keys_of_code[code].add(key)
    return [frozenset(own) for own in keys_of_code]


def _shared_rank(queries: Tensor, items: Tensor, relevance: Relevance, device: torch.device) -> Ranks:
    """`rank` with its tiles shared over the processes; the result is that of one."""
    here, world = distributed.rank(), distributed.world_size()
    q, x = queries.to(device), items.to(device)
    shares = distributed.together(lambda: rank(q, x, relevance, top=_TOP, part=here, parts=world))
    if world == 1:
        return shares[0]
    order = [i for r in range(world) for low, high in tiles(len(q), len(x), r, world) for i in range(low, high)]
    return concat(shares).at(torch.tensor(order).argsort())
