"""Ways to train less than the whole model, or in less memory: freeze, gradient checkpointing."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from clipkit.errors import ModelError, UsageError, option
from clipkit.modality import MODALITIES, Modality
from clipkit.models.backend import Backend
from clipkit.models.backends.layers import parameters_by_depth, transformer_blocks
from clipkit.models.processor import Processor

_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def freeze(
    backend: Backend, processor: Processor, part: Modality, *, head: bool = False, first: int | None = None
) -> list[nn.Module]:
    """Stop the gradients of one tower, or of its first blocks and what lies before them.

    Gives the modules that have to stay in eval mode: a frozen BatchNorm would still move its statistics in
    training mode, and a frozen tower draw dropout.
    """
    if part not in MODALITIES:
        raise UsageError(f"a model has the parts 'image' and 'text', found {part!r}")
    if first is None:
        names = {name for name, _ in backend.named_parameters() if backend.belongs_to(part, name, head=head)}
        modules = [module for name, module in backend.named_modules() if backend.belongs_to(part, name, head=head)]
    elif head:
        raise UsageError("head=True locks a head on a whole tower; with blocks= the tower's end trains on")
    else:
        depths = parameters_by_depth(backend, processor, part)
        count = _count(first, len(depths.blocks), part)
        names = {name for group in (depths.before, *depths.blocks[:count]) for name in group}
        modules = []
    for name, parameter in backend.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    modules = modules or _standing_still(backend, names)
    for module in modules:
        module.eval()
    return modules


def _count(first: int, total: int, part: Modality) -> int:
    if not -total <= first <= total:
        raise UsageError(f"blocks={first}, but the {part} tower has {total} blocks")
    return first if first >= 0 else total + first


def _standing_still(backend: Backend, names: set[str]) -> list[nn.Module]:
    """The modules that hold some of `names` and nothing that is trained, with all that is inside them."""
    modules_by_id: dict[int, nn.Module] = {}
    for name, module in backend.named_modules():
        held = dict(module.named_parameters(prefix=name))
        if names & held.keys() and not any(p.requires_grad for p in held.values()):
            modules_by_id |= {id(part): part for part in module.modules()}
    return list(modules_by_id.values())


def checkpoint_gradients(backend: Backend, on: bool) -> None:
    """Turn gradient checkpointing of both towers on or off, by the switch of the tower's own library.

    Raises:
        ModelError: a tower that trains has no such switch, or BatchNorm; nothing was changed then.
    """
    if on:
        for part in MODALITIES:
            _refuse_double_statistics(backend, part)
    _switch(backend, on)
    lacking = [part for part in MODALITIES if on and _trains(backend, part) and not _is_on(backend, part)]
    if lacking:
        _switch(backend, False)
        kind = type(backend.get_submodule(backend.names[lacking[0]].tower[0])).__name__
        raise ModelError(
            f"the {lacking[0]} tower ({kind}) has no gradient checkpointing", fix=f"a smaller {option('micro_batch')}"
        )


def _switch(backend: Backend, on: bool) -> None:
    done: set[int] = set()
    for module in backend.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in done and module.supports_gradient_checkpointing:
            _switch_transformers(module, on)
            done |= {id(part) for part in module.modules()}
        elif id(module) not in done and isinstance(getattr(module, "grad_checkpointing", None), bool):
            module.grad_checkpointing = on  # type: ignore[assignment]  # open_clip and timm read it in forward


def _switch_transformers(model: PreTrainedModel, on: bool) -> None:
    """transformers 5.20 renamed these; the reentrant kind loses gradients behind frozen embeddings."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{word}_checkpointing_disable")()


def _is_on(backend: Backend, part: Modality) -> bool:
    tower = [module for name, module in backend.named_modules() if backend.belongs_to(part, name, head=False)]
    switches = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, switch, False) is True for module in tower for switch in switches)


def _trains(backend: Backend, part: Modality) -> bool:
    return any(p.requires_grad and backend.belongs_to(part, name, head=False) for name, p in backend.named_parameters())


def _refuse_double_statistics(backend: Backend, part: Modality) -> None:
    if not _trains(backend, part):
        return
    for block in transformer_blocks(backend, part):
        trained = any(p.requires_grad for p in block.parameters())
        if trained and any(isinstance(module, _BATCH_NORM) for module in block.modules()):
            message = f"the {part} tower has BatchNorm, whose statistics gradient checkpointing would move twice a step"
            freeze = option("model.freeze", part, python=f'model.freeze("{part}")')
            raise ModelError(message, fix=f"{freeze}, or a smaller {option('micro_batch')}")
