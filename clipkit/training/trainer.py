"""The loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.keys import number_values
from clipkit.data.loader import Loader
from clipkit.data.map_style import as_table
from clipkit.data.plan import hash64
from clipkit.data.planned import plan_of
from clipkit.errors import ClipkitError, DataError, TooManyRejected, UsageError
from clipkit.files import write_json
from clipkit.losses.contrastive import Loss, prior_bias
from clipkit.losses.similar import Paired, Similar, key_columns
from clipkit.models.card import base_of
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config import TrainConfig
from clipkit.training.folder import Best, Log, claim_folder, write_rejects
from clipkit.training.launch import make_accelerator
from clipkit.training.learner import Learner
from clipkit.training.optim import build_optimizer, schedule
from clipkit.training.preflight import preflight
from clipkit.training.progress import Progress
from clipkit.training.step import Contrast, backward

logger = logging.getLogger("clipkit")

Evaluator = Callable[[DualEncoder], Mapping[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        metrics: of the weights that were kept.
        step: after which these weights stood, from 1.
        steps: taken in all.
        seconds: of wall clock, evaluations included.
        history: every line of metrics.jsonl.
        rejected: rows left out because their image could not be used.
    """

    metrics: dict[str, float]
    step: int
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    rejected: list[dict[str, Any]] = field(default_factory=list, repr=False)


