"""Check that the gradients of a launch are those of the whole batch, by a textbook computation on the user's set-up."""

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
from clipkit.data.batches.batch import RowKeys
from clipkit.losses.contrastive import EmbeddedBatch
from clipkit.losses.similarity import Similarity, target
from clipkit.modality import MODALITIES, Modality
from clipkit.training.heads import ModelWithHeads
from clipkit.training.setup import TrainSetup
from clipkit.training.step import LossConfig, backward, both_sides, outputs

# The least cosine, the largest difference of the norms' ratio from 1, the largest relative error of a scalar. fp32 in a
# deep tower is off by some 1e-5, bf16 by some 1e-2; the mildest known bug (no gradient through the gather) has a cosine
# of 0.98.
TOLERANCE = {"fp32": (0.9999, 1e-3, 1e-3), "bf16": (0.99, 0.03, 0.05), "fp16": (0.99, 0.03, 0.05)}

_DOUBLE = 200e6  # up to so many parameters the reference is computed in float64


@dataclass(frozen=True)
class Compared:
    """The gradients of one group of parameters, compared.

    Attributes:
        name: ``image tower``, ``logit scale`` …
        parameters: how many numbers the group has.
        ratio: norm of the launch's gradient divided by that of the whole batch.
        cosine: between the two gradients; nan for a single number, which has no direction.
        same: whether the two are equal, at this precision.
    """

    name: str
    parameters: int
    ratio: float
    cosine: float
    same: bool


@dataclass(frozen=True)
class GradientCheck:
    """The result of `check_gradients`."""

    groups: tuple[Compared, ...]
    batch_size: int
    ranks: int
    micro_batch: int | None
    precision: str

    @property
    def same(self) -> bool:
        """Whether all groups have the gradient of the whole batch."""
        return all(group.same for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        groups = [asdict(group) for group in self.groups]
        for group in groups:  # JSON has no nan
            group["cosine"] = None if math.isnan(group["cosine"]) else group["cosine"]
        return {**asdict(self), "groups": groups, "same": self.same}

    def lines(self) -> list[str]:
        """Return a table in plain text, and the verdict."""
        cached = f", micro_batch {self.micro_batch}" if self.micro_batch else ""
        head = f"global batch of {self.batch_size} on {self.ranks} ranks, {self.precision}{cached}; dropout off"
        rows = [f"{'':14}{'parameters':>12}{'ratio':>10}{'cosine':>10}"]
        for group in self.groups:
            cosine = "" if math.isnan(group.cosine) else f"{group.cosine:.6f}"
            mark = "" if group.same else "   NOT the big batch"
            rows.append(f"{group.name:14}{group.parameters:12,}{group.ratio:10.5f}{cosine:>10}{mark}")
        negation = "" if self.same else "NOT "
        verdict = f"these are {negation}the gradients of the big batch"
        return [head, *rows, verdict]


def check_gradients(setup: TrainSetup) -> GradientCheck:
    """Compare the first step of a training with one process that holds the whole batch; call it on every rank.

    The reference shares only the notions of similarity with the training code: it computes every pair in one dense
    matrix, by torch's own functions, with the towers in float64 (in fp32 above 200 million parameters), in one graph.
    Dropout is off on both sides, because ranks draw different masks.

    Args:
        setup: of the user's own model, data and config; its weights do not change.
    """
    launched = _as_trained(setup)
    reference = _textbook(setup) if distributed.is_main() else {}
    reference = distributed.broadcast_object(reference)
    precision = setup.accelerator.mixed_precision
    if precision == "no":
        precision = "fp32"
    groups = tuple(_compare(name, launched[name], reference[name], TOLERANCE[precision]) for name in reference)
    config = setup.config
    return GradientCheck(groups, config.batch_size, distributed.world_size(), config.micro_batch, precision)


def _as_trained(setup: TrainSetup) -> dict[str, Tensor]:
    """Return the gradients of the first step as the training code computes them, by group."""
    learner, accelerator = setup.learner.to(setup.accelerator.device), setup.accelerator
    setup.leave_out_unused()
    unused_optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)  # Accelerate prepares no model without one
    wrapped, _ = accelerator.prepare(learner, unused_optimizer)
    wrapped.eval()
    batch = next(iter(setup.loader.batches(0, 1))).to(accelerator.device)
    backward(
        wrapped,
        batch,
        setup.similar,
        setup.loss_config,
        micro_batch=setup.config.micro_batch,
        send=accelerator.backward,
    )
    scaler = getattr(accelerator, "scaler", None)
    gradients = _by_group(learner, 1.0 if scaler is None else 1.0 / scaler.get_scale())
    learner.zero_grad(set_to_none=True)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return gradients


def _textbook(setup: TrainSetup) -> dict[str, Tensor]:
    """Return the gradients of the whole batch in one process, by group."""
    learner = copy.deepcopy(setup.learner).eval()
    small = sum(parameter.numel() for parameter in learner.parameters()) <= _DOUBLE
    dtype = torch.float64 if small and setup.accelerator.device.type != "mps" else torch.float32
    learner.to(dtype)
    steps = replace(setup.loader.steps, rank=0, world_size=1)
    batch = steps[0]
    if isinstance(batch, Exception):
        raise batch
    batch = batch.to(setup.accelerator.device)
    chunk_size = setup.config.micro_batch or setup.config.batch_size
    embedded: list[dict[str, Tensor]] = []
    for chunk in batch.split(max(1, math.ceil(len(batch) / chunk_size))):
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in chunk.items()}
        # one graph, recomputed chunk by chunk, takes the memory of one chunk
        embedded.append(outputs(checkpoint(_embed, learner, inputs, use_reentrant=False)))
    out = {}
    for name, x in embedded[-1].items():
        out[name] = x if x.ndim == 0 else torch.cat([part[name] for part in embedded])
    losses = []
    for index, similarity in enumerate(setup.similar):
        losses.append(similarity.weight * _dense(index, similarity, out, batch.rows, setup.loss_config))
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    return _by_group(learner, 1.0)


