"""Before the first step: what loss to expect of this data at this batch size, and what would make a run look stuck."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.batches.plan import Draw, Plan
from clipkit.data.dataset import column_codes, number_values
from clipkit.errors import option
from clipkit.losses.lower_bound import Affinity, info_nce_floor, sigmoid_floor, whole_items
from clipkit.losses.similarity import ROW, Similarity, key_columns, target
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.config.train import TrainConfig
from clipkit.training.optimizer import scale_rate, schedule

_MAX_ROWS, _MAX_BATCHES, _MAX_CAPTIONS = 8192, 16, 10_000  # of the sample


@dataclass(frozen=True)
class Preflight:
    """What is known about a run before its first step.

    Attributes:
        batch_size: pairs of a global batch.
        batches: size of the sample: batches spread over the first epoch, with the captions that the plan draws.
        start: the first loss of a model that tells nothing apart, in nats: ln N for InfoNCE; the sum over the notions
            of similarity.
        floor: the loss cannot fall below this, in nats; the mean over the batches.
        false_negatives: pairs of a batch that count as negatives though they share a ``caption``, a ``picture`` or a
            ``label``, as a mean over the batches.
        truncated: part of the captions that are longer than the model's context.
        captions: number of captions in the sample.
        scale: logit scale now, and its least and largest value after the last step (Adam moves its logarithm by at
            most the learning rate a step).
        warnings: sentences for the user.
    """

    batch_size: int
    batches: int
    start: float
    floor: float
    false_negatives: dict[str, float]
    truncated: float
    captions: int
    scale: tuple[float, float, float]
    warnings: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Return one line of text for each fact, then the warnings."""
        now, low, high = self.scale
        counts = [f"{count:,.1f} of the same {key}" for key, count in self.false_negatives.items() if count]
        negatives = ", ".join(counts) or "none found"
        facts = [
            f"loss: starts near {self.start:.2f}, cannot fall below {self.floor:.3f} ({self.batches} batches seen)",
            f"pairs treated as different in a batch of {self.batch_size} though they may match: {negatives}",
            f"captions cut: {100 * self.truncated:.1f} % of {self.captions:,}",
            f"scale: {now:.1f} now, between {low:.1f} and {high:.1f} after the last step",
        ]
        return facts + [f"warning: {warning}" for warning in self.warnings]


def preflight(
    model: DualEncoder,
    pairs: Any,
    plan: Plan,
    notions: Sequence[Similarity],
    config: TrainConfig,
    *,
    steps: int,
    sigmoid: bool,
) -> Preflight:
    """Examine a sample of the planned batches; it takes about a second, and opens no image.

    Args:
        model: is not run; its processor counts tokens.
        pairs: the training data.
        plan: the rows of each batch.
        notions: the notions of similarity.
        config: of the loop.
        steps: of the whole run.
        sigmoid: whether the loss is the sigmoid one.
    """
    sample = BatchSample(pairs, plan, notions, config.label_smoothing)
    floors, false_negatives = [], []
    for k in _sampled_batches(plan):
        floor, batch_false_negatives = sample.batch(0, k, notions, sigmoid)
        floors.append(floor)
        false_negatives.append(batch_false_negatives)
    token_counts = model.processor.token_counts(sample.texts[:_MAX_CAPTIONS])
    too_long = sum(count > model.processor.context_length for count in token_counts)
    scale = float(model.logit_scale.detach().float().exp())
    reach = scale_rate(model, config) * sum(schedule(step, steps, config.warmup) for step in range(steps))
    factor = math.exp(min(reach, 50))  # that the scale can change by; 50 keeps it finite
    result = Preflight(
        batch_size=plan.batch_size,
        batches=len(floors),
        start=sum(similarity.weight * _start(similarity, plan.batch_size, model, sigmoid) for similarity in notions),
        floor=float(np.mean(floors)),
        false_negatives={
            key: float(np.mean([counts[key] for counts in false_negatives])) for key in false_negatives[0]
        },
        truncated=too_long / len(token_counts),
        captions=len(token_counts),
        scale=(scale, scale * math.exp(-min(reach, 50)), min(scale * factor, max(100.0, scale))),
    )
    return replace(result, warnings=tuple(_warnings(result, reach, bool(model.fresh), plan)))