class Trainer:
    """Trains a dual encoder on pairs, with any notion of similarity, on any number of processes.

    Start the program with ``python``, ``torchrun`` or ``accelerate launch``; the global batches, and with
    dropout off the gradients, are the same. After `train` the model holds the best weights, which are
    saved in ``output_dir/model`` too.

    Args:
        model: is trained in place; parts that were frozen stay as they are.
        pairs: a data set with `image` and `texts`, as `load_pairs` gives it, or anything with `len` and `pairs[i]`
            (a list of dicts, a map-style torch Dataset). A column `image_features` stands in for the images of a
            locked tower (see `with_image_features`).
        config: the loop.
        similar: what counts as alike; several are added by their weights.
        evaluators: each called on every rank with the model; give metrics by key.

    Raises:
        UsageError: the folder holds another run; the batch is larger than the data; trained BatchNorm
            on several ranks or with micro-batches; a sigmoid loss without a bias; a launcher whose processes are
            not connected; a stream in place of data.
        DataError: scores that are no weights; a row without captions.
    """

    def __init__(
        self,
        model: DualEncoder,
        pairs: Any,
        config: TrainConfig,
        *,
        similar: Similar | Sequence[Similar] = Paired(),
        evaluators: Sequence[Evaluator] = (),
    ) -> None:
        distributed.start()
        pairs = as_table(pairs)
        self.model, self.pairs, self.config = model, pairs, config
        self.similar: list[Similar] = list(similar) if isinstance(similar, Sequence) else [similar]
        self.evaluators = evaluators
        self.folder = claim_folder(Path(config.output_dir))
        if not self.similar:
            raise UsageError("nothing counts as similar", where="similar", fix="similar=Paired()")
        if config.batch_size < distributed.world_size():
            raise UsageError(
                f"batch_size={config.batch_size} is global, and smaller than the {distributed.world_size()} processes",
                fix="raise batch_size, or start fewer processes",
            )
        named = ("batch_size", "seed", "distinct", "balanced", "grouped", "group_size")
        self.plan = plan_of(pairs, **{name: getattr(config, name) for name in named})
        wanted = self.plan.steps_per_epoch * config.epochs
        self.total = max(1, min(round(wanted), config.max_steps or math.ceil(wanted)))
        self.contrast = self._contrast()
        self.learner = Learner(model, self.similar)
        self.loader = self._loader(pairs)
        self._refuse_batch_norm()
        self.accelerator = make_accelerator(config)
        model.card = model.card.updated(
            {
                "base_model": model.card.base_model or base_of(model.name),
                "pairs": int(self.plan.captions.sum()),
                "config": {**_flat(config), "similar": [str(each) for each in self.similar]},
            }
        )

    # -- before the first step

    def _contrast(self) -> Contrast:
        """How embeddings are compared: with the loss that the model was made for, unless the config names one."""
        config, bias = self.config, self.model.logit_bias
        loss = config.loss if config.loss != "auto" else "info_nce" if bias is None else "sigmoid"
        learnt = any(each.temperature is None for each in self.similar)
        if loss == "sigmoid" and bias is None and learnt:
            raise UsageError(
                "a sigmoid loss needs a model with a bias",
                where="loss",
                fix="DualEncoder.from_towers(…, logit_bias=-10), a SigLIP model, or loss=info_nce",
            )
        if loss == "sigmoid" and bias is not None and self.model.fresh:  # what was loaded stays
            with torch.no_grad():
                bias.fill_(prior_bias(config.batch_size))
        for dim in config.matryoshka:
            if dim > self.model.dim:
                raise UsageError(f"embeddings have {self.model.dim} dimensions; found matryoshka={config.matryoshka}")
        return Contrast(loss, config.label_smoothing, config.matryoshka, config.tile)

    def _loader(self, pairs: Any) -> Loader:
        """What carries the sides, views and keys that the notions read."""
        config = self.config
        codes, numbers = key_columns(self.similar)
        _check_scores(pairs, self.similar)
        shown = [each for each in self.similar if "image" in each.between]
        return Loader(
            pairs,
            self.model.processor,
            self.plan,
            columns=codes,
            numbers=numbers,
            sides=sorted({side for each in self.similar for side in each.between}),
            base=not shown or any(not each.views for each in shown),
            views=max((each.views for each in shown), default=0),
            augmentation=config.augmentation,
            view_augmentation=config.view_augmentation,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=config.workers,
            on_bad=config.on_bad,
        )

    def _refuse_batch_norm(self) -> None:
        self.model.train()
        for name, module in self.model.named_modules():
            trained = isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training
            if trained and distributed.world_size() > 1:
                raise UsageError(
                    "BatchNorm of a trained tower mixes samples within each rank, so that several ranks would not "
                    "train what one does",
                    where=name,
                    fix='freeze the tower (model.freeze("image")), choose one without BatchNorm, or use one process',
                )
            if trained and self.config.micro_batch is not None and self.config.micro_batch < self.config.batch_size:
                raise UsageError(
                    "BatchNorm of a trained tower mixes samples within each micro-batch, so that chunks would not "
                    "train what the whole batch does",
                    where=name,
                    fix='freeze the tower (model.freeze("image")), take one without it, or leave out micro_batch',
                )

    def leave_out_unused(self) -> None:
        """DDP waits for every trained parameter; those that the loss never reaches stand still."""
        if distributed.world_size() == 1:
            return
        learner = self.learner
        batch = next(iter(self.loader.batches(0, 1))).to(self.model.device)
        learner.eval()
        backward(learner, batch, self.similar, self.contrast, micro_batch=self.config.micro_batch)
        unused = [name for name, each in learner.named_parameters() if each.requires_grad and each.grad is None]
        for name in unused:
            learner.get_parameter(name).requires_grad_(False)
        learner.zero_grad(set_to_none=True)
        learner.train()
        if unused:
            logger.info("%d parameters take no part in the loss: %s", len(unused), ", ".join(unused[:5]))

    def _preflight(self, progress: Progress) -> None:
        """Say what this data at this batch allows, on rank 0; the others wait at the first collective."""
        if not distributed.is_main():
            return
        sigmoid = self.contrast.loss == "sigmoid"
        found = preflight(
            self.model, self.pairs, self.plan, self.similar, self.config, steps=self.total, sigmoid=sigmoid
        )
        write_json(self.folder / "preflight.json", {**found.as_dict(), "plan": list(self.plan.notes)})
        for line in [*self.plan.notes, *found.lines()]:
            progress.note(line)

    # -- the loop

    def train(self) -> TrainResult:
        """Train, evaluate, keep the best; see the class."""
        config, model, learner = self.config, self.model, self.learner.to(self.accelerator.device)
        self.leave_out_unused()
        optimizer = build_optimizer(model, config, heads=learner.heads)
        wrapped, optimizer = self.accelerator.prepare(learner, optimizer)
        self.accelerator.init_trackers("clipkit", config=_flat(config))
        ceiling = max(math.log(100), float(model.logit_scale.detach()))  # what was loaded may lie above 100
        every = config.evaluate_every or self.plan.steps_per_epoch
        keeper = Best(model, self.folder, config.best)
        rejected: dict[int, dict[str, Any]] = {}  # by row: a bad image comes back each epoch
        start = time.perf_counter()
        wrapped.train()
        shown = config.progress and distributed.is_main()
        with Log(self.folder / "metrics.jsonl") as log, Progress(self.total, "training", shown=shown) as progress:
            self._preflight(progress)
            for step, batch in enumerate(self.loader.batches(0, self.total), start=1):
                rejected |= {each["row"]: each for each in batch.rejected}
                self._tolerate(len(rejected))
                torch.manual_seed(hash64(config.seed, step, distributed.rank()) >> 1)
                factor = schedule(step - 1, self.total, config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor

                batch = batch.to(self.accelerator.device)
                loss = backward(
                    wrapped,
                    batch,
                    self.similar,
                    self.contrast,
                    micro_batch=config.micro_batch,
                    send=self.accelerator.backward,
                )
                norm = self._clip(learner)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    model.logit_scale.clamp_(max=ceiling)

                if step % config.log_every == 0 or step == self.total or step == 1:
                    line = self._measured(step, loss, norm, factor, start)
                    log.write(line)
                    self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
                    progress.show(step, loss=line["loss"], scale=line["logit_scale"])
                else:
                    progress.show(step)
                if self.evaluators and (step % every == 0 or step == self.total):
                    metrics = self.evaluate()
                    log.write({"step": step, **metrics})
                    self.accelerator.log(metrics, step=step)
                    keeper.offer(step, metrics, self._counts(), progress)
                    wrapped.train()
        seconds = time.perf_counter() - start
        self._unwrap(wrapped)
        metrics, step = keeper.restore(self.total)
        model.name = str(self.folder / "model")  # from where it can be opened again, for indexes and results
        for tracker in self.accelerator.trackers:  # end_training would also end the process group
            tracker.finish()
        for other in distributed.all_gather_object(rejected):
            rejected |= other
        lines = [{"stage": "train", **rejected[row]} for row in sorted(rejected)]
        lines += [{"stage": "evaluate", **vars(e)} for each in self.evaluators for e in getattr(each, "rejected", [])]
        write_rejects(self.folder / "rejects.jsonl", lines)
        return TrainResult(metrics, step, self.total, seconds, log.lines, lines)

    def evaluate(self) -> dict[str, float]:
        """All evaluators' metrics, of the model as it stands.

        Raises:
            UsageError: two evaluators give the same key.
        """
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators:
            found = dict(evaluator(self.model))
            if both := metrics.keys() & found.keys():
                raise UsageError(f"two evaluators give the metric {min(both)!r}", fix="give one of them another name")
            metrics |= found
        return metrics

    def _counts(self) -> dict[str, int]:
        return {key: count for each in self.evaluators for key, count in getattr(each, "n", dict)().items()}

    def _tolerate(self, rejected: int) -> None:
        limit = self.config.max_bad
        rows = limit if isinstance(limit, int) else limit * len(self.plan.captions)
        if rejected > rows / distributed.world_size():  # each process sees its share
            raise TooManyRejected(
                f"{rejected} of {len(self.plan.captions)} images cannot be used, more than max_bad={limit} allows",
                where=self.folder,
                fix="`clipkit check data` lists them; mend them, or raise max_bad",
            )

    def _clip(self, model: torch.nn.Module) -> float:
        limit = math.inf if self.config.clip_grad_norm is None else self.config.clip_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(model.parameters(), limit))
        # gradients are summed over ranks before this, so all ranks see the same and stop together;
        # with fp16 the gradient scaler skips such a step by itself
        if not math.isfinite(norm) and self.accelerator.mixed_precision != "fp16":
            raise ClipkitError(
                f"the gradient is {norm}; the step was not applied",
                where=self.folder,
                fix="look for broken images or captions, lower learning_rate, or use precision=fp32",
            )
        return norm

    def _measured(self, step: int, loss: Loss, norm: float, factor: float, start: float) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        mean = distributed.gather_rows(torch.stack(loss).detach().float().reshape(1, 2)).mean(dim=0)
        return {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "loss": float(mean[0]),
            "kl": float(mean[1]),
            "logit_scale": float(self.model.logit_scale.detach().exp()),
            "gradient_norm": norm if math.isfinite(norm) else None,  # the scaler of fp16 skips such steps
            "learning_rate": self.config.learning_rate * factor,
            "pairs_per_second": round(step * self.config.batch_size / seconds, 2),
            "seconds": round(seconds, 3),
        }

    def _unwrap(self, wrapped: torch.nn.Module) -> None:
        self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


def _check_scores(pairs: Any, similar: Sequence[Similar]) -> None:
    for column in {each.score for each in similar} - {None}:
        scores = number_values(pairs, str(column))
        bad = ~(scores.isfinite() & (scores >= 0)) if scores.ndim == 1 else torch.ones(1, dtype=torch.bool)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise DataError(
                f"scores are numbers of at least 0; found {pairs[str(column)][row]!r}",
                where=f"column {column!r}, row {row}",
                fix="mend the column, or leave out `score`",
            )


def _flat(config: TrainConfig) -> dict[str, Any]:
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(config).items()}
