"""One step's gradients: of the whole global batch, at once or in chunks that fit into memory.

Cached (Gao et al. 2021, GradCache): embed every chunk without a graph, take the loss's gradient with respect to the
embeddings of the whole batch, then embed each chunk once more, with the same random numbers, and send its part of
that gradient through it. The last chunk keeps its graph from the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.data.batches.batch import Batch, RowKeys
from clipkit.errors import UsageError, option
from clipkit.losses.contrastive import TILE, EmbeddedBatch, Loss, info_nce, matryoshka, sigmoid_loss
from clipkit.losses.similarity import VIEW, Similarity
from clipkit.modality import Modality

Outputs = Mapping[str, Tensor]  # "image", "text", "head0" …: (rows, dim); "scale", "bias": 0-dim

_SCALARS = ("scale", "bias")


@dataclass(frozen=True)
class LossConfig:
    """How embeddings are compared.

    Args:
        loss: ``info_nce``, or ``sigmoid`` for models with a bias. Notions with a temperature of their own always
            take InfoNCE, for the bias belongs to the learnt scale.
        label_smoothing: see `info_nce` and `sigmoid_loss`.
        matryoshka: numbers of dimensions that each have to serve on their own; empty: all dimensions alone.
        tile: rows and columns that the loss looks at together; None: all.
    """

    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    label_smoothing: float = 0.0
    matryoshka: tuple[int, ...] = ()
    tile: int | None = TILE


def objective(
    out: Outputs, rows: Mapping[Modality, RowKeys], similar: Sequence[Similarity], contrast: LossConfig
) -> Loss:
    """The weighted sum of the losses of each notion of similarity: this rank's share.

    Args:
        out: what the model gave for this rank's rows. A notion with a head of its own, at place i of `similar`, reads
            ``head{i}`` in place of ``image``.
        rows: side -> what is known of its rows.
        similar: notions.
        contrast: how they are compared.

    Raises:
        UsageError: a sigmoid loss for a model without a bias.
    """
    found = [_one(i, each, out, rows, contrast) for i, each in enumerate(similar)]
    weights = [each.weight for each in similar]
    losses, kls = ([w * part[i] for w, part in zip(weights, found, strict=True)] for i in (0, 1))
    return Loss(torch.stack(losses).sum(), torch.stack(kls).sum())


def _one(i: int, similar: Similarity, out: Outputs, rows: Mapping[Modality, RowKeys], contrast: LossConfig) -> Loss:
    a, b = (side_of(side, f"head{i}" if similar.head else side, similar, out, rows) for side in similar.between)
    options: dict[str, Any] = {"label_smoothing": contrast.label_smoothing, "tile": contrast.tile}
    scale, bias = out["scale"], out.get("bias")
    if similar.temperature is not None:
        scale = torch.full_like(scale.detach(), 1 / similar.temperature)
    elif contrast.loss == "sigmoid" and bias is None:
        raise UsageError(
            "a sigmoid loss needs a model with a bias",
            where="loss",
            fix=f"{option('loss', 'info_nce')}, or a model with a bias (SigLIP)",
        )

    def loss(a: EmbeddedBatch, b: EmbeddedBatch) -> Loss:
        if contrast.loss == "sigmoid" and similar.temperature is None and bias is not None:
            return sigmoid_loss(a, b, similar, scale, bias, **options)
        return info_nce(a, b, similar, scale, **options)

    return matryoshka(loss, a, b, contrast.matryoshka) if contrast.matryoshka and not similar.head else loss(a, b)


def side_of(
    side: Modality, name: str, similar: Similarity, out: Outputs, rows: Mapping[Modality, RowKeys]
) -> EmbeddedBatch:
    """The rows of a side that a notion compares: `name` of what the model gave, the images or their views."""
    if out.get(name) is None:
        raise UsageError(f"{type(similar).__name__} compares {side}s, and the batch has none of them", where="similar")
    emb, known = out[name], rows[side]
    if side == "text" or VIEW not in known.keys:
        return EmbeddedBatch(emb, known.keys, known.anchor)
    view = known.keys[VIEW]
    chosen = view > 0 if similar.views else view == 0
    keys = {column: values[chosen] for column, values in known.keys.items()}
    return EmbeddedBatch(emb[chosen], keys, None if known.anchor is None else known.anchor[chosen])


def backward(
    module: nn.Module,
    batch: Batch,
    similar: Sequence[Similarity],
    contrast: LossConfig = LossConfig(),
    *,
    micro_batch: int | None = None,
    send: Callable[[Tensor], None] = torch.autograd.backward,
) -> Loss:
    """Add the gradients of a global batch to the parameters; call it on every rank.

    Args:
        module: a `DualEncoder` or a `ModelWithHeads`, or one of them in DDP.
        batch: this rank's rows, on the module's device. Ranks may hold different numbers.
        similar, contrast: the loss.
        micro_batch: samples that are embedded at once, each with all its views and hard negatives; None: all.
        send: the backward pass of a loss, such as `Accelerator.backward`.

    Returns:
        The loss, detached: this rank's share.
    """
    count = 1 if micro_batch is None else -(-len(batch) // micro_batch)
    if count <= 1:
        found = objective(outputs(module(**batch.inputs)), batch.rows, similar, contrast)
        send(found.loss)
        return Loss(found.loss.detach(), found.kl)
    return _cached(module, batch, similar, contrast, count, send)


def _cached(
    module: nn.Module,
    batch: Batch,
    similar: Sequence[Similarity],
    contrast: LossConfig,
    count: int,
    send: Callable[[Tensor], None],
) -> Loss:
    chunks = batch.split(count)
    bare = module.module if isinstance(module, DistributedDataParallel) else module
    device = next(module.parameters()).device
    before, seen = [], []
    for chunk in chunks[:-1]:  # without DDP: ranks may have different numbers of chunks, and it synchronises buffers
        before.append(_random_state(device))
        with torch.no_grad():
            seen.append(outputs(bare(**chunk)))
    torch.clear_autocast_cache()  # or weights that were cast without a graph would be used again
    with _unsynced(module):
        last = outputs(module(**chunks[-1]))
    seen.append({name: each.detach() for name, each in last.items()})
    after = _random_state(device)

    leaves = {name: each.requires_grad_() for name, each in _joined(seen).items()}
    found = objective(leaves, batch.rows, similar, contrast)
    torch.autograd.backward(found.loss)
    grads = _cut(leaves, seen)

    with _unsynced(module):
        send(_surrogate(last, grads[-1]))
    del last
    for i, chunk in enumerate(chunks[:-1]):
        final = i == count - 2
        _set_random_state(device, before[i])
        with nullcontext() if final else _unsynced(module):
            out = outputs(module(**chunk))
            send(_surrogate(out, grads[i] | _scalar_grads(leaves) if final else grads[i]))
    _set_random_state(device, after)
    return Loss(found.loss.detach(), found.kl)


def outputs(found: Any) -> dict[str, Tensor]:
    """What a module gave, by name, without the sides that are not there."""
    named = found._asdict() if hasattr(found, "_asdict") else found
    return {name: each for name, each in named.items() if each is not None}


def _joined(seen: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of all chunks as those of one batch; the scalars stand in each."""
    return {
        name: each if name in _SCALARS else torch.cat([one[name] for one in seen]) for name, each in seen[-1].items()
    }


def _cut(leaves: Mapping[str, Tensor], seen: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The gradient of each chunk's rows, by name."""
    found: list[dict[str, Tensor]] = [{} for _ in seen]
    for name, leaf in leaves.items():
        if name not in _SCALARS and leaf.grad is not None:
            parts = torch.split(leaf.grad, [len(each[name]) for each in seen])
            for one, part in zip(found, parts, strict=True):
                one[name] = part
    return found


def _scalar_grads(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of scale and bias: sent once, with the last chunk, for the loss was computed once."""
    found = {name: leaves[name].grad for name in _SCALARS if name in leaves}
    return {name: grad for name, grad in found.items() if grad is not None}


def _surrogate(out: Outputs, grads: Mapping[str, Tensor]) -> Tensor:
    """0-dim: something whose gradient with respect to `out` is `grads`."""
    return torch.stack([(out[name] * grad).sum() for name, grad in grads.items() if out[name].requires_grad]).sum()


def _unsynced(module: nn.Module) -> AbstractContextManager[Any]:
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
