"""RetrievalResult: what a retrieval evaluation saw, and its most confident mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from clipkit.metrics.ranking import Ranks

Direction: TypeAlias = Literal["text_to_image", "image_to_text"]


@dataclass(frozen=True)
class Confusion:
    """A query whose best item is wrong.

    Attributes:
        query: its place among the ``texts`` or ``images`` of the result.
        found: the place of the item it found among the others.
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
        n: "images" and "texts" that differ, and how many repeat an earlier one: "duplicate_images", "duplicate_texts".
        text_to_image, image_to_text: where the best correct item of every query stands, and its best items.
        texts: the distinct captions; queries and items are places here.
        images: the distinct images, as the row of the data set where each stands first.
        image_of_text: for each text the place among ``images`` of the first image that carries it.
    """

    metrics: dict[str, float]
    n: dict[str, int]
    text_to_image: Ranks
    image_to_text: Ranks
    texts: list[str]
    images: list[int]
    image_of_text: list[int]

    def most_confused(self, direction: Direction, limit: int = 20) -> list[Confusion]:
        """The queries that find a wrong item by the widest margin."""
        ranks: Ranks = getattr(self, direction)
        order = ranks.margin.argsort(stable=True)[:limit].tolist()
        return [Confusion(q, int(ranks.top[q, 0]), float(ranks.margin[q])) for q in order if ranks.margin[q] < 0]