def _sampled_batches(plan: Plan) -> list[int]:
    """Return the numbers of the sampled batches, spread over the first epoch."""
    count = max(1, min(plan.steps_per_epoch, _MAX_BATCHES, _MAX_ROWS // plan.batch_size))
    return sorted({int(k) for k in np.linspace(0, plan.steps_per_epoch - 1, count)})


def _start(similar: Similarity, n: int, model: DualEncoder, sigmoid: bool) -> float:
    """Return the loss if every cosine is 0: ln of the number of candidates, or one positive and N - 1 negatives."""
    if not sigmoid or model.logit_bias is None or similar.temperature is not None:
        candidates = n * max(1, similar.views)
        if similar.same_modality:  # a row is not compared with itself
            candidates -= 1
        return math.log(max(1, candidates))
    bias = float(model.logit_bias.detach().float())
    return float(np.logaddexp(0, -bias) + (n - 1) * np.logaddexp(0, bias))


class BatchSample:
    """Reads the keys of planned batches, without opening an image."""

    def __init__(self, pairs: Any, plan: Plan, notions: Sequence[Similarity], smoothing: float) -> None:
        code_columns, number_columns = key_columns(notions)
        self.pairs, self.plan, self.smoothing = pairs, plan, smoothing
        self.keys: dict[str, Tensor] = {
            name: column_codes(pairs, name) for name in code_columns if name not in ("texts", "image")
        }
        self.keys |= {name: number_values(pairs, name) for name in number_columns}
        has_labels = "label" in (getattr(pairs, "column_names", None) or ())
        self.label = column_codes(pairs, "label") if has_labels else None
        self.texts: list[str] = []  # of all batches read so far

    def batch(
        self, epoch: int, k: int, notions: Sequence[Similarity], sigmoid: bool
    ) -> tuple[float, Mapping[str, float]]:
        """Return the floor of a global batch, and its false negatives."""
        draws = self.plan.batch(epoch, k)
        keys, items = self._keys(draws)
        floor, false_negatives = 0.0, dict.fromkeys(items, 0.0)
        for similarity in notions:
            affinity = _affinity(similarity, keys, len(draws))
            floor += similarity.weight * self._floor(similarity, affinity, keys, items, sigmoid)
            if not similarity.views:
                for key, item in items.items():
                    false_negatives[key] += _false_negatives(affinity, item) / len(notions)
        return floor, false_negatives

    def _floor(
        self,
        similar: Similarity,
        affinity: Affinity,
        keys: Mapping[str, Tensor],
        items: Mapping[str, Tensor],
        sigmoid: bool,
    ) -> float:
        """Return the lower bound of the loss of one notion of similarity."""
        if similar.views:  # augmented: no two are equal
            row_items = column_items = torch.arange(similar.views * len(keys[ROW]))
        else:
            items_of = {"image": items["picture"], "text": items["caption"]}
            row_items, column_items = items_of[similar.between[0]], items_of[similar.between[1]]
        weight = None if similar.score is None else keys[similar.score].repeat(max(1, similar.views))
        bound = sigmoid_floor if sigmoid and similar.temperature is None else info_nce_floor
        return bound(affinity, row_items, column_items, smoothing=self.smoothing, weight=weight)

    def _keys(self, draws: list[Draw]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the keys that the notions compare, and by name the numbers of the items that may repeat."""
        rows = torch.tensor([draw.row for draw in draws])
        records = [self.pairs[draw.row] for draw in draws]
        texts = [record["texts"][draw.caption] for record, draw in zip(records, draws, strict=True)]
        self.texts += texts
        items = {"caption": _numbered(texts), "picture": _numbered([_picture(record) for record in records])}
        if self.label is not None:
            items["label"] = self.label[rows]
        keys = {ROW: rows, "texts": items["caption"], "image": items["picture"]}
        return keys | {name: values[rows] for name, values in self.keys.items()}, items


def _affinity(similar: Similarity, keys: Mapping[str, Tensor], count: int) -> Affinity:
    """Return the function that gives the affinity of rows and columns of a batch of `count` pairs."""

    def affinity(rows: Tensor, cols: Tensor) -> Tensor:
        row_keys = {name: values[rows % count] for name, values in keys.items()}
        column_keys = {name: values[cols % count] for name, values in keys.items()}
        affinities = target(similar, row_keys, column_keys)
        return affinities.masked_fill(rows[:, None] == cols, -1) if similar.same_modality else affinities

    return affinity


def _picture(record: Mapping[str, Any]) -> object:
    """Return a value that is equal for two pictures of the same file or the same bytes; none is decoded."""
    if "image_features" in record:
        return np.asarray(record["image_features"], dtype=np.float32).tobytes()
    cell = record.get("image")
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return path if data is None else hashlib.blake2b(data, digest_size=16).digest()
    return cell.tobytes() if isinstance(cell, Image.Image | np.ndarray) else cell


def _numbered(values: Sequence[Any]) -> Tensor:
    """Return a number for each value; equal values have the same number."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _false_negatives(affinity: Affinity, item: Tensor) -> float:
    """Return how many ordered pairs of different samples share `item` and count as negatives."""
    count = 0
    for rows in whole_items(item):
        if bool((item[rows] >= 0).any()):
            same = (item[rows][:, None] == item[rows]) & (item[rows] >= 0)[:, None]
            same.fill_diagonal_(False)
            count += int((same & (affinity(rows, rows) == 0)).sum())
    return float(count)


def _warnings(report: Preflight, reach: float, fresh: bool, plan: Plan) -> list[str]:
    warnings = []
    if report.floor > 0.1 * report.start:
        warnings.append(_floor_warning(report))
    label_negatives = report.false_negatives.get("label", 0.0) / report.batch_size
    if label_negatives >= 0.5:
        python = 'SameGroup("label"), or known={"label": "ignore"}'
        warnings.append(
            f"each sample is pushed away from {label_negatives:.1f} others of its own label in a batch. If you want "
            f"them close, set {option('similar.group', 'label', python=python)}"
        )
    if report.truncated > 0.05:
        warnings.append(
            f"{100 * report.truncated:.0f} % of the captions are cut: the model never sees their end. "
            f"Shorten them, or {option('model.context_length', 'N', python='model.resize(context_length=…)')}"
        )
    if fresh and reach < 1 and report.scale[0] < 30:
        warnings.append(
            f"the scale can only move from {report.scale[0]:.1f} to {report.scale[2]:.1f} in this run; new heads end "
            f"near 50 to 100. Raise {option('scale_learning_rate')}, or train longer"
        )
    if plan.steps_per_epoch == 1:
        warnings.append("one batch is the whole epoch: every step sees the same negatives")
    if report.start - report.floor < 0.05:
        warnings.append("there is nothing to learn: the first loss is its floor")
    return warnings


def _floor_warning(report: Preflight) -> str:
    if report.false_negatives["caption"] + report.false_negatives["picture"] > 0:
        python = 'SameGroup(column), or known={"texts": "positive"}'
        reason = "captions or pictures repeat within a batch"
        advice = f"Count equal ones as positives: {option('similar', '[{known: {texts: positive}}]', python=python)}"
    else:
        reason = "targets are spread over several pairs (groups, grades, smoothing)"
        advice = "Watch kl, whose floor is 0"
    return (
        f"{100 * report.floor / report.start:.0f} % of the first loss can never be learnt away, because {reason}: "
        f"a loss that settles at {report.floor:.2f} is not stuck. {advice}"
    )
