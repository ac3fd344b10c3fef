"""Checks that refuse, before the first step, what cannot be trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipkit import distributed
from clipkit.data.dataset import number_values
from clipkit.errors import DataError, UsageError, option
from clipkit.losses.similarity import Similarity
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config.train import TrainConfig


def refuse_name(pairs: Any) -> None:
    """Refuse the name of a data set in place of the data set."""
    if isinstance(pairs, str | Path):
        raise UsageError(
            f"expected pairs, found the name {str(pairs)!r}",
            where="pairs",
            fix=f"load_pairs({str(pairs)!r}, image=COLUMN, text=COLUMN)",
        )


def check_arguments(config: TrainConfig, similar: Sequence[Similarity], *, measures: bool) -> None:
    """Refuse settings that contradict each other.

    Args:
        config: of the loop.
        similar: the notions of similarity.
        measures: whether there is an evaluator.

    Raises:
        UsageError: a setting that needs another one, a batch smaller than the number of processes.
    """
    if config.patience is not None and not measures:
        message = "patience counts evaluations, and nothing is measured"
        raise UsageError(message, where="patience", fix=f"{held_out()}, or leave it out")
    if config.best is not None and not measures:
        message = f"best={config.best} chooses by a metric, and nothing is measured"
        raise UsageError(message, where="best", fix=f"{held_out()}, or leave it out")
    if not similar:
        raise UsageError(
            "nothing counts as similar", where="similar", fix=option("similar", "[{}]", python="similar=Paired()")
        )
    if config.batch_size < distributed.world_size():
        raise UsageError(
            f"batch_size={config.batch_size} is global, and smaller than the {distributed.world_size()} processes",
            fix=f"raise {option('batch_size')}, or start fewer processes",
        )


def check_scores(pairs: Any, similar: Sequence[Similarity]) -> None:
    """Refuse scores that are not finite or are below 0."""
    columns = {similarity.score for similarity in similar if similarity.score is not None}
    for column in columns:
        scores = number_values(pairs, column)
        bad = ~(scores.isfinite() & (scores >= 0))
        if scores.ndim != 1:  # a list in each row
            bad = torch.ones(1, dtype=torch.bool)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise DataError(
                f"scores are numbers of at least 0; found {pairs[column][row]!r}",
                where=f"column {column!r}, row {row}",
                fix="fix the column, or leave out `score`",
            )


def refuse_batch_norm(model: DualEncoder, config: TrainConfig) -> None:
    """Refuse BatchNorm that would see only a part of the batch; the model is in training mode."""
    several = distributed.world_size() > 1
    chunked = config.micro_batch is not None and config.micro_batch < config.batch_size
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or not module.training:
            continue
        if several:
            raise UsageError(
                "BatchNorm of a trained tower mixes samples within each rank, so that several ranks would train "
                "differently from one",
                where=name,
                fix=f"freeze the tower ({_frozen()}), choose one without BatchNorm, or use one process",
            )
        if chunked:
            raise UsageError(
                "BatchNorm of a trained tower mixes samples within each micro-batch, so that micro-batches would train "
                "differently from the whole batch",
                where=name,
                fix=f"freeze the tower ({_frozen()}), take one without it, or leave out {option('micro_batch')}",
            )


def held_out() -> str:
    """Return how the user holds pairs out, as a shell option or in Python."""
    return option("data.test", 0.1, python="evaluators=[RetrievalEvaluator(test)]")


def _frozen() -> str:
    return option("model.freeze", "image", python='model.freeze("image")')
