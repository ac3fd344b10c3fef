"""The training loop's config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from clipkit.data.batches.augment import Augmentation
from clipkit.errors import ConfigError, option
from clipkit.losses.contrastive import TILE
from clipkit.paths import at_home

_STRICT = ConfigDict(extra="forbid")


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