def _embed(learner: ModelWithHeads, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = learner(**inputs)
    return {name: x.double() if x.is_floating_point() else x for name, x in out.items()}


def _dense(
    index: int,
    similar: Similarity,
    out: Mapping[str, Tensor],
    rows: Mapping[Modality, RowKeys],
    loss_config: LossConfig,
) -> Tensor:
    """Return the loss of one notion of similarity from the whole matrix of pairs."""
    a, b = both_sides(index, similar, out, rows)
    dims = loss_config.matryoshka if loss_config.matryoshka and not similar.head else (a.emb.shape[1],)
    losses = [_dense_at_dim(similar, a, b, dim, out, loss_config) for dim in dims]
    return torch.stack(losses).mean()


def _dense_at_dim(
    similar: Similarity,
    a: EmbeddedBatch,
    b: EmbeddedBatch,
    dim: int,
    out: Mapping[str, Tensor],
    loss_config: LossConfig,
) -> Tensor:
    """Return the loss that compares the first `dim` dimensions."""
    left = F.normalize(a.emb[:, :dim].double(), dim=1)
    right = F.normalize(b.emb[:, :dim].double(), dim=1)
    sigmoid = loss_config.loss == "sigmoid" and similar.temperature is None
    scale = out["scale"] if similar.temperature is None else 1 / similar.temperature
    logits = scale * left @ right.T + (out["bias"] if sigmoid else 0.0)
    anchors = [_anchors(a), _anchors(b)]
    hard = ~(anchors[0][:, None] & anchors[1])
    affinity = target(similar, a.keys, b.keys, hard if bool(hard.any()) else None).double()
    if similar.same_modality:
        affinity = affinity.masked_fill(torch.eye(len(affinity), dtype=torch.bool, device=affinity.device), -1)
    weights = [_weights(a, similar, anchors[0]), _weights(b, similar, anchors[1])]
    smoothing = loss_config.label_smoothing
    if sigmoid:
        return _sigmoid(logits, affinity, weights, anchors, smoothing)
    forth = _softmax(logits, affinity, weights[0], smoothing)
    back = _softmax(logits.T, affinity.T, weights[1], smoothing)
    return (forth + back) / 2


def _anchors(side: EmbeddedBatch) -> Tensor:
    if side.anchor is not None:
        return side.anchor
    return torch.ones(len(side.emb), dtype=torch.bool, device=side.emb.device)


def _weights(side: EmbeddedBatch, similar: Similarity, anchors: Tensor) -> Tensor:
    if similar.score is None:
        scores = torch.ones_like(anchors, dtype=torch.float64)
    else:
        scores = side.keys[similar.score].double()
    return torch.where(anchors, scores, 0.0)


def _softmax(logits: Tensor, affinity: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    compared, positive = affinity >= 0, affinity.clamp(min=0)
    kept = (weight > 0) & (positive.sum(1) > 0)
    targets = positive[kept] / positive[kept].sum(1, keepdim=True)
    uniform = compared[kept].double() / compared[kept].sum(1, keepdim=True)
    logs = logits.masked_fill(~compared, -torch.inf)[kept].log_softmax(1).masked_fill(~compared[kept], 0.0)
    losses = -(((1 - smoothing) * targets + smoothing * uniform) * logs).sum(1)
    return (weight[kept] * losses).sum() / weight[kept].sum()


def _sigmoid(
    logits: Tensor, affinity: Tensor, weights: Sequence[Tensor], anchors: Sequence[Tensor], smoothing: float
) -> Tensor:
    label = affinity.clamp(min=0) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    anchor_count = anchors[0][:, None].double() + anchors[1].double()
    weight = (weights[0][:, None] + weights[1]) / anchor_count.clamp(min=1) * (affinity >= 0)
    return (weight * losses).sum() / ((weights[0].sum() + weights[1].sum()) / 2)


def _by_group(learner: ModelWithHeads, factor: float) -> dict[str, Tensor]:
    """Return the gradients of the trained parameters, times `factor`, as one vector a group, on the CPU."""
    model = learner.model
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            group = _group(name, parameter, model)
            groups.setdefault(group, []).append(grad.detach().double().flatten().cpu() * factor)
    return {name: torch.cat(parts) for name, parts in groups.items()}


def _group(name: str, parameter: nn.Parameter, model: Any) -> str:
    if parameter is model.logit_scale:
        return "logit scale"
    if parameter is model.logit_bias:
        return "logit bias"
    backend_name = name.removeprefix("model.backend.")
    for modality in MODALITIES:
        if model.backend.belongs_to(modality, backend_name, head=False):
            return f"{modality} tower"
        if model.backend.belongs_to(modality, backend_name):
            return f"{modality} head"
    return "training heads"


def _compare(name: str, launched: Tensor, reference: Tensor, tolerance: tuple[float, float, float]) -> Compared:
    least_cosine, norm_error, scalar_error = tolerance
    if len(reference) == 1:
        ratio = float(launched / reference)
        return Compared(name, 1, ratio, math.nan, abs(ratio - 1) <= scalar_error)
    ratio = float(launched.norm() / reference.norm())
    cosine = float(F.cosine_similarity(launched, reference, dim=0))
    same = cosine >= least_cosine and abs(ratio - 1) <= norm_error
    return Compared(name, len(reference), ratio, cosine, same)
