"""The sections `data`, `similar` and `evaluate` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator

from clipkit.data.reading.tables import Quoting
from clipkit.errors import ConfigError, UsageError
from clipkit.losses.similarity import Graded, Head, Paired, SameGroup, Similarity, Treat, Views
from clipkit.modality import Modality
from clipkit.prompts import DEFAULT_TEMPLATE
from clipkit.training.config.train import _STRICT, _as_paths
from clipkit.training.config.typed import Columns

_Templates: TypeAlias = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class DataConfig:
    """Which pairs.

    Attributes:
        train: a table, a folder, or a name of the hub.
        image, text, label: columns; None: the obvious ones. `text` takes several.
        test: pairs held out: a part (0.1), a number (500), another table or folder; 0: none, and nothing is measured.
        split_by: what never stands on both sides: ``image``, or a column.
        split: of a hub data set.
        templates: captions for labels, e.g. ``a photo of a {}.``; or for each class its own (see `prompts`).
        separator, encoding, quoting: of text tables and caption files, see `TextFormat`.
        features: file that keeps what a wholly locked image tower (``model.freeze: [image]``) makes of each image, by
            the image's content, its augmentation and the tower; made where it is missing. The tower then runs once, in
            this run or in an earlier one, and steps and evaluations cost the text side alone. None: it runs in each.
            What a locked text tower makes of texts is not kept.
        num_augmentations: with `features`, how many augmented versions of each training image are kept, of which every
            step draws one; ``augmentation: none`` has one.
    """

    train: str
    image: str | None = None
    text: Columns | None = None
    label: str | None = None
    test: float | str = 0.1
    split_by: str = "image"
    split: str = "train"
    templates: _Templates | None = None
    separator: str | None = None
    encoding: str = "utf-8-sig"
    quoting: Quoting = "double"
    features: str | None = None
    num_augmentations: int = 4

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_paths(self, "train", "test", "features")
        if self.num_augmentations < 1:
            raise ConfigError(f"num_augmentations must be at least 1, found {self.num_augmentations}", where="data")


@dataclass(frozen=True)
class SimilarConfig:
    """One notion of similarity: ``{}`` for given pairs, or one of `group`, `graded` and `views`.

    Attributes:
        group: column whose values are shared by what is alike.
        graded: column or columns of features: more or less alike.
        similarity: of `graded`: ``cosine``, ``softmax`` or ``hierarchy``.
        against: of `graded`: the column of the second side.
        softness: of `graded` with ``softmax``: its temperature.
        views: augmented views of each image that are alike, two or more; with `group` the views are compared.
        between: the two sides; None: image and text, or images where there are views.
        known: key column -> ``positive``, ``ignore`` or ``negative``: what is known not to be a negative.
        score: column of the rows' weights.
        temperature: of this notion, fixed; None: the model's, or 0.1 where there are views.
        head: projection of its own: ``mlp``, ``linear``, ``none``; None: ``mlp`` for `views` alone.
        weight: factor of this notion's loss.
    """

    group: str | None = None
    graded: Columns | None = None
    similarity: Literal["cosine", "softmax", "hierarchy"] = "cosine"
    against: str | None = None
    softness: float = 0.01
    views: int | None = None
    between: tuple[Modality, Modality] | None = None
    known: dict[str, Treat] = field(default_factory=dict)
    score: str | None = None
    temperature: float | None = None
    head: Head | Literal["none"] | None = None
    weight: float = 1.0

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.graded is not None and (self.group is not None or self.views is not None):
            raise ConfigError("a notion of similarity is one of `group`, `graded` and `views`", where="similar")
        self.build()

    def build(self) -> Similarity:
        """The notion itself.

        Raises:
            ConfigError: what the notion does not allow.
        """
        images: tuple[Modality, Modality] = ("image", "image")
        options: dict[str, Any] = {"weight": self.weight, "known": self.known, "score": self.score}
        chosen = {"between": self.between or (images if self.views else None), "temperature": self.temperature}
        chosen |= {"views": self.views, "temperature": self.temperature or (0.1 if self.views else None)}
        options |= {name: value for name, value in chosen.items() if value is not None}
        if self.head is not None:
            options["head"] = None if self.head == "none" else self.head
        try:
            if self.group is not None:
                return SameGroup(self.group, **options)
            if self.graded is not None:
                return Graded(self.graded, self.similarity, self.against, self.softness, **options)
            return Views(**options) if self.views is not None else Paired(**options)
        except UsageError as error:
            raise ConfigError(error.message, where="similar", fix=error.fix) from None


@dataclass(frozen=True)
class ReferenceConfig:
    """Pairs that stand for what the model is not to forget; a string in its place is `data`.

    Attributes:
        data: a table, a folder, or a name of the hub.
        image, text, label, split, templates, separator, encoding, quoting: as in `DataConfig`.
    """

    data: str
    image: str | None = None
    text: Columns | None = None
    label: str | None = None
    split: str = "train"
    templates: _Templates | None = None
    separator: str | None = None
    encoding: str = "utf-8-sig"
    quoting: Quoting = "double"

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_paths(self, "data")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out pairs.

    Attributes:
        retrieval: recall both ways.
        loss: the loss itself, in fixed batches (see `ValidationLoss`).
        group: column whose members all count as correct; None: an image's own texts.
        zero_shot: column of the class; None: no zero-shot classification.
        templates: prompts of the classes; or for each class its own.
        reference: pairs on which retrieval must not get worse than `train.forget_budget` allows; None: the built-in
            sample.
    """

    retrieval: bool = True
    loss: bool = False
    group: str | None = None
    zero_shot: str | None = None
    templates: _Templates = DEFAULT_TEMPLATE
    reference: Annotated[
        ReferenceConfig | None, BeforeValidator(lambda found: {"data": found} if isinstance(found, str) else found)
    ] = None

    __pydantic_config__ = _STRICT
