"""The forgetting guardrail: it limits how much of its former abilities a model may lose while it learns.

A reference is measured before the first step and at every evaluation. After the last one the weights go back on the
line to the start (WiSE-FT, Wortsman et al. 2022). Of the models on this line that lose no more of the reference than
the budget allows, the run keeps the one that does best in the domain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit import distributed
from clipkit.data.reading.rejects import Reject
from clipkit.errors import ClipkitError, UsageError, option
from clipkit.evaluation.evaluator import Evaluator, Measure, as_evaluator
from clipkit.files import write_json, write_text
from clipkit.html_report import trade_off_chart
from clipkit.metrics import ranking
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.saving.model_card import forgetting_lines
from clipkit.training.forgetting.similarity_reference import SimilarityReference
from clipkit.training.forgetting.wise_ft import WeightInterpolation

logger = logging.getLogger("clipkit")

PREFIX = "reference/"
ALPHAS = tuple(step / 10 for step in range(11))
_ROUNDING = 1e-9  # 0.60 - 0.59 is a little more than 0.01


@dataclass(frozen=True)
class Point:
    """One model on the line.

    Attributes:
        alpha: 0 is the start, 1 the fine-tuned model.
        domain, reference: the values of the two metrics that the choice compares.
        metrics: all metrics of this model.
    """

    alpha: float
    domain: float
    reference: float
    metrics: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class Forgetting:
    """What the guardrail measured and chose.

    Attributes:
        domain, reference: keys of the two metrics that the choice compares.
        baseline: the reference before training.
        budget: how much of it may be lost.
        points: the models on the line, by alpha.
        chosen: the best in the domain of those within the budget; of equals, the one nearest to the start.
        held: whether any is within the budget. If none is, the one that lost least is chosen. The start itself is
            within it, unless the model has heads that began at random.
        greater_is_better: whether higher values of the reference are better.
    """

    domain: str
    reference: str
    baseline: float
    budget: float
    points: tuple[Point, ...]
    chosen: Point
    held: bool
    greater_is_better: bool = True

    @property
    def alpha(self) -> float:
        """The alpha of the model that was chosen."""
        return self.chosen.alpha

    def as_dict(self) -> dict[str, Any]:
        """Return the content of forgetting.json and of the model card; it leaves out the points' other metrics."""
        points = [{"alpha": point.alpha, "domain": point.domain, "reference": point.reference} for point in self.points]
        return {**asdict(self), "points": points, "chosen": self.alpha}

    def lines(self) -> list[str]:
        """Return the choice in words, and the curve as a table in Markdown."""
        return forgetting_lines(self.as_dict())


def choose(
    domain: str,
    reference: str,
    baseline: float,
    budget: float,
    points: tuple[Point, ...],
    greater_is_better: Callable[[str], bool] = ranking.greater_is_better,
) -> Forgetting:
    """Choose the point that `Forgetting.chosen` describes.

    Args:
        domain, reference: keys of the two metrics.
        baseline: the reference before training.
        budget: how much of it may be lost.
        points: the models on the line, by alpha.
        greater_is_better: whether a higher value is better, by the key of a metric.
    """
    domain_greater, reference_greater = greater_is_better(domain), greater_is_better(reference)
    within_budget = []
    for point in points:
        if lost(baseline, point.reference, greater_is_better=reference_greater) <= budget + _ROUNDING:
            within_budget.append(point)

    def domain_rank(point: Point) -> tuple[float, float]:
        return point.domain if domain_greater else -point.domain, -point.alpha

    def reference_rank(point: Point) -> tuple[float, float]:
        return point.reference if reference_greater else -point.reference, -point.alpha

    chosen = max(within_budget, key=domain_rank) if within_budget else max(points, key=reference_rank)
    return Forgetting(domain, reference, baseline, budget, points, chosen, bool(within_budget), reference_greater)


def lost(before: float, now: float, *, greater_is_better: bool) -> float:
    """Return how much of a metric was lost; negative if it improved."""
    return before - now if greater_is_better else now - before


