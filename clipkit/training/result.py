"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipkit.training.forgetting.guardrail import Forgetting


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        metrics: of the weights that were kept.
        step: the step, counted from 1, after which the model had these weights.
        steps: number of steps taken in all.
        seconds: wall-clock time of all attempts, evaluations included.
        history: every line of metrics.jsonl.
        rejected: rows left out because their image could not be used.
        stopped_early: whether `patience` ended the run.
        forgetting: what the guardrail measured and chose, where there is a `forget_budget`.
    """

    metrics: dict[str, float]
    step: int
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    rejected: list[dict[str, Any]] = field(default_factory=list, repr=False)
    stopped_early: bool = False
    forgetting: Forgetting | None = None
