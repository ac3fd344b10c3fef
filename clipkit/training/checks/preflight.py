"""Before the first step: what this data at this batch allows, and which of it would make a run look stuck."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

_ROWS, _BATCHES, _CAPTIONS = 8192, 16, 10_000  # of which the sample is made, at most


@dataclass(frozen=True)
class Preflight:
    """What can be known of a run before its first step.

    Attributes:
        batch_size: pairs of a global batch.
        batches: how many were looked at, spread over the first epoch, with the captions that the plan draws.
        start: the first loss of a model that cannot tell anything apart, in nats: ln N for InfoNCE; several notions
            add up.
        floor: what the loss cannot fall below, in nats, the mean over those batches.
        false_negatives: pairs of a batch that count as unlike though they share a ``caption``, a ``picture`` or a
            ``label``, as a mean over the batches.
        truncated: part of the captions that are longer than the model's context.
        captions: how many were looked at.
        scale: now, and the least and most it can be after the last step (Adam moves its logarithm by at most the
            learning rate a step).
        warnings: in words.
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
        """For people: one line a fact, then the warnings."""
        low, high = self.scale[1:]
        unlike = ", ".join(f"{count:,.1f} of the same {what}" for what, count in self.false_negatives.items() if count)
        facts = [
            f"loss: starts near {self.start:.2f}, cannot fall below {self.floor:.3f} ({self.batches} batches seen)",
            f"pairs called unlike in a batch of {self.batch_size} though they may not be: {unlike or 'none found'}",
            f"captions cut: {100 * self.truncated:.1f} % of {self.captions:,}",
            f"scale: {self.scale[0]:.1f} now, between {low:.1f} and {high:.1f} after the last step",
        ]
        return facts + [f"warning: {each}" for each in self.warnings]


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
    """Look at a sample of the planned batches; takes a second or so, and opens no image.

    Args:
        model: not run; its processor counts tokens.
        pairs, plan: what is trained on, and in which batches.
        notions: what counts as similar.
        config: the loop.
        steps: of the whole run.
        sigmoid: whether the loss is the sigmoid one.
    """
    looked = BatchSample(pairs, plan, notions, config.label_smoothing)
    found = [looked.batch(0, k, notions, sigmoid) for k in _spread(plan)]
    texts = [text for draws in looked.seen for text in draws][:_CAPTIONS]
    counts = model.processor.token_counts(texts)
    scale = float(model.logit_scale.detach().float().exp())
    reach = scale_rate(model, config) * sum(schedule(step, steps, config.warmup) for step in range(steps))
    result = Preflight(
        batch_size=plan.batch_size,
        batches=len(found),
        start=sum(each.weight * _start(each, plan.batch_size, model, sigmoid) for each in notions),
        floor=float(np.mean([floor for floor, _ in found])),
        false_negatives={key: float(np.mean([each[key] for _, each in found])) for key in found[0][1]},
        truncated=sum(count > model.processor.context_length for count in counts) / len(counts),
        captions=len(counts),
        scale=(scale, scale * math.exp(-min(reach, 50)), min(scale * math.exp(min(reach, 50)), max(100.0, scale))),
    )
    return Preflight(**{**result.as_dict(), "warnings": tuple(_warnings(result, reach, bool(model.fresh), plan))})


