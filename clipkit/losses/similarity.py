"""What "similar" means: the user's decision.

A notion of similarity says how alike two samples are, from keys that the samples carry. Losses, gathers, the
cached step and the trainer know nothing else about it, so a new notion is one small class: the columns it reads
and `affinity`. `Paired`, `SameGroup` and `Views` answer yes or no; `Graded` gives any degree between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import UsageError, option
from clipkit.modality import Modality

Keys = Mapping[str, Tensor]  # column -> (n,) int64 codes, or (n,) or (n, d) float32 numbers
Treat = Literal["positive", "ignore", "negative"]
Head = Literal["mlp", "linear"]

ROW = "row"
"""The key that every sample carries: its row in the data set; -1 for a hard negative."""

VIEW = "view"
"""The key that tells images of one sample apart: 0 the image itself, 1, 2 … its augmented views."""


@dataclass(frozen=True, kw_only=True)
class Similarity(ABC):
    """A notion of similarity. A subclass gives `affinity`, and the keys that it reads.

    Args:
        weight: factor of this notion's loss where several are added, default 1.
        between: the two sides that are compared; a side with itself leaves each row out of its own columns.
        known: what is known not to be a negative, and what becomes of it: key column -> ``positive``, ``ignore``
            (not compared at all) or ``negative`` (the same as saying nothing), for pairs that share a value of the
            column and have no affinity of their own. ``texts`` is the caption itself and ``image`` the picture itself,
            both by hash: duplicates. Empty by default.
        score: a column of numbers >= 0, the weight of a sample's row; None: all weigh the same.
        views: augmented views that this notion compares in place of the images; 0: the images.
        temperature: of this notion, fixed: its logits are cosine / temperature and its loss is InfoNCE. None: the
            scale (and bias) that the model learns.
        head: projection of its own from the image tower's features, ``mlp`` or ``linear``, for training only. None:
            the model's own embedding.

    Raises:
        UsageError: a value that none of this allows.
    """

    weight: float = 1.0
    between: tuple[Modality, Modality] = ("image", "text")
    known: Mapping[str, Treat] = field(default_factory=dict)
    score: str | None = None
    views: int = 0
    temperature: float | None = None
    head: Head | None = None

    graded: ClassVar[bool] = True
    """False where every affinity is 0, 1 or -1: the target's entropy is then known without a look at it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that `affinity` reads as codes: int64, one number for each distinct value, -1 for an empty cell."""
        return ()

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns that `affinity` reads as numbers: float32, (n,) or (n, d); NaN for an empty cell."""
        return ()

    @abstractmethod
    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        """How alike each row is to each column of any tile of the batch.

        Args:
            rows: keys of samples on the side ``between[0]``, (r, ...) each.
            cols: keys of samples on the side ``between[1]``, (c, ...) each.

        Returns:
            (r, c) in [0, 1]; -1 where the two are not to be compared. Softmax losses divide by the sums of rows and
            columns, the sigmoid loss reads them as labels. float64 where values span many orders of magnitude.
        """

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UsageError(f"the weight of a notion of similarity is greater than 0; found {self.weight}")
        if self.temperature is not None and not self.temperature > 0:
            raise UsageError(f"a temperature is greater than 0; found {self.temperature}")
        for side in self.between:
            if side not in get_args(Modality):
                raise UsageError(f"`between` names two of {', '.join(get_args(Modality))}; found {side!r}")
        for column, treat in self.known.items():
            if treat not in get_args(Treat):
                raise UsageError(f"what is known by {column!r} is one of {', '.join(get_args(Treat))}; found {treat!r}")
        if self.views < 0 or self.views == 1 or (self.views and self.between != ("image", "image")):
            raise UsageError(
                f"views are compared with each other, two or more; found views={self.views}, between={self.between}",
                fix=f"{option('similar.views', 2)}, {option('similar.between', ('image', 'image'))}",
            )
        if self.head and self.between != ("image", "image"):
            raise UsageError(
                f"a head of its own projects images; found between={self.between}",
                fix=option("similar.between", ("image", "image")),
            )
        if self.head and self.temperature is None:
            raise UsageError(
                "a notion with a head of its own needs a temperature of its own", fix=option("similar.temperature", 0.1)
            )

    @property
    def same_modality(self) -> bool:
        """Whether a side is compared with itself."""
        return self.between[0] == self.between[1]


@dataclass(frozen=True)
class Paired(Similarity):
    """This text belongs to this image, and to no other.

    Two captions of one image that meet in a batch both count as its own.

    Inputs: the key ``row``, (n,), which every sample has.

    When to prefer it: images with captions of their own.

    Relations: `SameGroup` also counts other members of a group as positives. `known` leaves duplicates out of the
    negatives without making groups.

    Args: those of `Similarity`.

    Raises:
        UsageError: see `Similarity`.

    References:
        Radford et al. 2021 (CLIP).

    Example:
        >>> rows = {"row": torch.tensor([0, 1])}
        >>> Paired().affinity(rows, rows).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    graded: ClassVar[bool] = False

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        return same(rows[ROW], cols[ROW]).float()


