"""What a run is made of: frozen, validated, and readable as YAML.

RunConfig
├── model: ModelConfig          which model, which part stands still
├── data: DataConfig            which pairs, what to hold out
├── similar: [SimilarConfig]    what counts as alike
├── train: TrainConfig          the loop
└── evaluate: EvaluateConfig    what to measure
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from clipkit.data.reading.tables import TABLE_SUFFIXES, Quoting
from clipkit.errors import ConfigError, UsageError, option, speaking
from clipkit.losses.similarity import Graded, Head, Paired, SameGroup, Similarity, Treat, Views
from clipkit.modality import Modality
from clipkit.prompts import DEFAULT_TEMPLATE
from clipkit.training.config.errors import as_setting, as_yaml, config_error, no_config
from clipkit.training.config.train import _STRICT, TrainConfig, _as_lists, _as_paths
from clipkit.training.config.typed import Columns, fit
from clipkit.training.config.yaml_file import dump_yaml, read_yaml, set_value

_Templates: TypeAlias = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the towers; `lora: {}` takes these defaults.

    Attributes:
        part: which tower: ``image``, ``text``, ``both``.
        rank, alpha: the update is alpha / rank * B A.
        dropout: of what A is given.
        targets: names of layers; None: the linear layers of attention and MLP.
    """

    part: Literal["image", "text", "both"] = "both"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_lists(self, "targets")
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            found = f"{self.rank}, {self.alpha}, {self.dropout}"
            raise ConfigError(
                f"rank is at least 1, alpha above 0, dropout in [0, 1); found {found}", where="model.lora"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which model: `name` alone, or `vision` and `text`.

    Attributes:
        name: a folder, ``org/name``, ``open_clip:ARCH/TAG`` or ``open_clip:FOLDER``.
        scratch: whether the weights are drawn at random: of `name` (also ``open_clip:ARCH``) only the architecture,
            the transform and the tokenizer are taken.
        vision, text: two towers to join, folders or names of transformers models.
        tokenizer: of the text tower; None: from `text`.
        dim: of the shared space, where towers are joined.
        head: what joins them.
        freeze: towers that stand still: ``image`` (LiT, Zhai et al. 2022), ``text``.
        freeze_blocks: how many first blocks of a tower stand still, with what lies before them:
            ``{image: 6}``; negative: all but the last so many.
        lora: small matrices in place of whole weights; None: none.
        gradient_checkpointing: less memory for about a third more time.
        patch_dropout: part of the patches that training leaves out (FLIP, Li et al. 2023).
        image_size, context_length: pixels and tokens to resize the model to; None: its own.
    """

    name: str | None = None
    scratch: bool = False
    vision: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    dim: int = 512
    head: Literal["linear", "mlp"] = "linear"
    freeze: tuple[Literal["image", "text"], ...] = ()
    freeze_blocks: dict[Literal["image", "text"], int] = field(default_factory=dict)
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    patch_dropout: float = 0.0
    image_size: int | None = None
    context_length: int | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_lists(self, "freeze")
        _as_paths(self, "name", "vision", "text", "tokenizer")
        self._check_changes()
        towers = (self.vision, self.text)
        if not (all(towers) if self.name is None else not any(towers)):
            raise ConfigError(
                "a model is either `name`, or `vision` and `text`",
                where="model",
                fix=f"{option('model.name', 'openai/clip-vit-base-patch32')}, or both towers",
            )
        if self.scratch and self.name is None:
            raise ConfigError(
                "scratch draws the weights of the model that `name` names; `vision` and `text` are pretrained",
                where="model.scratch",
                fix=f"{option('model.name', 'open_clip:ViT-B-32')}, or leave out {option('model.scratch')}",
            )

    def _check_changes(self) -> None:
        adapted = () if self.lora is None else ("image", "text") if self.lora.part == "both" else (self.lora.part,)
        for part in ("image", "text"):
            ways = [part in self.freeze, part in self.freeze_blocks, part in adapted]
            if sum(ways) > 1:
                message = f"the {part} tower is named by more than one of freeze, freeze_blocks and lora"
                raise ConfigError(message, where="model", fix="keep one of them for each tower")
        if not 0 <= self.patch_dropout < 1:
            raise ConfigError(f"patch_dropout is a part of the patches, from 0 to below 1; found {self.patch_dropout}")
        for name in ("image_size", "context_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")


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


@dataclass(frozen=True)
class RunConfig:
    """A whole run, as a YAML file states it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    similar: tuple[SimilarConfig, ...] = (SimilarConfig(),)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.evaluate.reference is not None and self.train.forget_budget is None:
            message = "a reference is given, and nothing that it is for"
            raise ConfigError(
                message, where="evaluate.reference", fix=f"{option('forget_budget', 0.01)}, or leave it out"
            )
        if self.data.features is not None and "image" not in self.model.freeze:
            message = "features can be kept only of a frozen image tower; a saved model is opened with nothing frozen"
            raise ConfigError(message, where="data.features", fix=option("model.freeze", ["image"]))

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
        """From a YAML file and ``key.sub=value`` overrides, or overrides alone.

        Raises:
            ConfigError: no such file, an unknown key (with the near ones), a value of the wrong type.
        """
        if path is not None and (not Path(path).is_file() or Path(path).suffix.lower() in TABLE_SUFFIXES):
            raise no_config(Path(path))
        values = {} if path is None else read_yaml(Path(path))
        for override in overrides:
            set_value(values, override)
        return cls._parse(values, path, overrides)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """From nested mappings, as YAML gives them."""
        return cls._parse(values, None, ())

    @classmethod
    def _parse(cls, values: Mapping[str, Any], path: str | Path | None, overrides: Sequence[str]) -> RunConfig:
        with speaking(as_setting if overrides else as_yaml):  # who types overrides can type one more
            try:
                return TypeAdapter(cls).validate_python(fit(values, cls))
            except ValidationError as error:
                raise config_error(error, cls, path, overrides) from None

    def dump(self) -> str:
        """YAML that `load` reads back to an equal config."""
        return dump_yaml(dataclasses.asdict(self))
