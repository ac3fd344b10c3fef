"""The sections `data`, `similar` and `evaluate` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, PositiveInt

from clipkit.data.reading.text_files import Quoting
from clipkit.errors import ConfigError, UsageError
from clipkit.losses.similarity import Graded, Head, Paired, SameGroup, Similarity, Treat, Views
from clipkit.modality import Modality
from clipkit.prompts import DEFAULT_TEMPLATE
from clipkit.training.config.fields import STRICT, as_paths, check_fields
from clipkit.training.config.typed import Columns

_Templates: TypeAlias = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class DataConfig:
    """The pairs to train on and to hold out.

    Attributes:
        train: a table, a folder, or a name of the hub.
        image, text, label: columns; None: the obvious ones. `text` takes several.
        test: pairs held out: a part (0.1), a number (500), another table or folder; 0: none, and nothing is measured.
        split_by: values that never occur on both sides of the split: ``image``, or a column.
        split: of a data set of the hub.
        templates: captions for labels, e.g. ``a photo of a {}.``; or for each class its own (see `prompts`).
        separator, encoding, quoting: of text tables and caption files, see `TextFormat`.
        features: file for the features that a wholly frozen tower (``model.freeze: [image]``, ``[text]`` or both)
            computes of each image or caption, by its content, augmentation and the tower; created if it does not exist.
            The tower then runs once, in this run or in an earlier one, and steps and evaluations run only the rest of
            the model. None: it runs in each step.
        num_augmentations: with `features`, how many augmented versions of each training image are stored; every step
            draws one of them. ``augmentation: none`` has one.
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
    num_augmentations: PositiveInt = 4

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        as_paths(self, "train", "test", "features")
        check_fields(self)


@dataclass(frozen=True)
class SimilarConfig:
    """One notion of similarity: ``{}`` for given pairs, or one of `group`, `graded` and `views`.

    Attributes:
        group: column with a group for each row; rows of a group are similar.
        graded: column or columns of features that make two rows more or less similar.
        similarity: of `graded`: ``cosine``, ``softmax`` or ``hierarchy``.
        against: of `graded`: the column of the second side.
        softness: of `graded` with ``softmax``: its temperature.
        views: number of augmented views of each image, two or more, which are similar; with `group` views are compared.
        between: the two sides; None: image and text, or images if there are views.
        known: for a key column ``positive``, ``ignore`` or ``negative``: how to treat rows that share its value.
        score: column of the rows' weights.
        temperature: fixed temperature of this notion; None: the model's, or 0.1 if there are views.
        head: projection of its own: ``mlp``, ``linear``, ``none``; None: ``mlp`` only with `views`.
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

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.graded is not None and (self.group is not None or self.views is not None):
            raise ConfigError("a notion of similarity is one of `group`, `graded` and `views`", where="similar")
        self.build()

    def build(self) -> Similarity:
        """Return the notion of similarity.

        Raises:
            ConfigError: settings that the notion does not allow.
        """
        options: dict[str, Any] = {"weight": self.weight, "known": self.known, "score": self.score}
        if self.views is not None:
            options["views"] = self.views
        if self.views:
            options |= {"between": ("image", "image"), "temperature": 0.1}
        if self.between:
            options["between"] = self.between
        if self.temperature:
            options["temperature"] = self.temperature
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
    """The pairs on which the model must not get worse; a string in place of this section is its `data`.

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

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        as_paths(self, "data")


def _as_section(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class EvaluateConfig:
    """The measurements on the held-out pairs.

    Attributes:
        retrieval: whether to measure recall from images to texts and from texts to images.
        loss: whether to measure the loss itself, in fixed batches (see `ValidationLoss`).
        group: column of groups; all members of a group count as correct. None: only an image's own texts.
        zero_shot: column of the class; None: no zero-shot classification.
        templates: prompts of the classes; or a mapping of each class to its own.
        reference: pairs on which retrieval must not get worse than `train.forget_budget` allows; None: the built-in
            sample.
    """

    retrieval: bool = True
    loss: bool = False
    group: str | None = None
    zero_shot: str | None = None
    templates: _Templates = DEFAULT_TEMPLATE
    reference: Annotated[ReferenceConfig | None, BeforeValidator(_as_section)] = None

    __pydantic_config__ = STRICT