@dataclass(frozen=True)
class SameGroup(Similarity):
    """Samples that share a value of `column` are alike.

    All members of a group are positives with equal weight. Missing values (code -1) match only themselves.
    With ``between=("image", "image"), temperature=0.1`` it is SupCon of one modality.

    Inputs: the keys ``row`` and `column`, (n,) int64 codes each.

    When to prefer it: labels or products, where many images share one meaning and texts repeat.

    Relations: with a group for every sample it is `Paired`; `Graded` with ``hierarchy`` also knows near groups.

    Args:
        column: a column of the data set: a label, a group, any hashable value. The others are those of `Similarity`.

    Raises:
        UsageError: see `Similarity`.

    References:
        Khosla et al. 2020 (SupCon); Yang et al. 2022 (UniCL).

    Example:
        >>> keys = {"row": torch.arange(3), "label": torch.tensor([7, 7, -1])}
        >>> SameGroup("label").affinity(keys, keys).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    column: str

    graded: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        return (same(rows[self.column], cols[self.column]) | same(rows[ROW], cols[ROW])).float()


@dataclass(frozen=True, kw_only=True)
class Views(Similarity):
    """Augmented views of one image are alike.

    The views are drawn with ``view_augmentation`` of TrainConfig, beside the image that other notions see.

    Inputs: the key ``row``, (n * views,); embeddings come from its own head.

    When to prefer it: few captions for many images; added to `Paired` it is SLIP.

    Relations: `Paired` and `SameGroup` compare the images themselves, and can be added to it.

    Args:
        views: how many views of a sample, default 2.
        head: projection of its own, default ``mlp`` (two layers).
        temperature: default 0.1, as SimCLR and SLIP have it. The others are those of `Similarity`.

    Raises:
        UsageError: see `Similarity`.

    References:
        Chen et al. 2020 (SimCLR); Mu et al. 2021 (SLIP).

    Example:
        >>> two_views_each = {"row": torch.tensor([0, 1, 0, 1])}
        >>> Views().affinity(two_views_each, two_views_each)[0].tolist()  # the loss leaves a view itself out
        [1.0, 0.0, 1.0, 0.0]
    """

    between: tuple[Modality, Modality] = ("image", "image")
    views: int = 2
    temperature: float | None = 0.1
    head: Head | None = "mlp"

    graded: ClassVar[bool] = False

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        return same(rows[ROW], cols[ROW]).float()


def same(rows: Tensor, cols: Tensor) -> Tensor:
    """(r,) and (c,) codes -> (r, c) bool: whether both are known (>= 0) and equal."""
    rows, cols = rows.where(rows >= 0, -1), cols.where(cols >= 0, -2)  # vectors, so that the matrix is made once
    return rows.unsqueeze(1) == cols.unsqueeze(0)


def target(similar: Similarity, rows: Keys, cols: Keys, hard: Tensor | None = None) -> Tensor:
    """The target of the loss: the affinity, corrected by what is known not to be a negative.

    Args:
        similar: the notion.
        rows, cols: keys of a tile.
        hard: (r, c) bool, pairs in which one is only ever a negative; None: there are none.

    Returns:
        (r, c) in [0, 1]; -1 where the two are not compared.
    """
    affinity = similar.affinity(rows, cols)
    if hard is not None:
        affinity = affinity.masked_fill(hard & (affinity > 0), 0)
    for column, treat in similar.known.items():
        if treat == "negative":
            continue
        match = same(rows[column], cols[column])
        if treat == "ignore":
            affinity = affinity.masked_fill(match & (affinity == 0), -1)
        else:  # a hard negative of an equal key is not a positive either
            affinity = affinity.masked_fill(match if hard is None else match & ~hard, 1)
            affinity = affinity if hard is None else affinity.masked_fill(match & hard & (affinity == 0), -1)
    return affinity


def key_columns(notions: Iterable[Similarity]) -> tuple[list[str], list[str]]:
    """The columns that the loader has to carry for some notions: as codes, and as numbers.

    Raises:
        UsageError: one column is wanted as both.
    """
    notions = list(notions)
    codes = {column for notion in notions for column in (*notion.columns, *notion.known)} - {ROW, VIEW}
    numbers = {column for notion in notions for column in notion.numbers}
    numbers |= {notion.score for notion in notions if notion.score is not None}
    both = codes & numbers
    if both:
        raise UsageError(
            f"the column {min(both)!r} is wanted as a group and as a number", fix="copy it to a second column"
        )
    return sorted(codes), sorted(numbers)


Measure = Callable[[Tensor, Tensor], Tensor]  # (r, d), (c, d) -> (r, c) in [0, 1]


@dataclass(frozen=True)
class Graded(Similarity):
    """Samples are more or less alike, by numbers or levels in the data set.

    ``Graded("teacher_image", "softmax", against="teacher_text")`` distils a teacher's similarity matrix, where both
    columns hold embeddings (`embed` makes them); ``Graded("text_embedding", "softmax")`` takes the similarity of texts;
    ``Graded(("order", "family", "species"), "hierarchy")`` a taxonomy.

    Inputs: the key ``row`` and the columns of `features`, (n,) or (n, d) float32; int64 codes for ``hierarchy``.

    When to prefer it: a teacher to distil, measured quantities, or a taxonomy.

    Relations: `SameGroup` is the same with yes and no only.

    Args:
        features: one or several columns of the data set: numbers, or lists of numbers; for ``hierarchy`` names.
        similarity: ``cosine``: the cosine of the features, not below 0, and 1 for a sample with itself.
            ``softmax``: exp(cosine / softness), which the loss divides by its sums: the softmax over a frozen
            teacher's similarities. ``hierarchy``: the part of the levels, counted from the top, on which two samples
            agree. Or a function of features (r, d) and (c, d) that gives (r, c) in [0, 1].
        against: the column of the second side, where it is another one.
        softness: temperature of ``softmax``; 0.01 is that of CLIP's logits. The others are those of `Similarity`.

    Raises:
        UsageError: an unknown similarity, or an option that does not fit it.

    References:
        Hinton et al. 2015 (distillation); for similarity matrices Wu et al. 2023 (TinyCLIP).

    Example:
        >>> keys = {"row": torch.arange(2), "family": torch.tensor([3, 3]), "species": torch.tensor([5, 6])}
        >>> Graded(("family", "species"), "hierarchy").affinity(keys, keys).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """

    features: str | tuple[str, ...]
    similarity: Literal["cosine", "softmax", "hierarchy"] | Measure = "cosine"
    against: str | None = None
    softness: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        names = get_args(Literal["cosine", "softmax", "hierarchy"])
        if not callable(self.similarity) and self.similarity not in names:
            raise UsageError(f"similarity is one of {', '.join(names)}, or a function; found {self.similarity!r}")
        if self.similarity == "hierarchy" and self.against is not None:
            raise UsageError("a hierarchy has the same levels on both sides", where="against", fix="leave it out")
        if not self.softness > 0.003:  # exp(-2 / 0.003) is the smallest that float64 holds
            raise UsageError(f"softness is greater than 0.003; found {self.softness}")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.features,) if isinstance(self.features, str) else tuple(self.features)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.names if self.similarity == "hierarchy" else ()

    @property
    def numbers(self) -> tuple[str, ...]:
        other = () if self.against is None else (self.against,)
        return () if self.similarity == "hierarchy" else (*self.names, *other)

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        itself = same(rows[ROW], cols[ROW])
        if self.similarity == "hierarchy":
            return _shared_levels(rows, cols, self.names).masked_fill(itself, 1)
        a, b = _joined(rows, self.names), _joined(cols, self.names if self.against is None else (self.against,))
        if callable(self.similarity):
            return self.similarity(a, b)
        cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        if self.similarity == "cosine":
            return cosine.clamp(0, 1).masked_fill(itself, 1)
        return ((cosine.double().clamp(-1, 1) - 1) / self.softness).exp()  # exp(-200) is nothing in float32


def _joined(keys: Keys, names: tuple[str, ...]) -> Tensor:
    """(n, d): the columns side by side; an empty cell is 0, alike to nothing."""
    return torch.cat([keys[name].float().reshape(len(keys[name]), -1) for name in names], dim=1).nan_to_num()


def _shared_levels(rows: Keys, cols: Keys, levels: tuple[str, ...]) -> Tensor:
    """(r, c): the part of the levels on which two samples agree, from the first until they part."""
    agree = same(rows[levels[0]], cols[levels[0]])
    shared = agree.float()
    for level in levels[1:]:
        agree = agree & same(rows[level], cols[level])
        shared += agree
    return shared / len(levels)
