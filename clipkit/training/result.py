"""What a training gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipkit.training.forgetting import Forgetting


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        metrics: of the weights that were kept.
        step: after which these weights stood, from 1.
        steps: taken in all.
        seconds: of wall clock, evaluations included, of all attempts.
        history: every line of metrics.jsonl.
        rejected: rows left out because their image could not be used.
        stopped_early: whether `patience` ended it.
        forgetting: what the guardrail found and chose, where there is a `forget_budget`.
    """

    metrics: dict[str, float]
    step: int
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    rejected: list[dict[str, Any]] = field(default_factory=list, repr=False)
    stopped_early: bool = False
    forgetting: Forgetting | None = None