def _spread(plan: Plan) -> list[int]:
    count = max(1, min(plan.steps_per_epoch, _BATCHES, _ROWS // plan.batch_size))
    return sorted({int(k) for k in np.linspace(0, plan.steps_per_epoch - 1, count)})


def _start(similar: Similarity, n: int, model: DualEncoder, sigmoid: bool) -> float:
    """The loss where every cosine is 0: ln of what a row is compared with, or one positive and N - 1 negatives."""
    if not sigmoid or model.logit_bias is None or similar.temperature is not None:
        return math.log(max(1, n * max(1, similar.views) - similar.alone))
    bias = float(model.logit_bias.detach().float())
    return float(np.logaddexp(0, -bias) + (n - 1) * np.logaddexp(0, bias))


class BatchSample:
    """Keys of planned batches, without opening an image."""

    def __init__(self, pairs: Any, plan: Plan, notions: Sequence[Similarity], smoothing: float) -> None:
        wanted, measured = key_columns(notions)
        self.pairs, self.plan, self.smoothing = pairs, plan, smoothing
        self.keys: dict[str, Tensor] = {
            name: column_codes(pairs, name) for name in wanted if name not in ("texts", "image")
        }
        self.keys |= {name: number_values(pairs, name) for name in measured}
        labelled = "label" in (getattr(pairs, "column_names", None) or ())
        self.label = column_codes(pairs, "label") if labelled else None
        self.seen: list[list[str]] = []

    def batch(
        self, epoch: int, k: int, notions: Sequence[Similarity], sigmoid: bool
    ) -> tuple[float, Mapping[str, float]]:
        """The floor of a global batch, and its false negatives."""
        draws = self.plan.batch(epoch, k)
        keys, items = self._keys(draws)
        total, unlike = 0.0, dict.fromkeys(items, 0.0)
        for each in notions:

            def affinity(rows: Tensor, cols: Tensor, each: Similarity = each) -> Tensor:
                ours, theirs = ({name: values[at % len(draws)] for name, values in keys.items()} for at in (rows, cols))
                found = target(each, ours, theirs)
                return found.masked_fill(rows[:, None] == cols, -1) if each.alone else found

            total += each.weight * self._floor(each, affinity, keys, items, sigmoid)
            if not each.views:
                for what, item in items.items():
                    unlike[what] += _unlike(affinity, item) / len(notions)
        return total, unlike

    def _floor(
        self,
        similar: Similarity,
        affinity: Affinity,
        keys: Mapping[str, Tensor],
        items: Mapping[str, Tensor],
        sigmoid: bool,
    ) -> float:
        if similar.views:  # augmented: no two are equal
            sides = [torch.arange(similar.views * len(keys[ROW]))] * 2
        else:
            sides = [items["picture" if side == "image" else "caption"] for side in similar.between]
        weight = None if similar.score is None else keys[similar.score].repeat(max(1, similar.views))
        bound = sigmoid_floor if sigmoid and similar.temperature is None else info_nce_floor
        return bound(affinity, sides[0], sides[1], smoothing=self.smoothing, weight=weight)

    def _keys(self, draws: list[Draw]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = torch.tensor([draw.row for draw in draws])
        records = [self.pairs[draw.row] for draw in draws]
        texts = [record["texts"][draw.caption] for record, draw in zip(records, draws, strict=True)]
        self.seen.append(texts)
        items = {"caption": _numbered(texts), "picture": _numbered([_picture(each) for each in records])}
        if self.label is not None:
            items["label"] = self.label[rows]
        keys = {ROW: rows, "texts": items["caption"], "image": items["picture"]}
        return keys | {name: values[rows] for name, values in self.keys.items()}, items


def _picture(record: Mapping[str, Any]) -> object:
    """What is equal where two pictures are the same file or the same bytes; none is decoded."""
    if "image_features" in record:
        return np.asarray(record["image_features"], dtype=np.float32).tobytes()
    cell = record.get("image")
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return path if data is None else hashlib.blake2b(data, digest_size=16).digest()
    return cell.tobytes() if isinstance(cell, Image.Image | np.ndarray) else cell


def _numbered(values: Sequence[Any]) -> Tensor:
    seen: dict[Any, int] = {}
    return torch.tensor([seen.setdefault(value, len(seen)) for value in values])


def _unlike(affinity: Any, item: Tensor) -> float:
    """How many ordered pairs of different samples share `item` and count as negatives."""
    found = 0
    for rows in whole_items(item):
        if bool((item[rows] >= 0).any()):
            same = (item[rows][:, None] == item[rows]) & (item[rows] >= 0)[:, None]
            same.fill_diagonal_(False)
            found += int((same & (affinity(rows, rows) == 0)).sum())
    return float(found)


def _warnings(found: Preflight, reach: float, fresh: bool, plan: Plan) -> list[str]:
    said = []
    room = found.start - found.floor
    if found.floor > 0.1 * found.start:
        repeated = found.false_negatives["caption"] + found.false_negatives["picture"] > 0
        python = 'SameGroup(column), or known={"texts": "positive"}'
        alike = option("similar", "[{known: {texts: positive}}]", python=python)
        why, advice = (
            (
                "captions or pictures repeat within a batch",
                f"Let equal things count as alike: {alike}",
            )
            if repeated
            else ("targets are spread over several pairs (groups, grades, smoothing)", "Watch kl, whose floor is 0")
        )
        said.append(
            f"{100 * found.floor / found.start:.0f} % of the first loss can never be learnt away, because {why}: "
            f"a loss that settles at {found.floor:.2f} is not stuck. {advice}"
        )
    each_row = {what: count / found.batch_size for what, count in found.false_negatives.items()}
    for what, count in each_row.items():
        if count >= 0.5 and what == "label":
            python = 'SameGroup("label"), or known={"label": "ignore"}'
            said.append(
                f"each sample is pushed away from {count:.1f} others of its own label in a batch. If they are alike to "
                f"you, say so: {option('similar.group', 'label', python=python)}"
            )
    if found.truncated > 0.05:
        said.append(
            f"{100 * found.truncated:.0f} % of the captions are cut: what stands at their end is never seen. "
            f"Shorten them, or {option('model.context_length', 'N', python='model.resize(context_length=…)')}"
        )
    if fresh and reach < 1 and found.scale[0] < 30:
        said.append(
            f"the scale can only move from {found.scale[0]:.1f} to {found.scale[2]:.1f} in this run; new heads end "
            f"near 50 to 100. Raise {option('scale_learning_rate')}, or train longer"
        )
    if plan.steps_per_epoch == 1:
        said.append("one batch is the whole epoch: every step sees the same negatives")
    if room < 0.05:
        said.append("there is nothing to learn: the first loss is its floor")
    return said
