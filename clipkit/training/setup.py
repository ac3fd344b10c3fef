"""What `Trainer` and `Loop` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clipkit.data.dataset import number_values
from clipkit.errors import ClipkitError, DataError, UsageError
from clipkit.losses.similarity import Similarity
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config.train import TrainConfig

Evaluator = Callable[[DualEncoder], Mapping[str, float]]


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"a metric is a number, found {value!r}", where=key, fix="mend the evaluator") from None
    if not math.isfinite(number):
        raise ClipkitError(f"a metric must be finite, found {number}", where=key, fix="see what the model gives there")
    return number


def _check_scores(pairs: Any, similar: Sequence[Similarity]) -> None:
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
