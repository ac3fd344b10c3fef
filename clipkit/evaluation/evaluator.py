"""The interface of an evaluator: `__call__` returns metrics by key; the other methods describe them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from clipkit.data.reading.rejects import Reject
from clipkit.metrics import ranking
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.text_notices import Notice

Measure: TypeAlias = Callable[[DualEncoder], Mapping[str, float]]
"""Metrics by key, of a model. Every `Evaluator` is one, and so is a plain function."""


class Evaluator(ABC):
    """Measures a model. Only `name` and `__call__` are needed; every other part has a default.

    Attributes:
        name: used in messages and in the record of the run.
        rejected: the items that could not be used at the last call.
        notices: what a reader of the figures should know.
    """

    name: str
    rejected: Sequence[Reject] = ()
    notices: Sequence[Notice] = ()

    @abstractmethod
    def __call__(self, model: DualEncoder) -> Mapping[str, float]:
        """The metrics by key; it is called on every process, and gives the same on each."""

    def keys(self) -> list[str]:
        """The keys of the metrics, in their order; empty where they are not known before the first call."""
        return []

    def greater_is_better(self, key: str) -> bool:
        """Whether a higher value of this metric is the better one: not for keys that end in ``loss`` or ``_rank``."""
        return ranking.greater_is_better(key)

    def counts(self) -> dict[str, int]:
        """How many images, texts and so on the metrics are computed from."""
        return {}

    def baselines(self) -> dict[str, dict[str, float]]:
        """Figures that need no model: ``chance`` and ``majority``, each with values under the keys of the metrics."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What changes a figure, by name: a run goes on only where it is the same. ``images`` are compared by
        content, everything else as JSON.
        """
        return {}

    def tensor_state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold; empty where nothing is remembered from one call to the next."""
        return {}

    def load_tensor_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027  (most remember nothing)
        """Load what `tensor_state` returned."""


class _PlainEvaluator(Evaluator):
    """A function, or any other callable, as an evaluator."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.name = str(getattr(measure, "name", None) or getattr(measure, "__name__", type(measure).__name__))

    def __call__(self, model: DualEncoder) -> Mapping[str, float]:
        return self.measure(model)


def as_evaluator(measure: Measure) -> Evaluator:
    """An evaluator as it is; any other callable wrapped as one."""
    return measure if isinstance(measure, Evaluator) else _PlainEvaluator(measure)
