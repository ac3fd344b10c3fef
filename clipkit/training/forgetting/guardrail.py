"""The forgetting guardrail: how much of what a model could do may be given up for what it learns.

A reference is measured before the first step and at every evaluation. After the last one the weights are walked back
on the line to the start (WiSE-FT, Wortsman et al. 2022), and the model that does best in the domain, among those that
lose no more of the reference than the budget allows, is the one that the run gives.
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
from clipkit.metrics.ranking import lower_is_better, worth
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
        domain, reference: what the choice goes by.
        metrics: all that was measured of it.
    """

    alpha: float
    domain: float
    reference: float
    metrics: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class Forgetting:
    """What the guardrail found, and chose.

    Attributes:
        domain, reference: the metric keys that the choice goes by.
        baseline: the reference before training.
        budget: how much of it may be lost.
        points: the models on the line, by alpha.
        chosen: the best in the domain of those within the budget; of equals, the one nearest to the start.
        held: whether any is within the budget. Where none is, the one that lost least is chosen; the start itself
            always is, unless heads that began at random stand beside it.
    """

    domain: str
    reference: str
    baseline: float
    budget: float
    points: tuple[Point, ...]
    chosen: Point
    held: bool

    @property
    def alpha(self) -> float:
        """Of the model that was chosen."""
        return self.chosen.alpha

    def as_dict(self) -> dict[str, Any]:
        """For forgetting.json and the model card: of the points without their other metrics."""
        points = [{"alpha": p.alpha, "domain": p.domain, "reference": p.reference} for p in self.points]
        return {**asdict(self), "points": points, "chosen": self.alpha}

    def lines(self) -> list[str]:
        """The choice and the curve, as a table in words."""
        return forgetting_lines(self.as_dict())


def choose(domain: str, reference: str, baseline: float, budget: float, points: tuple[Point, ...]) -> Forgetting:
    """The point that `Forgetting.chosen` describes. Of ranks and losses the lowest value is the best."""
    within = [p for p in points if loss(reference, baseline, p.reference) <= budget + _ROUNDING]
    if within:
        chosen = max(within, key=lambda p: (worth(domain, p.domain), -p.alpha))
    else:
        chosen = max(points, key=lambda p: (worth(reference, p.reference), -p.alpha))
    return Forgetting(domain, reference, baseline, budget, points, chosen, bool(within))


def loss(key: str, before: float, now: float) -> float:
    """How much of a metric was lost; negative where it was gained."""
    return worth(key, before) - worth(key, now)


class Guardrail(Evaluator):
    """Measures the reference, and walks the line at the end. A part of the run.

    Args:
        model: that is trained, without a wrapper of DDP.
        folder: of the run; the start is kept in start.safetensors.
        budget: how much of the first reference metric may be lost, in its own unit.
        reference: an evaluator of what is not to be forgotten; None: `SimilarityReference`.

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
                "what a model finds alike through weights that began at random is nothing to be kept",
                where=self.line.fresh[0],
                fix=f"{given} of what is not to be forgotten, or train the heads in a run of their own",
            )

    def __call__(self, model: DualEncoder) -> dict[str, float]:
        """The reference metrics under keys that begin with ``reference/``; on every process.

        Raises:
            UsageError: there are none.
            ClipkitError: one is no finite number.
        """
        metrics = {_key(key): value for key, value in self.reference(model).items()}
        if not metrics:
            raise UsageError("the reference gives no metric", where="reference")
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise ClipkitError(f"a reference must be a finite number, found {value}", where=key)
        return metrics

    def keys(self) -> list[str]:
        """The keys of the metrics, where the reference knows them before it measures."""
        return list(map(_key, self.reference.keys()))

    def counts(self) -> dict[str, int]:
        """What the reference rests on."""
        return {_key(key): count for key, count in self.reference.counts().items()}

    def baselines(self) -> dict[str, dict[str, float]]:
        """What the reference would be by chance, where it knows."""
        return {
            baseline: {_key(key): value for key, value in values.items()}
            for baseline, values in self.reference.baselines().items()
        }

    @property
    def rejected(self) -> Sequence[Reject]:  # type: ignore[override]
        """Of the reference, what could not be used."""
        return self.reference.rejected

    def begin(self) -> dict[str, float]:
        """Keep the start and measure it, once in a run: its reference."""
        self.line.keep()
        self.baseline = distributed.broadcast_object(self(self.model))
        key, value = next(iter(self.baseline.items()))
        if not lower_is_better(key) and self.budget >= value and distributed.is_main():
            logger.warning("forget_budget=%g allows all of %s, which is %.4f, to be lost", self.budget, key, value)
        return self.baseline

    def walk_back(
        self,
        measure: Callable[[], dict[str, float]],
        key: str | None,
        n: Mapping[str, int],
        before_point: Callable[[], None],
    ) -> Forgetting:
        """Walk from the start to the model as it stands, and make it the one that is chosen; write what was measured.

        Args:
            measure: all metrics of the model as it stands.
            key: of the metric that the domain is judged by.
            n: what the metrics rest on.
            before_point: is called before each point, and may end the run: the next attempt walks again.
        """
        assert key is not None  # of the evaluations before
        self.line.span()
        points = []
        reference = next(iter(self.baseline))
        for alpha in ALPHAS:
            before_point()
            self.line.go(alpha)
            metrics = measure()
            points.append(Point(alpha, metrics[key], metrics[reference], metrics))
        forgetting = choose(key, reference, self.baseline[reference], self.budget, tuple(points))
        self.line.go(forgetting.alpha)
        if not forgetting.held and distributed.is_main():
            logger.warning("%s", forgetting.lines()[0])
        facts = {"metrics": forgetting.chosen.metrics, "n": dict(n), "forgetting": forgetting.as_dict()}
        self.model.card = self.model.card.updated(facts)
        self.model.card = distributed.on_main(lambda: self._write(forgetting))
        return forgetting

    def _write(self, forgetting: Forgetting) -> Any:
        write_json(self.folder / "forgetting.json", forgetting.as_dict())
        curve = [(p.reference, p.domain) for p in forgetting.points]
        limit = forgetting.baseline + worth(forgetting.reference, -forgetting.budget)
        chosen = forgetting.points.index(forgetting.chosen)
        marks = {"before": 0, f"chosen, alpha {forgetting.alpha:g}": chosen, "fine-tuned": -1}
        marks = {"before, chosen": 0, "fine-tuned": -1} if chosen == 0 else marks
        drawn = trade_off_chart({"the line": curve}, marks, limit, forgetting.reference, forgetting.domain)
        write_text(self.folder / "curves" / "forgetting.svg", drawn)
        self.model.save_pretrained(self.folder / "model", overwrite=True)
        return self.model.card

    # -- as a part of the run

    def tensors(self) -> dict[str, Tensor]:
        return self.reference.tensor_state()

    def facts(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "start": self.line.sha256}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.baseline, self.line.sha256 = facts["baseline"], facts["start"]
        self.reference.load_tensor_state(tensors)
        self.line.check()


def _key(key: str) -> str:
    return key if key.startswith(PREFIX) else PREFIX + key
