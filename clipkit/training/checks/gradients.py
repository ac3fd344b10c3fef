"""Are the gradients of a launch those of the big batch? A comparison with the textbook, for the user's own set-up."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkit import distributed
from clipkit.losses.contrastive import EmbeddedBatch
from clipkit.losses.similarity import Similarity, target
from clipkit.training.heads import ModelWithHeads
from clipkit.training.setup import TrainSetup
from clipkit.training.step import LossConfig, backward, outputs, side_of

# cosine at least, norm ratio within, relative error of a scalar at most. fp32 in a deep tower is off by some 1e-5;
# bf16 by some 1e-2, while the mildest known bug (no gradient through the gather) has a cosine of 0.98.
TOLERANCE = {"fp32": (0.9999, 1e-3, 1e-3), "bf16": (0.99, 0.03, 0.05), "fp16": (0.99, 0.03, 0.05)}


_DOUBLE = 200e6  # parameters up to which the reference is computed in float64


@dataclass(frozen=True)
class Compared:
    """One group of parameters.

    Attributes:
        name: ``image tower``, ``logit scale`` …
        parameters: how many numbers.
        ratio: length of the launch's gradient over that of the big batch.
        cosine: between the two; nan for a single number, which has no direction.
        same: whether this is the big batch, at this precision.
    """

    name: str
    parameters: int
    ratio: float
    cosine: float
    same: bool


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradients` found."""

    groups: tuple[Compared, ...]
    batch_size: int
    ranks: int
    micro_batch: int | None
    precision: str

    @property
    def same(self) -> bool:
        """Whether all groups have the gradient of the big batch."""
        return all(group.same for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        groups = [asdict(group) for group in self.groups]
        for group in groups:  # JSON has no nan
            group["cosine"] = None if math.isnan(group["cosine"]) else group["cosine"]
        return {**asdict(self), "groups": groups, "same": self.same}

    def lines(self) -> list[str]:
        """For people."""
        cached = f", micro_batch {self.micro_batch}" if self.micro_batch else ""
        head = f"global batch of {self.batch_size} on {self.ranks} ranks, {self.precision}{cached}; dropout off"
        rows = [f"{'':14}{'parameters':>12}{'ratio':>10}{'cosine':>10}"]
        for group in self.groups:
            cosine = "" if math.isnan(group.cosine) else f"{group.cosine:.6f}"
            mark = "" if group.same else "   NOT the big batch"
            rows.append(f"{group.name:14}{group.parameters:12,}{group.ratio:10.5f}{cosine:>10}{mark}")
        verdict = (
            "these are the gradients of the big batch" if self.same else "these are NOT the gradients of the big batch"
        )
        return [head, *rows, verdict]


def check_gradients(setup: TrainSetup) -> GradientCheck:
    """Compare the first step of a training with one process that holds the whole batch; call it on every rank.

    The reference shares nothing with the engine but the notions of similarity: every pair in one dense matrix, by
    torch's own functions, the towers in float64 (in fp32 above 200 million parameters), in one graph. Dropout is
    off on both sides, for ranks draw different masks.

    Args:
        setup: of the user's own model, data and config; its weights stay what they are.
    """
    launched = _as_trained(setup)
    reference = _textbook(setup) if distributed.is_main() else {}
    reference = distributed.broadcast_object(reference)
    precision = {"no": "fp32"}.get(setup.accelerator.mixed_precision, setup.accelerator.mixed_precision)
    groups = tuple(_compare(name, launched[name], reference[name], TOLERANCE[precision]) for name in reference)
    config = setup.config
    return GradientCheck(groups, config.batch_size, distributed.world_size(), config.micro_batch, precision)


def _as_trained(setup: TrainSetup) -> dict[str, Tensor]:
    learner, accelerator = setup.learner.to(setup.accelerator.device), setup.accelerator
    setup.leave_out_unused()
    rates = torch.optim.SGD(learner.parameters(), lr=0.0)  # Accelerate wants one beside the model
    wrapped, _ = accelerator.prepare(learner, rates)
    wrapped.eval()
    batch = next(iter(setup.loader.batches(0, 1))).to(accelerator.device)
    micro = setup.config.micro_batch
    backward(wrapped, batch, setup.similar, setup.contrast, micro_batch=micro, send=accelerator.backward)
    scaler = getattr(accelerator, "scaler", None)
    gradients = _by_group(learner, 1.0 if scaler is None else 1.0 / scaler.get_scale())
    learner.zero_grad(set_to_none=True)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return gradients


def _textbook(setup: TrainSetup) -> dict[str, Tensor]:
    learner = copy.deepcopy(setup.learner).eval()
    small = sum(parameter.numel() for parameter in learner.parameters()) <= _DOUBLE
    dtype = torch.float64 if small and setup.accelerator.device.type != "mps" else torch.float32
    learner.to(dtype)
    steps = replace(setup.loader.steps, rank=0, world_size=1)
    batch = steps[0]
    if isinstance(batch, Exception):
        raise batch
    batch = batch.to(setup.accelerator.device)
    parts = max(1, -(-len(batch) // (setup.config.micro_batch or setup.config.batch_size)))
    embedded: list[dict[str, Tensor]] = []
    for chunk in batch.split(parts):  # one graph, recomputed piece by piece: as much memory as one chunk
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in chunk.items()}
        embedded.append(outputs(checkpoint(_call, learner, given, use_reentrant=False)))
    out = {name: x if x.ndim == 0 else torch.cat([part[name] for part in embedded]) for name, x in embedded[-1].items()}
    loss = sum(
        notion.weight * _dense(i, notion, out, batch.rows, setup.contrast) for i, notion in enumerate(setup.similar)
    )
    assert isinstance(loss, Tensor)  # there is at least one notion
    loss.backward()  # type: ignore[no-untyped-call]
    return _by_group(learner, 1.0)


def _call(learner: ModelWithHeads, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = learner(**given)
    return {name: x.double() if x.is_floating_point() else x for name, x in out.items()}


def _dense(i: int, similar: Similarity, out: Mapping[str, Tensor], rows: Any, contrast: LossConfig) -> Tensor:
    """The loss of one notion from the whole matrix of pairs."""
    a, b = (side_of(side, f"head{i}" if similar.head else side, similar, out, rows) for side in similar.between)
    dims = contrast.matryoshka if contrast.matryoshka and not similar.head else (a.emb.shape[1],)
    losses = [_dense_cut(similar, a, b, dim, out, contrast) for dim in dims]
    return torch.stack(losses).mean()


def _dense_cut(
    similar: Similarity, a: EmbeddedBatch, b: EmbeddedBatch, dim: int, out: Mapping[str, Tensor], contrast: LossConfig
) -> Tensor:
    left, right = (F.normalize(side.emb[:, :dim].double(), dim=1) for side in (a, b))
    learnt = similar.temperature is None
    scale = out["scale"] if similar.temperature is None else 1 / similar.temperature
    sigmoid = contrast.loss == "sigmoid" and learnt
    logits = scale * left @ right.T + (out["bias"] if sigmoid else 0.0)
    anchors = [_anchors(side) for side in (a, b)]
    hard = ~(anchors[0][:, None] & anchors[1])
    affinity = target(similar, a.keys, b.keys, hard if bool(hard.any()) else None).double()
    if similar.alone:
        affinity = affinity.masked_fill(torch.eye(len(affinity), dtype=torch.bool, device=affinity.device), -1)
    weights = [_weights(side, similar, known) for side, known in zip((a, b), anchors, strict=True)]
    if sigmoid:
        return _sigmoid(logits, affinity, weights, anchors, contrast.label_smoothing)
    forth = _softmax(logits, affinity, weights[0], contrast.label_smoothing)
    return (forth + _softmax(logits.T, affinity.T, weights[1], contrast.label_smoothing)) / 2


def _anchors(side: EmbeddedBatch) -> Tensor:
    if side.anchor is not None:
        return side.anchor
    return torch.ones(len(side.emb), dtype=torch.bool, device=side.emb.device)


def _weights(side: EmbeddedBatch, similar: Similarity, anchors: Tensor) -> Tensor:
    scores = (
        torch.ones_like(anchors, dtype=torch.float64) if similar.score is None else side.keys[similar.score].double()
    )
    return torch.where(anchors, scores, 0.0)


def _softmax(logits: Tensor, affinity: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    compared, positive = affinity >= 0, affinity.clamp(min=0)
    kept = (weight > 0) & (positive.sum(1) > 0)
    wanted = positive[kept] / positive[kept].sum(1, keepdim=True)
    spread = compared[kept].double() / compared[kept].sum(1, keepdim=True)
    logs = logits.masked_fill(~compared, -torch.inf)[kept].log_softmax(1).masked_fill(~compared[kept], 0.0)
    losses = -(((1 - smoothing) * wanted + smoothing * spread) * logs).sum(1)
    return (weight[kept] * losses).sum() / weight[kept].sum()


def _sigmoid(
    logits: Tensor, affinity: Tensor, weights: Sequence[Tensor], anchors: Sequence[Tensor], smoothing: float
) -> Tensor:
    label = affinity.clamp(min=0) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    known = anchors[0][:, None].double() + anchors[1].double()
    weight = (weights[0][:, None] + weights[1]) / known.clamp(min=1) * (affinity >= 0)
    return (weight * losses).sum() / ((weights[0].sum() + weights[1].sum()) / 2)


def _by_group(learner: ModelWithHeads, factor: float) -> dict[str, Tensor]:
    """Gradients of the trained parameters by what they belong to, as vectors on the CPU."""
    model = learner.model
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            of = _group(name, parameter, model)
            groups.setdefault(of, []).append(grad.detach().double().flatten().cpu() * factor)
    return {name: torch.cat(parts) for name, parts in groups.items()}


def _group(name: str, parameter: nn.Parameter, model: Any) -> str:
    if parameter is model.logit_scale:
        return "logit scale"
    if parameter is model.logit_bias:
        return "logit bias"
    own = name.removeprefix("model.backend.")
    for part in ("image", "text"):
        if model.backend.belongs_to(part, own, head=False):
            return f"{part} tower"
        if model.backend.belongs_to(part, own):
            return f"{part} head"
    return "training heads"


def _compare(name: str, launched: Tensor, reference: Tensor, tolerance: tuple[float, float, float]) -> Compared:
    ratio = float(launched.norm() / reference.norm())
    if len(reference) == 1:
        off = abs(float(launched / reference) - 1)
        return Compared(name, 1, float(launched / reference), math.nan, off <= tolerance[2])
    cosine = float(F.cosine_similarity(launched, reference, dim=0))
    return Compared(name, len(reference), ratio, cosine, cosine >= tolerance[0] and abs(ratio - 1) <= tolerance[1])