class Guardrail(Evaluator):
    """Measures the reference, and goes back towards the start at the end. A part of the run.

    Args:
        model: the trained model, without a wrapper of DDP.
        folder: of the run; the start is saved in start.safetensors.
        budget: how much of the first reference metric may be lost, in its own unit.
        reference: an evaluator of what the model must not forget; None: `SimilarityReference`.

    Raises:
        UsageError: all that is trained began at random, or some of it and there is no reference but the built-in one.
    """

    name = "reference"

    def __init__(self, model: DualEncoder, folder: Path, budget: float, reference: Measure | None) -> None:
        self.model, self.folder, self.budget = model, folder, budget
        self.reference = SimilarityReference() if reference is None else as_evaluator(reference)
        self.line = WeightInterpolation(model, folder / "start.safetensors")
        self.baseline: dict[str, float] = {}
        if reference is None and self.line.fresh:
            given = option("evaluate.reference", "FILE", python="reference=RetrievalEvaluator(pairs)")
            raise UsageError(
                "the similarities that a model computes with weights that began at random are not worth keeping",
                where=self.line.fresh[0],
                fix=f"{given} of what must not be forgotten, or train the heads in a run of their own",
            )

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """Measure the reference, on every process; the keys begin with ``reference/``.

        Raises:
            UsageError: there are none.
            ClipkitError: one is not a finite number.
        """
        metrics = {_key(key): value for key, value in self.reference(model).items()}
        if not metrics:
            raise UsageError("the reference gives no metric", where="reference")
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise ClipkitError(f"a reference must be a finite number, found {value}", where=key)
        return metrics

    def keys(self) -> list[str]:
        """Return the keys of the metrics, if the reference knows them before it measures."""
        own_keys = self.reference.keys()
        return [_key(key) for key in own_keys]

    def greater_is_better(self, key: str) -> bool:
        """Whether a higher value of this metric is the better one, as the reference says."""
        own_keys = self.reference.keys()
        own_key = key if key in own_keys else key.removeprefix(PREFIX)
        return self.reference.greater_is_better(own_key)

    def counts(self) -> dict[str, int]:
        """Return how many items the reference metrics rest on."""
        return {_key(key): count for key, count in self.reference.counts().items()}

    def baselines(self) -> dict[str, dict[str, float]]:
        """Return what the reference would be by chance, if it knows."""
        baselines = {}
        for name, values in self.reference.baselines().items():
            baselines[name] = {_key(key): value for key, value in values.items()}
        return baselines

    @property
    def rejected(self) -> Sequence[Reject]:  # type: ignore[override]
        """The images that the reference could not use."""
        return self.reference.rejected

    def begin(self) -> dict[str, float]:
        """Save the start and measure its reference, once in a run."""
        self.line.save_start()
        self.baseline = distributed.broadcast_object(self(self.model))
        key, value = next(iter(self.baseline.items()))
        if self.greater_is_better(key) and self.budget >= value and distributed.is_main():
            logger.warning("forget_budget=%g allows all of %s, which is %.4f, to be lost", self.budget, key, value)
        return self.baseline

    def walk_back(
        self,
        measure: Callable[[], dict[str, float]],
        key: str | None,
        n: Mapping[str, int],
        before_point: Callable[[], None],
        greater_is_better: Callable[[str], bool],
    ) -> Forgetting:
        """Measure the models between the start and the trained one, choose one, and save it with the measurements.

        Args:
            measure: returns all metrics of the model with its current weights.
            key: of the metric that judges the domain.
            n: how many items the metrics rest on.
            before_point: is called before each point, and may end the run: the next attempt begins again.
            greater_is_better: whether a higher value is better, by the key of a metric.
        """
        assert key is not None  # the evaluations before chose one
        self.line.load_ends()
        points = []
        reference = next(iter(self.baseline))
        for alpha in ALPHAS:
            before_point()
            self.line.set_alpha(alpha)
            metrics = measure()
            points.append(Point(alpha, metrics[key], metrics[reference], metrics))
        forgetting = choose(key, reference, self.baseline[reference], self.budget, tuple(points), greater_is_better)
        self.line.set_alpha(forgetting.alpha)
        if not forgetting.held and distributed.is_main():
            logger.warning("%s", forgetting.lines()[0])
        self.model.card = self.model.card.updated(
            {"metrics": forgetting.chosen.metrics, "n": dict(n), "forgetting": forgetting.as_dict()}
        )
        self.model.card = distributed.on_main(lambda: self._write(forgetting))
        return forgetting

    def _write(self, forgetting: Forgetting) -> Any:
        write_json(self.folder / "forgetting.json", forgetting.as_dict())
        curve = [(point.reference, point.domain) for point in forgetting.points]
        budget = forgetting.budget if forgetting.greater_is_better else -forgetting.budget
        limit = forgetting.baseline - budget
        chosen = forgetting.points.index(forgetting.chosen)
        if chosen == 0:
            marks = {"before, chosen": 0, "fine-tuned": -1}
        else:
            marks = {"before": 0, f"chosen, alpha {forgetting.alpha:g}": chosen, "fine-tuned": -1}
        chart = trade_off_chart({"the line": curve}, marks, limit, forgetting.reference, forgetting.domain)
        write_text(self.folder / "curves" / "forgetting.svg", chart)
        self.model.save_pretrained(self.folder / "model", overwrite=True)
        return self.model.card

    # -- as a part of the run

    def tensor_state(self) -> dict[str, Tensor]:
        return self.reference.tensor_state()

    def json_state(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "start": self.line.sha256}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.baseline, self.line.sha256 = values["baseline"], values["start"]
        self.reference.load_tensor_state(tensors)
        self.line.check()


def _key(key: str) -> str:
    return key if key.startswith(PREFIX) else PREFIX + key
