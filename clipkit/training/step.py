"""One step's gradients: of the whole global batch, at once or in chunks that fit into memory.

Cached (Gao et al. 2021, GradCache): embed every chunk without a graph, take the loss's gradient with respect to the
embeddings of the whole batch, then embed each chunk once more, with the same random numbers, and send its part of
that gradient through it. The last chunk keeps its graph from the first time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit import distributed
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
        matryoshka: numbers of first dimensions that also have to work on their own; empty: only all dimensions.
        tile: rows and columns that the loss looks at together; None: all.
    """

    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    label_smoothing: float = 0.0
    matryoshka: tuple[int, ...] = ()
    tile: int | None = TILE


def objective(
    out: Outputs, rows: Mapping[Modality, RowKeys], similar: Sequence[Similarity], loss_config: LossConfig
) -> Loss:
    """Return this rank's share of the loss: the weighted sum over the notions of similarity.

    Args:
        out: outputs of the model for this rank's rows. A notion with a head of its own, at place i of `similar`, reads
            ``head{i}`` in place of ``image``.
        rows: for each modality the keys of its rows.
        similar: notions of similarity.
        loss_config: how embeddings are compared.

    Raises:
        UsageError: a sigmoid loss for a model without a bias.
    """
    losses, kls = [], []
    for index, similarity in enumerate(similar):
        part = _similarity_loss(index, similarity, out, rows, loss_config)
        losses.append(similarity.weight * part.loss)
        kls.append(similarity.weight * part.kl)
    return Loss(torch.stack(losses).sum(), torch.stack(kls).sum())


def _similarity_loss(
    index: int, similar: Similarity, out: Outputs, rows: Mapping[Modality, RowKeys], loss_config: LossConfig
) -> Loss:
    a, b = both_sides(index, similar, out, rows)
    options: dict[str, Any] = {"label_smoothing": loss_config.label_smoothing, "tile": loss_config.tile}
    scale, bias = out["scale"], out.get("bias")
    if similar.temperature is not None:
        scale = torch.full_like(scale.detach(), 1 / similar.temperature)
    elif loss_config.loss == "sigmoid" and bias is None:
        raise UsageError(
            "a sigmoid loss needs a model with a bias",
            where="loss",
            fix=f"{option('loss', 'info_nce')}, or a model with a bias (SigLIP)",
        )

    def loss(a: EmbeddedBatch, b: EmbeddedBatch) -> Loss:
        if loss_config.loss == "sigmoid" and similar.temperature is None and bias is not None:
            return sigmoid_loss(a, b, similar, scale, bias, **options)
        return info_nce(a, b, similar, scale, **options)

    if loss_config.matryoshka and not similar.head:
        return matryoshka(loss, a, b, loss_config.matryoshka)
    return loss(a, b)


def both_sides(
    index: int, similar: Similarity, out: Outputs, rows: Mapping[Modality, RowKeys]
) -> tuple[EmbeddedBatch, EmbeddedBatch]:
    """Return the two sides that a notion of similarity compares.

    Args:
        index: place of the notion; with a head of its own it reads the output ``head{index}``.
        similar: the notion.
        out: outputs of the model.
        rows: for each modality the keys of its rows.
    """
    first, second = similar.between
    return _side(index, first, similar, out, rows), _side(index, second, similar, out, rows)


def _side(
    index: int, side: Modality, similar: Similarity, out: Outputs, rows: Mapping[Modality, RowKeys]
) -> EmbeddedBatch:
    """Return the rows of one side: texts, or of the images either the views or the images themselves."""
    name = f"head{index}" if similar.head else side
    if out.get(name) is None:
        raise UsageError(f"{type(similar).__name__} compares {side}s, and the batch has no {side}s", where="similar")
    emb, row_keys = out[name], rows[side]
    if side == "text" or VIEW not in row_keys.keys:
        return EmbeddedBatch(emb, row_keys.keys, row_keys.anchor)
    view = row_keys.keys[VIEW]
    chosen = view > 0 if similar.views else view == 0
    keys = {column: values[chosen] for column, values in row_keys.keys.items()}
    anchor = None if row_keys.anchor is None else row_keys.anchor[chosen]
    return EmbeddedBatch(emb[chosen], keys, anchor)


