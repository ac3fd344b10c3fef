"""What cannot be trained as it is given; all of it is refused before the first step."""

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
    """Refuse the name of data in place of the data themselves."""
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
    """Refuse scores that are not weights."""
    for column in {notion.score for notion in similar} - {None}:
        scores = number_values(pairs, str(column))
        bad = ~(scores.isfinite() & (scores >= 0)) if scores.ndim == 1 else torch.ones(1, dtype=torch.bool)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise DataError(
                f"scores are numbers of at least 0; found {pairs[str(column)][row]!r}",
                where=f"column {column!r}, row {row}",
                fix="mend the column, or leave out `score`",
            )


def refuse_batch_norm(model: DualEncoder, config: TrainConfig) -> None:
    """Refuse BatchNorm that would see a part of the batch; the model is in training mode."""
    several = distributed.world_size() > 1
    chunked = config.micro_batch is not None and config.micro_batch < config.batch_size
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or not module.training:
            continue
        if several:
            raise UsageError(
                "BatchNorm of a trained tower mixes samples within each rank, so that several ranks would not "
                "train what one does",
                where=name,
                fix=f"freeze the tower ({_frozen()}), choose one without BatchNorm, or use one process",
            )
        if chunked:
            raise UsageError(
                "BatchNorm of a trained tower mixes samples within each micro-batch, so that chunks would not "
                "train what the whole batch does",
                where=name,
                fix=f"freeze the tower ({_frozen()}), take one without it, or leave out {option('micro_batch')}",
            )


def held_out() -> str:
    """How to hold pairs out, as it is typed where the user is."""
    return option("data.test", 0.1, python="evaluators=[RetrievalEvaluator(test)]")


def _frozen() -> str:
    return option("model.freeze", "image", python='model.freeze("image")')
