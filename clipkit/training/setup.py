"""The parts of a training: model with heads, plan, loader, loss, evaluators and processes.

`Trainer` builds them, `Loop` runs them, and the check of the gradients takes their first step.
"""

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
from clipkit.embedding.decoding import smallest_side
from clipkit.errors import ClipkitError, UsageError, option
from clipkit.evaluation.evaluator import Evaluator, Measure, as_evaluator
from clipkit.losses.contrastive import prior_bias
from clipkit.losses.similarity import Paired, Similarity, key_columns
from clipkit.models.allocator import keep_freed_memory
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving.model_card import base_of
from clipkit.training.accelerator import make_accelerator
from clipkit.training.checkpoints.resume import run_fingerprint
from clipkit.training.checks.arguments import check_arguments, check_scores, held_out, refuse_batch_norm, refuse_name
from clipkit.training.config.train import TrainConfig
from clipkit.training.forgetting.guardrail import Guardrail
from clipkit.training.heads import ModelWithHeads
from clipkit.training.optimizer import layer_factors
from clipkit.training.run_folder.ownership import claim_folder
from clipkit.training.run_folder.trackers import check_trackers
from clipkit.training.step import LossConfig, backward

logger = logging.getLogger("clipkit")


class TrainSetup:
    """Builds the parts of a training, and refuses whatever cannot be trained before the first step.

    Args:
        model, pairs, config, similar, evaluators, reference: as for `Trainer`, which lists the errors, too.

    Attributes:
        folder: of the run, claimed.
        plan: the rows of each global batch.
        total: number of steps to take.
        learner: the model, and the heads of its notions of similarity.
        loss_config: how embeddings are compared.
        loader: loads this rank's part of each global batch.
        guardrail: measures what must not be forgotten; None without a budget.
        accelerator: Accelerate's object for this process.
    """

    def __init__(
        self,
        model: DualEncoder,
        pairs: Any,
        config: TrainConfig,
        *,
        similar: Similarity | Sequence[Similarity] = Paired(),
        evaluators: Sequence[Measure] = (),
        reference: Measure | None = None,
    ) -> None:
        distributed.start()
        refuse_name(pairs)
        self.model, self.pairs, self.config = model, as_dataset(pairs), config
        self.similar: list[Similarity] = list(similar) if isinstance(similar, Sequence) else [similar]
        self.evaluators = [as_evaluator(measure) for measure in evaluators]
        self.folder = claim_folder(Path(config.output_dir), may_resume=config.resume == "auto")
        check_arguments(config, self.similar, measures=bool(evaluators))
        sampling = ("batch_size", "seed", "distinct", "balanced", "grouped", "group_size")
        self.plan = build_plan(self.pairs, **{name: getattr(config, name) for name in sampling})
        steps = self.plan.steps_per_epoch * config.epochs
        self.total = max(1, min(round(steps), config.max_steps or math.ceil(steps)))
        self.loss_config = self._build_loss_config()
        self.guardrail = self._guardrail(reference)
        self._directions: dict[str, bool] = {}  # whether greater is better, of each metric that was measured
        self._check_best()
        self.learner = ModelWithHeads(model, self.similar)
        self.loader = self._loader()
        model.train()
        refuse_batch_norm(model, config)
        if config.layer_decay is not None:
            layer_factors(model, config.layer_decay)  # raises if it cannot be applied
        check_trackers(config.trackers)
        self.accelerator = make_accelerator(config)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        model.card = model.card.updated(
            {
                "base_model": model.card.base_model or base_of(model.name),
                "pairs": int(self.plan.captions.sum()),
                "config": {**_flat(config), "similar": [str(similarity) for similarity in self.similar]},
            }
        )

    # -- the parts

    def _build_loss_config(self) -> LossConfig:
        """Return how embeddings are compared: with the model's own loss, unless the config names one."""
        config, bias = self.config, self.model.logit_bias
        loss = config.loss
        if loss == "auto":
            loss = "info_nce" if bias is None else "sigmoid"
        uses_model_scale = any(similarity.temperature is None for similarity in self.similar)
        if loss == "sigmoid" and bias is None and uses_model_scale:
            raise UsageError(
                "a sigmoid loss needs a model with a bias",
                where="loss",
                fix=f"{option('loss', 'info_nce')}, or a model with a bias (SigLIP)",
            )
        if loss == "sigmoid" and bias is not None and self.model.fresh:  # a loaded bias stays
            with torch.no_grad():
                bias.fill_(prior_bias(config.batch_size))
        for dim in config.matryoshka:
            if dim > self.model.dim:
                raise UsageError(f"embeddings have {self.model.dim} dimensions; found matryoshka={config.matryoshka}")
        return LossConfig(loss, config.label_smoothing, config.matryoshka, config.tile)

    def _guardrail(self, reference: Measure | None) -> Guardrail | None:
        budget = self.config.forget_budget
        if budget is None:
            if reference is not None:
                message = "a reference is given, but no forget_budget that uses it"
                raise UsageError(message, where="reference", fix=option("forget_budget", 0.01))
            return None
        if not self.evaluators:
            raise UsageError(
                "the guardrail compares what is learnt with what is forgotten, and nothing measures what is learnt",
                where="forget_budget",
                fix=f"{held_out()} with held-out pairs",
            )
        return Guardrail(self.model, self.folder, budget, reference)

    def _check_best(self) -> None:
        """Refuse a metric that no evaluator gives, if all evaluators know their keys before they measure."""
        best = self.config.best
        keys_of_each = [evaluator.keys() for evaluator in self.measured()]
        keys = [key for evaluator_keys in keys_of_each for key in evaluator_keys]
        if best is not None and all(keys_of_each) and best not in keys:
            raise UsageError(
                f"no evaluator gives the metric {best!r} that `best` names",
                where="best",
                fix=f"one of: {', '.join(keys)}",
            )

    def _loader(self) -> Loader:
        """Return the loader of the sides, views and key columns that the notions of similarity read."""
        config = self.config
        codes, numbers = key_columns(self.similar)
        check_scores(self.pairs, self.similar)
        sides = {side for similarity in self.similar for side in similarity.between}
        with_images = [similarity for similarity in self.similar if "image" in similarity.between]
        compares_unaugmented = any(not similarity.views for similarity in with_images)
        return Loader(
            self.pairs,
            self.model.processor,
            self.plan,
            columns=codes,
            numbers=numbers,
            sides=sorted(sides),
            base=not with_images or compares_unaugmented,
            views=max((similarity.views for similarity in with_images), default=0),
            augmentation=config.augmentation,
            view_augmentation=config.view_augmentation,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=config.workers,
            on_bad=config.on_bad,
            at_least=smallest_side(config.decode, self.model.processor),
        )

    # -- for the loop and the checks

    def first_batch(self) -> Batch:
        """Return this rank's part of the first global batch; an error on one rank is raised on all."""
        fetched: list[Batch] = []

        def fetch() -> None:
            with closing(self.loader.batches(0, 1)) as batches:
                fetched.append(next(batches))

        distributed.together(fetch)
        return fetched[0]

    def leave_out_unused(self) -> None:
        """Freeze the parameters that the loss never reaches, because DDP waits for every trained one."""
        if distributed.world_size() == 1:
            return
        learner = self.learner
        batch = self.first_batch().to(self.model.device)
        learner.eval()
        backward(learner, batch, self.similar, self.loss_config, micro_batch=self.config.micro_batch)
        unused = []
        for name, parameter in learner.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
                unused.append(name)
        learner.zero_grad(set_to_none=True)
        learner.train()
        if unused:
            logger.info("%d parameters take no part in the loss: %s", len(unused), ", ".join(unused[:5]))

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the run; see `run_fingerprint`."""
        evaluators = list(self.evaluators)
        if self.guardrail is not None:
            evaluators.append(self.guardrail.reference)
        return run_fingerprint(self.config, self.learner, self.similar, self.pairs, evaluators)

    # -- measuring

    def evaluate(self) -> dict[str, float]:
        """Return all evaluators' metrics and the reference's, of the model with its current weights.

        Every process gets those of rank 0, so that all decide alike.

        Raises:
            UsageError: two evaluators give the same key, one gives none, or a value that is not a number.
            ClipkitError: a metric is not finite.
        """
        metrics: dict[str, float] = {}
        for evaluator in self.measured():
            own_metrics = {key: _number(key, value) for key, value in evaluator(self.model).items()}
            if not own_metrics:
                raise UsageError("an evaluator gives no metric", where=evaluator.name)
            if duplicates := metrics.keys() & own_metrics.keys():
                raise UsageError(
                    f"two evaluators give the metric {min(duplicates)!r}", fix="give one of them another name"
                )
            metrics |= own_metrics
            self._directions |= {key: evaluator.greater_is_better(key) for key in own_metrics}
        return distributed.broadcast_object(metrics)

    def measured(self) -> list[Evaluator]:
        """Return the evaluators; the guardrail comes last, so that it decides only if `best` names its metric."""
        return self.evaluators if self.guardrail is None else [*self.evaluators, self.guardrail]

    def greater_is_better(self, key: str) -> bool:
        """Whether a higher value of a metric that `evaluate` returned is better, as its evaluator says."""
        return self._directions[key]

    def counts(self) -> dict[str, int]:
        """Return how many images, texts and classes the metrics rest on."""
        return {key: count for evaluator in self.measured() for key, count in evaluator.counts().items()}


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"a metric is a number, found {value!r}", where=key, fix="fix the evaluator") from None
    if not math.isfinite(number):
        raise ClipkitError(
            f"a metric must be finite, found {number}", where=key, fix="check what the model gives there"
        )
    return number


def _flat(config: TrainConfig) -> dict[str, Any]:
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(config).items()}
