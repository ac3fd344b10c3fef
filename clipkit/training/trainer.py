"""A training set up: everything that can be wrong is found here, before the first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.batches.batch import Batch
from clipkit.data.batches.build_plan import build_plan
from clipkit.data.batches.loader import Loader
from clipkit.data.dataset import as_dataset
from clipkit.errors import UsageError, option
from clipkit.losses.contrastive import prior_bias
from clipkit.losses.similarity import Paired, Similarity, key_columns
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving.model_card import base_of
from clipkit.training.accelerator import make_accelerator
from clipkit.training.checkpoints.resume import run_fingerprint
from clipkit.training.checkpoints.signals import StopSignal
from clipkit.training.config.train import TrainConfig
from clipkit.training.forgetting.guardrail import Guardrail
from clipkit.training.heads import ModelWithHeads
from clipkit.training.loop import Loop, TrainResult
from clipkit.training.optimizer import layer_factors
from clipkit.training.run_folder.ownership import claim_folder, locked
from clipkit.training.setup import Evaluator, _check_scores, _flat, _number
from clipkit.training.step import LossConfig, backward
from clipkit.training.trackers import check_trackers

logger = logging.getLogger("clipkit")


class Trainer:
    """Trains a dual encoder on pairs, with any notion of similarity, on any number of processes.

    Start the program with ``python``, ``torchrun`` or ``accelerate launch``; the global batches, and with
    dropout off the gradients, are the same. After `train` the model holds the best weights, which are
    saved in ``output_dir/model`` too.

    Every few minutes a checkpoint is saved, and when a signal asks to stop. With ``resume="auto"`` the same program,
    started again, goes on from the newest one: bit for bit on the same set-up, with the same global batches on any.

    Args:
        model: is trained in place; parts that were frozen stay as they are.
        pairs: a data set with `image` and `texts`, as `load_pairs` gives it, or anything with `len` and `pairs[i]`
            (a list of dicts, a map-style torch Dataset). A column `image_features` stands in for the images of a
            locked tower (see `with_image_features`).
        config: the loop.
        similar: what counts as alike; several are added by their weights.
        evaluators: each called on every rank with the model; give metrics by key.
        reference: an evaluator of what the model is not to forget, for ``config.forget_budget``: its first metric is
            what the budget is of, and all are logged as ``reference/…``. None: `SimilarityReference`, on data that
            ship with clipkit. With a budget the first evaluator (or ``config.best``) judges the domain, the model
            that is kept is the one that `Forgetting` describes, and ``output_dir/last`` holds the fine-tuned one.

    Raises:
        UsageError: the folder holds another run (see `resume`); the batch is larger than the data; trained BatchNorm
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
        similar: Similarity | Sequence[Similarity] = Paired(),
        evaluators: Sequence[Evaluator] = (),
        reference: Evaluator | None = None,
    ) -> None:
        distributed.start()
        if isinstance(pairs, str | Path):
            raise UsageError(
                f"expected pairs, found the name {str(pairs)!r}",
                where="pairs",
                fix=f"load_pairs({str(pairs)!r}, image=COLUMN, text=COLUMN)",
            )
        pairs = as_dataset(pairs)
        self.model, self.pairs, self.config = model, pairs, config
        self.similar: list[Similarity] = list(similar) if isinstance(similar, Sequence) else [similar]
        self.evaluators = evaluators
        self.folder = claim_folder(Path(config.output_dir), may_resume=config.resume == "auto")
        if config.patience is not None and not evaluators:
            message = "patience counts evaluations, and nothing is measured"
            raise UsageError(message, where="patience", fix=f"{_held_out()}, or leave it out")
        if config.best is not None and not evaluators:
            message = f"best={config.best} chooses by a metric, and nothing is measured"
            raise UsageError(message, where="best", fix=f"{_held_out()}, or leave it out")
        if not self.similar:
            raise UsageError(
                "nothing counts as similar", where="similar", fix=option("similar", "[{}]", python="similar=Paired()")
            )
        if config.batch_size < distributed.world_size():
            raise UsageError(
                f"batch_size={config.batch_size} is global, and smaller than the {distributed.world_size()} processes",
                fix=f"raise {option('batch_size')}, or start fewer processes",
            )
        named = ("batch_size", "seed", "distinct", "balanced", "grouped", "group_size")
        self.plan = build_plan(pairs, **{name: getattr(config, name) for name in named})
        wanted = self.plan.steps_per_epoch * config.epochs
        self.total = max(1, min(round(wanted), config.max_steps or math.ceil(wanted)))
        self.contrast = self._contrast()
        self.guardrail = self._guardrail(reference)
        self._check_best()
        self.learner = ModelWithHeads(model, self.similar)
        self.loader = self._loader(pairs)
        self._refuse_batch_norm()
        if config.layer_decay is not None:
            layer_factors(model, config.layer_decay)  # or raises
        check_trackers(config.trackers)
        self.accelerator = make_accelerator(config)
        model.card = model.card.updated(
            {
                "base_model": model.card.base_model or base_of(model.name),
                "pairs": int(self.plan.captions.sum()),
                "config": {**_flat(config), "similar": [str(each) for each in self.similar]},
            }
        )

    # -- before the first step

    def _contrast(self) -> LossConfig:
        """How embeddings are compared: with the loss that the model was made for, unless the config names one."""
        config, bias = self.config, self.model.logit_bias
        loss = config.loss if config.loss != "auto" else "info_nce" if bias is None else "sigmoid"
        learnt = any(each.temperature is None for each in self.similar)
        if loss == "sigmoid" and bias is None and learnt:
            raise UsageError(
                "a sigmoid loss needs a model with a bias",
                where="loss",
                fix=f"{option('loss', 'info_nce')}, or a model with a bias (SigLIP)",
            )
        if loss == "sigmoid" and bias is not None and self.model.fresh:  # what was loaded stays
            with torch.no_grad():
                bias.fill_(prior_bias(config.batch_size))
        for dim in config.matryoshka:
            if dim > self.model.dim:
                raise UsageError(f"embeddings have {self.model.dim} dimensions; found matryoshka={config.matryoshka}")
        return LossConfig(loss, config.label_smoothing, config.matryoshka, config.tile)

    def _guardrail(self, reference: Evaluator | None) -> Guardrail | None:
        budget = self.config.forget_budget
        if budget is None:
            if reference is not None:
                message = "a reference is given, and nothing that it is for"
                raise UsageError(message, where="reference", fix=option("forget_budget", 0.01))
            return None
        if not self.evaluators:
            raise UsageError(
                "the guardrail weighs what is learnt against what is forgotten, and nothing measures what is learnt",
                where="forget_budget",
                fix=f"{_held_out()} with held-out pairs",
            )
        return Guardrail(self.model, self.folder, budget, reference)

    def _check_best(self) -> None:
        """Refuse a metric that no evaluator gives, if all of them know what they give before they measure."""
        best = self.config.best
        known: list[list[str]] = [getattr(each, "keys", list)() for each in self.measured()]
        keys = [key for some in known for key in some]
        if best is not None and all(known) and best not in keys:
            raise UsageError(
                f"no evaluator gives the metric {best!r} that `best` names",
                where="best",
                fix=f"one of: {', '.join(keys)}",
            )

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
                    fix=f"freeze the tower ({_frozen()}), choose one without BatchNorm, or use one process",
                )
            if trained and self.config.micro_batch is not None and self.config.micro_batch < self.config.batch_size:
                raise UsageError(
                    "BatchNorm of a trained tower mixes samples within each micro-batch, so that chunks would not "
                    "train what the whole batch does",
                    where=name,
                    fix=f"freeze the tower ({_frozen()}), take one without it, or leave out {option('micro_batch')}",
                )

    def first_batch(self) -> Batch:
        """This rank's part of the first global batch; an error on one rank is raised on all."""
        found: list[Batch] = []

        def fetch() -> None:
            with closing(self.loader.batches(0, 1)) as batches:
                found.append(next(batches))

        distributed.together(fetch)
        return found[0]

    def leave_out_unused(self) -> None:
        """DDP waits for every trained parameter; those that the loss never reaches stand still."""
        if distributed.world_size() == 1:
            return
        learner = self.learner
        batch = self.first_batch().to(self.model.device)
        learner.eval()
        backward(learner, batch, self.similar, self.contrast, micro_batch=self.config.micro_batch)
        unused = [name for name, each in learner.named_parameters() if each.requires_grad and each.grad is None]
        for name in unused:
            learner.get_parameter(name).requires_grad_(False)
        learner.zero_grad(set_to_none=True)
        learner.train()
        if unused:
            logger.info("%d parameters take no part in the loss: %s", len(unused), ", ".join(unused[:5]))

    def identity(self) -> dict[str, Any]:
        """What makes this run this run; see `run_fingerprint`."""
        measured = [*self.evaluators, *([] if self.guardrail is None else [self.guardrail.reference])]
        return run_fingerprint(self.config, self.learner, self.similar, self.pairs, measured)

    # -- training

    def train(self) -> TrainResult:
        """Train, evaluate, keep the best; see the class.

        Raises:
            Interrupted: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was saved.
            ResourceError: the disk cannot hold the checkpoints.
            CorruptArtefact: none of the checkpoints to resume from is whole.
        """
        with locked(self.folder), distributed.lost_processes(), StopSignal() as stop:
            return Loop(self, stop).run()

    def evaluate(self) -> dict[str, float]:
        """All evaluators' metrics and the reference's, of the model as it stands.

        They are rank 0's, on every process: what is decided by them must be decided alike.

        Raises:
            UsageError: two evaluators give the same key, one gives none, or something that is no number.
            ClipkitError: a metric is not finite.
        """
        metrics: dict[str, float] = {}
        for evaluator in self.measured():
            found = {key: _number(key, value) for key, value in evaluator(self.model).items()}
            if not found:
                name = getattr(evaluator, "name", type(evaluator).__name__)
                raise UsageError("an evaluator gives no metric", where=name)
            if both := metrics.keys() & found.keys():
                raise UsageError(f"two evaluators give the metric {min(both)!r}", fix="give one of them another name")
            metrics |= found
        return distributed.broadcast_object(metrics)

    def measured(self) -> list[Any]:
        """The evaluators, the guardrail's reference last: it decides about the best model only if `best` names it."""
        return [*self.evaluators, *([] if self.guardrail is None else [self.guardrail])]

    def counts(self) -> dict[str, int]:
        """How many images, texts and classes the metrics rest on."""
        return {key: count for each in self.measured() for key, count in getattr(each, "n", dict)().items()}


def _held_out() -> str:
    return option("data.test", 0.1, python="evaluators=[RetrievalEvaluator(test)]")


def _frozen() -> str:
    return option("model.freeze", "image", python='model.freeze("image")')
