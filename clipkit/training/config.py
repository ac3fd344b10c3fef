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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from clipkit.data.augment import Augmentation
from clipkit.data.tables import TABLE_SUFFIXES, Quoting
from clipkit.errors import ConfigError, UsageError, option, speaking
from clipkit.losses.contrastive import TILE
from clipkit.losses.graded import Graded
from clipkit.losses.similar import Head, Paired, SameGroup, Side, Similar, Treat, Views
from clipkit.paths import at_home
from clipkit.prompts import DEFAULT_TEMPLATE
from clipkit.training.config_errors import as_setting, as_yaml, config_error, no_config
from clipkit.training.typed import Columns, fit
from clipkit.training.yaml_file import dump_yaml, read_yaml, set_value

_STRICT = ConfigDict(extra="forbid")
_Templates: TypeAlias = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. The defaults are meant for fine-tuning pretrained weights.

    Attributes:
        output_dir: folder of the run; must not hold another run.
        epochs: passes over the data; may be fractional.
        max_steps: steps at most, whatever `epochs` says.
        batch_size: pairs of a global batch, over all ranks: the negatives of the loss.
        micro_batch: samples that one device embeds at once; the gradients stay those of the whole batch (Gao et al.
            2021, GradCache), for one more forward pass. None: all.
        distinct: what a global batch holds at most once: ``texts``, ``image``, or columns such as a product. Rows that
            find no place are left out of the epoch, and their number is told.
        balanced: column of the class: each is shown equally often, rare ones again and again.
        grouped: column whose values come `group_size` rows at a time: hard negatives within the batch (PK sampling,
            Hermans et al. 2017). Not together with `balanced`.
        group_size: rows of a group in a batch.
        loss: ``info_nce``, ``sigmoid`` (needs a model with a bias), or ``auto``: sigmoid for models with a bias. The
            bias of fresh heads begins at -ln(batch_size - 1); one that was loaded stays.
        label_smoothing: part of each target that is spread over all that is compared.
        matryoshka: numbers of dimensions that each have to serve on their own, such as [64, 128, 512].
        tile: rows and columns of the logits that are looked at together, so that memory grows linearly with the
            batch; None: all at once.
        learning_rate: peak rate of pretrained weights (1e-5: Goyal et al. 2023, FLYP).
        head_learning_rate: peak rate of weights that start at random: fresh heads of `from_towers`, LoRA.
        scale_learning_rate: of the logit scale and bias; None: `head_learning_rate` where the heads are fresh,
            else `learning_rate`. Adam moves them by at most this much a step.
        layer_decay: factor of the rate from each block of a pretrained tower to the block before it, such as 0.75: the
            last block learns at the full rate, what lies before the first one the slowest; see `layer_factors`. None:
            all at one rate.
        weight_decay: decoupled; never on norms, biases, class tokens, embeddings of
            positions, logit scale and bias.
        betas, eps: of AdamW (Radford et al. 2021, table 18).
        warmup: part of the steps with a rising rate; then a half cosine down to zero.
        clip_grad_norm: norm to which gradients are clipped; None: never.
        ema: decay of a moving average of the weights, such as 0.999, which is measured and kept in their place; None:
            none.
        precision: ``auto`` is bf16 on devices that have it, else fp32.
        augmentation: of training images only: ``crop`` (90-100 % of the area), ``crop+flip``, ``affine``, ``simclr``,
            ``none``.
        view_augmentation: of the views that a notion of similarity compares.
        seed: of everything random.
        workers: processes that decode images, per rank; 0: this process.
        evaluate_every: steps between evaluations; None: once an epoch. The last step is always measured.
        forget_budget: how much of the reference metric may be lost (0.01: one point of a hundred); after training the
            weights go back towards the start as far as that needs (see `Guardrail`). None: as far as it goes.
        best: metric key that chooses the weights to keep, the highest (of ranks and losses: the lowest); None: the
            first key of the first evaluator.
        patience: evaluations without a better one after which the run ends; None: it takes all its steps.
        log_every: steps between lines of metrics.jsonl.
        on_bad: ``skip`` leaves out rows and images that cannot be used and lists them in rejects.jsonl.
        max_bad: how many may be left out: a fraction of the rows (float) or a count (int).
        resume: ``auto`` goes on with the run that `output_dir` holds, from its newest checkpoint, and begins where
            there is none; ``never``: such a folder is an error.
        save_minutes: between checkpoints: as much work is lost at most.
        save_steps: a checkpoint also after each so many steps; None: by the clock alone.
        skip_nonfinite: steps with a loss or gradient that is no number that may be left out before the run stops.
        trackers: of Accelerate: ``tensorboard``, ``wandb``, ``mlflow``, ``trackio`` … See `Trackers`.
        progress: whether to show a progress bar, or lines where no one watches. All else is said without it, too.
    """

    output_dir: str
    epochs: float = 5.0
    max_steps: int | None = None
    batch_size: int = 256
    micro_batch: int | None = None
    distinct: tuple[str, ...] = ()
    balanced: str | None = None
    grouped: str | None = None
    group_size: int = 4
    loss: Literal["auto", "info_nce", "sigmoid"] = "auto"
    label_smoothing: float = 0.0
    matryoshka: tuple[int, ...] = ()
    tile: int | None = TILE
    learning_rate: float = 1e-5
    head_learning_rate: float = 5e-4
    scale_learning_rate: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup: float = 0.1
    clip_grad_norm: float | None = 1.0
    ema: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    augmentation: Augmentation = "crop"
    view_augmentation: Augmentation = "simclr"
    seed: int = 0
    workers: int = 0
    evaluate_every: int | None = None
    forget_budget: float | None = None
    best: str | None = None
    patience: int | None = None
    log_every: int = 10
    on_bad: Literal["error", "skip"] = "error"
    max_bad: int | float = 0.1
    resume: Literal["never", "auto"] = "never"
    save_minutes: float = 5.0
    save_steps: int | None = None
    skip_nonfinite: int = 0
    trackers: tuple[str, ...] = ()
    progress: bool = True

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_lists(self, "distinct", "matryoshka", "trackers")
        _as_paths(self, "output_dir")
        _positive(
            self, "epochs", "batch_size", "learning_rate", "head_learning_rate", "log_every", "eps", "save_minutes"
        )
        optional = ("max_steps", "scale_learning_rate", "evaluate_every", "save_steps", "clip_grad_norm", "patience")
        for name in (*optional, "micro_batch", "tile"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is a part of the steps, between 0 and 1; found {self.warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing lies between 0 and 1, found {self.label_smoothing}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"ema is a decay in [0, 1), found {self.ema}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is a factor above 0 and at most 1, found {self.layer_decay}")
        if any(dim < 1 for dim in self.matryoshka):
            raise ConfigError(f"matryoshka lists numbers of dimensions, found {self.matryoshka}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), found {self.betas}")
        if self.balanced is not None and self.grouped is not None:
            raise ConfigError("batches are either balanced or grouped", fix="leave out one of the two")
        if self.grouped is not None and (self.group_size < 2 or self.batch_size % self.group_size):
            found = f"batch_size={self.batch_size}, group_size={self.group_size}"
            raise ConfigError(f"grouped batches are a multiple of group_size, at least 2; found {found}")
        if not math.isfinite(self.epochs):
            raise ConfigError(f"epochs must be finite, found {self.epochs}")
        if self.forget_budget is not None and not 0 <= self.forget_budget < math.inf:
            raise ConfigError(f"forget_budget is a loss that is allowed, at least 0; found {self.forget_budget}")
        for name in ("weight_decay", "workers", "skip_nonfinite"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, found {getattr(self, name)}")


def _as_lists(config: object, *names: str) -> None:
    """One value becomes a tuple of one: of a str the letters would be taken for items."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str | int):
            object.__setattr__(config, name, (value,))


def _as_paths(config: object, *names: str) -> None:
    """`~` is the home folder, also where no shell has read it."""
    for name in names:
        value = getattr(config, name)
        if value == "":
            raise ConfigError(f"{name} is empty", fix=option(name, "FOLDER" if name == "output_dir" else "NAME"))
        if isinstance(value, str):
            object.__setattr__(config, name, at_home(value))


def _positive(config: TrainConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be greater than 0, found {getattr(config, name)}")


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
        feature_draws: with `features`, how many augmented versions of each training image are kept, of which every
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
    feature_draws: int = 4

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _as_paths(self, "train", "test", "features")
        if self.feature_draws < 1:
            raise ConfigError(f"feature_draws must be at least 1, found {self.feature_draws}", where="data")


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
    between: tuple[Side, Side] | None = None
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

    def build(self) -> Similar:
        """The notion itself.

        Raises:
            ConfigError: what the notion does not allow.
        """
        images: tuple[Side, Side] = ("image", "image")
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
