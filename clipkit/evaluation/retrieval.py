"""RetrievalEvaluator: recall@k and median rank, text to image and image to text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.data.keys import key_values, require_texts
from clipkit.data.rejects import Reject
from clipkit.embedding.embed import Embedded, embed
from clipkit.embedding.encode import reject
from clipkit.embedding.store import EmbeddingStore, content_hash
from clipkit.errors import BadImage, DataError, UsageError, option
from clipkit.images import bytes_of
from clipkit.metrics.ranking import Ranks, Relevance, chance, concat, rank, tiles
from clipkit.models.dual_encoder import DualEncoder

Direction: TypeAlias = Literal["text_to_image", "image_to_text"]

_TOP = 10  # items kept for each query, for reports


@dataclass(frozen=True)
class Confusion:
    """A query whose best item is wrong.

    Attributes:
        query: its row among the queries.
        found: the row of the item it found.
        margin: best correct score minus the score of what was found; the more negative, the more confident.
    """

    query: int
    found: int
    margin: float


@dataclass(frozen=True)
class RetrievalResult:
    """What the last evaluation saw, beyond its figures.

    Attributes:
        metrics: the figures.
        n: "images", "texts", and of those how many repeat an earlier one: "duplicate_images", "duplicate_texts".
        text_to_image, image_to_text: where the best correct item of every query stands, and its best items.
        texts: every caption; a text's row is its place here.
        image_of_text: for each text the row of its image.
    """

    metrics: dict[str, float]
    n: dict[str, int]
    text_to_image: Ranks
    image_to_text: Ranks
    texts: list[str]
    image_of_text: list[int]

    def most_confused(self, direction: Direction, limit: int = 20) -> list[Confusion]:
        """The queries that find a wrong item by the widest margin."""
        ranks: Ranks = getattr(self, direction)
        order = ranks.margin.argsort(stable=True)[:limit].tolist()
        return [Confusion(q, int(ranks.top[q, 0]), float(ranks.margin[q])) for q in order if ranks.margin[q] < 0]


class RetrievalEvaluator:
    """Finds the image for each caption and a caption for each image, among all of a data set.

    Every caption is a query and an item of its own, as in the papers (Flickr30k, MS-COCO); recall@k is the share of
    queries with at least one correct item among the k best. *What is correct:* with ``group``, whatever has the same
    value in that column; without it, what is paired, where equal captions count as one caption and byte-identical
    images as one image (a model cannot tell them apart, and should not be marked down for it). `last.n` says how many
    duplicates there are. Ties give their exact expectation, see `metrics.ranking`.

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

    Call it with a model, on every process where there are several; keys are ``{name}/text_to_image_recall@1``,
    ``{name}/text_to_image_median_rank`` and the same for ``image_to_text``.
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
        workers: int = 0,
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
        self.texts, self.image_of_text = _captions(pairs["texts"])
        self.groups = None if group is None else _codes(_filled(key_values(pairs, group), group))
        self.last: RetrievalResult | None = None
        self.rejected: list[Reject] = []
        self._rows = list(range(len(self.images)))  # of the data set
        self._codes: tuple[list[int], list[int]] | None = None

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """The figures of this model, the same on every process.

        Raises:
            ModelError: the model gives embeddings that are not finite.
            BadImage: an image cannot be used.
        """
        images = self._image_vectors(model)
        texts = self._embed(model, self.texts, "text").vectors
        towards_images, towards_texts = self._relevance()
        found = {
            "text_to_image": _shared_rank(texts, images, towards_images, model.device),
            "image_to_text": _shared_rank(images, texts, towards_texts, model.device),
        }
        metrics = {f"{self.name}/{way}_recall@{k}": r.recall_at(k) for way, r in found.items() for k in self.ks}
        metrics |= {f"{self.name}/{way}_median_rank": r.median_rank() for way, r in found.items()}
        self.last = RetrievalResult(metrics, self._n(), **found, texts=self.texts, image_of_text=self.image_of_text)
        return metrics

    def chance(self) -> dict[str, float]:
        """The recall of a ranking drawn at random, exactly, under the same keys."""
        ways = zip(("text_to_image", "image_to_text"), self._relevance(), strict=True)
        return {f"{self.name}/{way}_recall@{k}": chance(relevant, k) for way, relevant in ways for k in self.ks}

    def n(self) -> dict[str, int]:
        """How many images and texts there are, by ``{name}/images``, and how many are duplicates."""
        return {f"{self.name}/{what}": count for what, count in self._n().items()}

    def _n(self) -> dict[str, int]:
        image_codes, text_codes = self._contents()
        images, texts = len(image_codes), len(text_codes)
        return {
            "images": images,
            "texts": texts,
            "duplicate_images": images - len(set(image_codes)),
            "duplicate_texts": texts - len(set(text_codes)),
        }

    def _image_vectors(self, model: DualEncoder) -> Tensor:
        codes, _ = self._contents()
        first = {code: row for row, code in reversed(list(enumerate(codes)))}  # each distinct image once
        found = self._embed(model, Rows(self.images, [first[code] for code in range(len(first))]), "image")
        if found.rejected:
            refused = {reject.row: reject for reject in found.rejected}
            self._drop({row: refused[code] for row, code in enumerate(codes) if code in refused})
            return found.vectors[self._contents()[0]]  # what is left has the same order
        return found.vectors[codes]

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
        self.images, self._codes = Rows(self.images, kept), None

    def _embed(self, model: DualEncoder, items: Sequence[Any], kind: Literal["image", "text"]) -> Embedded:
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

    def _contents(self) -> tuple[list[int], list[int]]:
        """A code for the content of each image and each text; the images are read once, shared over the ranks."""
        if self._codes is None:
            here, world, n = distributed.rank(), distributed.world_size(), len(self.images)
            shares = distributed.together(lambda: [self._content(row) for row in range(here, n, world)])
            hashes = [shares[i % world][i // world] for i in range(n)]
            refused = {row: found for row, found in enumerate(hashes) if isinstance(found, Reject)}
            if refused:
                self._drop(refused)
                hashes = [found for found in hashes if not isinstance(found, Reject)]
            self._codes = _codes(hashes), _codes(self.texts)
        return self._codes

    def _content(self, row: int) -> bytes | Reject:
        try:
            return content_hash(bytes_of(self.images[row]))
        except BadImage as error:
            if self.on_bad == "error":
                raise
            return reject(row, self.images[row], error)

    def _relevance(self) -> tuple[Relevance, Relevance]:
        """Which images are correct for each text, and which texts for each image."""
        if self.groups is not None:
            own = [self.groups[i] for i in self.image_of_text]
            return Relevance.by_group(own, self.groups), Relevance.by_group(self.groups, own)
        images, texts = self._contents()
        pairs = {(images[i], texts[t]) for t, i in enumerate(self.image_of_text)}
        return _related(texts, images, ((t, i) for i, t in pairs)), _related(images, texts, pairs)


class Rows(Sequence[Any]):
    """Some rows of a sequence, read when asked for."""

    def __init__(self, items: Sequence[Any], rows: Sequence[int]) -> None:
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.rows[index]]


def require_columns(pairs: Any, columns: Iterable[str]) -> None:
    """Raises UsageError unless the data set has these columns, DataError if it has no row."""
    found = list(pairs.column_names)
    for column in columns:
        if column not in found:
            fix = f"name the column of the class with {option('label')}" if column == "label" else None
            raise UsageError(f"expected a column {column!r}; the data set has {', '.join(found)}", fix=fix)
    if not len(pairs):
        raise DataError("the data set has no row, so there is nothing to evaluate")


def _captions(texts: Iterable[Sequence[str]]) -> tuple[list[str], list[int]]:
    captions: list[str] = []
    owner: list[int] = []
    for row, own in enumerate(texts):
        if not own or not all(isinstance(text, str) and text.strip() for text in own):
            raise DataError("every image needs a caption, and none may be empty", where=f"row {row}")
        captions += own
        owner += [row] * len(own)
    return captions, owner


def _filled(values: Iterable[Any], column: str) -> list[Any]:
    found = list(values)
    if None in found:
        message = f"every row needs a group; {found.count(None)} have none in {column!r}"
        raise DataError(message, where=f"row {found.index(None)}", fix="fill it, or leave such rows out")
    return found


def _codes(values: Iterable[Hashable]) -> list[int]:
    """The values numbered in the order in which they first appear."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]


def _related(queries: list[int], items: list[int], pairs: Iterable[tuple[int, int]]) -> Relevance:
    """From pairs of a query's content and an item's content to the items themselves."""
    rows: dict[int, list[int]] = {}
    for row, code in enumerate(items):
        rows.setdefault(code, []).append(row)
    positives: list[list[int]] = [[] for _ in range(max(queries) + 1)]
    for query, item in pairs:
        positives[query] += rows[item]
    return Relevance.by_code(queries, positives, len(items))


def _shared_rank(queries: Tensor, items: Tensor, relevance: Relevance, device: torch.device) -> Ranks:
    """`rank` with its tiles shared over the processes; the result is that of one."""
    here, world = distributed.rank(), distributed.world_size()
    q, x = queries.to(device), items.to(device)
    shares = distributed.together(lambda: rank(q, x, relevance, top=_TOP, part=here, parts=world))
    if world == 1:
        return shares[0]
    order = [i for r in range(world) for low, high in tiles(len(q), len(x), r, world) for i in range(low, high)]
    return concat(shares).at(torch.tensor(order).argsort())
