"""The training loop's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from clipkit.data.batches.augment import Augmentation
from clipkit.embedding.decoding import Decode
from clipkit.errors import ConfigError
from clipkit.losses.contrastive import TILE
from clipkit.training.config.fields import STRICT, FractionBelow1, as_lists, as_paths, check_fields


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
        distinct: what a global batch contains at most once: ``texts``, ``image``, or columns such as a product. Rows
            that fit into no batch are left out of the epoch, and their number is reported.
        balanced: column of the class: every class is shown equally often, rare ones repeatedly.
        grouped: column with the group of each row: a batch has `group_size` rows of a group, as hard negatives within
            the batch (PK sampling, Hermans et al. 2017). Not together with `balanced`.
        group_size: rows of a group in a batch.
        loss: ``info_nce``, ``sigmoid`` (needs a model with a bias), or ``auto``: sigmoid for models with a bias. The
            bias of fresh heads begins at -ln(batch_size - 1); a loaded one does not change.
        label_smoothing: part of each target that is spread over all candidates, in [0, 1).
        matryoshka: numbers of first dimensions that also have to work on their own, such as [64, 128, 512].
        tile: rows and columns of the logits that are computed together, so that memory grows linearly with the
            batch; None: all at once.
        learning_rate: peak rate of pretrained weights (1e-5: Goyal et al. 2023, FLYP).
        head_learning_rate: peak rate of weights that begin at random: fresh heads of `from_towers`, LoRA.
        scale_learning_rate: of the logit scale and bias; None: `head_learning_rate` where the heads are fresh,
            else `learning_rate`. Adam moves them by at most this much a step.
        layer_decay: factor of the rate from each block of a pretrained tower to the block before it, such as 0.75: the
            last block learns at the full rate, the embeddings before the first one at the lowest; see `layer_factors`.
            None: all at one rate.
        weight_decay: decoupled; never on norms, biases, class tokens, embeddings of
            positions, logit scale and bias.
        betas, eps: of AdamW (Radford et al. 2021, table 18).
        warmup: part of the steps with a rising rate; then a half cosine down to zero.
        clip_grad_norm: norm to which gradients are clipped; None: never.
        ema: decay of a moving average of the weights, such as 0.999; the average is measured and kept in place of
            the weights. None: none.
        precision: ``auto`` is bf16 on devices that have it, else fp32.
        augmentation: of training images only: ``crop`` (90-100 % of the area), ``crop+flip``, ``affine``, ``simclr``,
            ``none``.
        view_augmentation: of the views that a notion of similarity compares.
        seed: of everything random.
        workers: processes that decode images, per rank; 0: this process.
        decode: ``fast`` lets the decoder of a JPEG scale it down as long as three times the model's input remains;
            ``exact`` decodes all pixels, as evaluators do.
        evaluate_every: steps between evaluations; None: once an epoch. The last step is always measured.
        forget_budget: how much of the reference metric may be lost (0.01: one point of a hundred); after training the
            weights go back towards the start as far as that requires (see `Guardrail`). None: no limit.
        best: key of the metric that chooses the weights to keep: the highest value, or the lowest where the evaluator
            says so (see `Evaluator.greater_is_better`). None: the first key of the first evaluator.
        patience: number of evaluations without a better one after which the run ends; None: it takes all its steps.
        log_every: steps between lines of metrics.jsonl.
        on_bad: ``skip`` leaves out rows and images that cannot be used and lists them in rejects.jsonl.
        max_bad: how many may be left out: a fraction of the rows (float) or a count (int).
        resume: ``auto`` goes on with the run that `output_dir` holds, from its newest checkpoint, and starts one if
            there is none; ``never``: such a folder is an error.
        save_minutes: minutes between checkpoints: the most work that can be lost.
        save_steps: also save a checkpoint every so many steps; None: only by the clock.
        skip_nonfinite: number of steps with a loss or gradient of NaN or infinity that may be skipped.
        trackers: of Accelerate: ``tensorboard``, ``wandb``, ``mlflow``, ``trackio`` … See `Trackers`.
        progress: whether to show a progress bar (lines if the output is not a terminal). Other messages always appear.
    """

    output_dir: str
    epochs: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 5.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 256
    micro_batch: PositiveInt | None = None
    distinct: tuple[str, ...] = ()
    balanced: str | None = None
    grouped: str | None = None
    group_size: int = 4
    loss: Literal["auto", "info_nce", "sigmoid"] = "auto"
    label_smoothing: FractionBelow1 = 0.0
    matryoshka: tuple[PositiveInt, ...] = ()
    tile: PositiveInt | None = TILE
    learning_rate: PositiveFloat = 1e-5
    head_learning_rate: PositiveFloat = 5e-4
    scale_learning_rate: PositiveFloat | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[FractionBelow1, FractionBelow1] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip_grad_norm: PositiveFloat | None = 1.0
    ema: FractionBelow1 | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    augmentation: Augmentation = "crop"
    view_augmentation: Augmentation = "simclr"
    seed: int = 0
    workers: NonNegativeInt = 0
    decode: Decode = "fast"
    evaluate_every: PositiveInt | None = None
    forget_budget: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] | None = None
    best: str | None = None
    patience: PositiveInt | None = None
    log_every: PositiveInt = 10
    on_bad: Literal["error", "skip"] = "error"
    max_bad: int | float = 0.1
    resume: Literal["never", "auto"] = "never"
    save_minutes: PositiveFloat = 5.0
    save_steps: PositiveInt | None = None
    skip_nonfinite: NonNegativeInt = 0
    trackers: tuple[str, ...] = ()
    progress: bool = True

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        as_lists(self, "distinct", "matryoshka", "trackers")
        as_paths(self, "output_dir")
        check_fields(self)
        if self.balanced is not None and self.grouped is not None:
            raise ConfigError("batches are either balanced or grouped", fix="leave out one of the two")
        if self.grouped is not None and (self.group_size < 2 or self.batch_size % self.group_size):
            sizes = f"batch_size={self.batch_size}, group_size={self.group_size}"
            raise ConfigError(f"grouped batches are a multiple of group_size, at least 2; found {sizes}")