def backward(
    module: nn.Module,
    batch: Batch,
    similar: Sequence[Similarity],
    loss_config: LossConfig = LossConfig(),
    *,
    micro_batch: int | None = None,
    send: Callable[[Tensor], None] = torch.autograd.backward,
) -> Loss:
    """Add the gradients of a global batch to the parameters; call it on every rank.

    Args:
        module: a `DualEncoder` or a `ModelWithHeads`, or one of them in DDP.
        batch: this rank's rows, on the module's device. Ranks may hold different numbers.
        similar, loss_config: the loss.
        micro_batch: samples that are embedded at once, each with all its views and hard negatives; None: all.
        send: the backward pass of a loss, such as `Accelerator.backward`.

    Returns:
        The loss, detached: this rank's share.
    """
    count = 1 if micro_batch is None else math.ceil(len(batch) / micro_batch)
    if count <= 1:
        total = objective(outputs(module(**batch.inputs)), batch.rows, similar, loss_config)
        send(total.loss)
        return Loss(total.loss.detach(), total.kl)
    return _cached(module, batch, similar, loss_config, count, send)


def _cached(
    module: nn.Module,
    batch: Batch,
    similar: Sequence[Similarity],
    loss_config: LossConfig,
    count: int,
    send: Callable[[Tensor], None],
) -> Loss:
    chunks = batch.split(count)
    bare = module.module if isinstance(module, DistributedDataParallel) else module
    device = next(module.parameters()).device

    # 1. embed every chunk, the last one with its graph
    random_states = []
    embedded: list[dict[str, Tensor]] = []
    for chunk in chunks[:-1]:  # without DDP: ranks may have different numbers of chunks, and it synchronises buffers
        random_states.append(_random_state(device))
        with torch.no_grad():
            embedded.append(outputs(bare(**chunk)))
    torch.clear_autocast_cache()  # or weights that were cast without a graph would be used again
    with _unsynced(module):
        last = outputs(module(**chunks[-1]))
    embedded.append({name: output.detach() for name, output in last.items()})
    final_random_state = _random_state(device)

    # 2. the gradient of the whole batch's loss with respect to the embeddings
    leaves = {name: output.requires_grad_() for name, output in _joined(embedded).items()}
    total = objective(leaves, batch.rows, similar, loss_config)
    torch.autograd.backward(total.loss)
    grads = _split_gradients(leaves, embedded)

    # 3. back through the model, chunk by chunk; DDP synchronises with the one that comes last
    with _unsynced(module):
        send(_surrogate(last, grads[-1]))
    del last
    for i, chunk in enumerate(chunks[:-1]):
        is_final = i == count - 2
        _set_random_state(device, random_states[i])
        with nullcontext() if is_final else _unsynced(module):
            out = outputs(module(**chunk))
            chunk_grads = grads[i] | _scalar_grads(leaves) if is_final else grads[i]
            send(_surrogate(out, chunk_grads))
    _set_random_state(device, final_random_state)
    return Loss(total.loss.detach(), total.kl)


def outputs(module_output: Any) -> dict[str, Tensor]:
    """Return the outputs of a module by name, without those that are None."""
    named = module_output._asdict() if hasattr(module_output, "_asdict") else module_output
    return {name: output for name, output in named.items() if output is not None}


def _joined(chunks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the outputs of all chunks as those of one batch. The scalars are the same in every chunk."""
    joined = {}
    for name, output in chunks[-1].items():
        joined[name] = output if name in _SCALARS else torch.cat([chunk[name] for chunk in chunks])
    return joined


def _split_gradients(leaves: Mapping[str, Tensor], embedded: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return for each chunk the gradient of its rows, by name."""
    gradients: list[dict[str, Tensor]] = [{} for _ in embedded]
    for name, leaf in leaves.items():
        if name not in _SCALARS and leaf.grad is not None:
            parts = torch.split(leaf.grad, [len(chunk[name]) for chunk in embedded])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[name] = part
    return gradients


def _scalar_grads(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of scale and bias. They are sent once, with the last chunk: the loss was computed once."""
    grads = {}
    for name in _SCALARS:
        grad = leaves[name].grad if name in leaves else None
        if grad is not None:
            grads[name] = grad
    return grads


def _surrogate(out: Outputs, grads: Mapping[str, Tensor]) -> Tensor:
    """Return a scalar. Its gradient with respect to `out` is `grads`."""
    return torch.stack([(out[name] * grad).sum() for name, grad in grads.items() if out[name].requires_grad]).sum()


def _unsynced(module: nn.Module) -> AbstractContextManager[Any]:
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the states of the CPU's generator and of the device's own, where it has one."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


def mean_over_ranks(loss: Loss) -> Loss:
    """Return the mean of all ranks' losses; it is not finite where that of one rank is not."""
    row = torch.stack(loss).detach().float().reshape(1, 2)
    return Loss(*distributed.gather_rows(row, [1] * distributed.world_size()).mean(dim=0))
