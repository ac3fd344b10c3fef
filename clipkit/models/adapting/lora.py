"""LoRA (Hu et al. 2021) on the towers, through peft: small matrices beside frozen weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clipkit.errors import ModelError, UsageError
from clipkit.extras import install_command
from clipkit.modality import MODALITIES, Modality
from clipkit.models.adapting.split_attention import SplitAttention
from clipkit.models.backend import Adapted, Backend, Lora, root_of
from clipkit.models.backends.layers import transformer_blocks
from clipkit.suggest import near

ADAPTER = "default"  # peft's own name for the only adapter
MARK = ".lora_"  # in the names of peft's matrices
UPDATE = ".lora_B."  # of the factor that begins at 0
_LINEAR = (nn.Linear, Conv1D)
_ADAPTABLE = (*_LINEAR, nn.Conv1d, nn.Conv2d)
_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def add(
    backend: Backend,
    parts: Sequence[Modality],
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
) -> None:
    """Put LoRA on one tower or both; nothing is changed unless all of it can be."""
    for part in parts:
        if part not in MODALITIES:
            raise UsageError(f"LoRA goes on 'image', 'text' or 'both', found {part!r}")
        if backend.lora and part in backend.lora.parts:
            raise UsageError(f"the {part} tower has LoRA already", fix="model.merge_lora() first")
    if rank < 1 or not 0 <= dropout < 1 or not alpha > 0:
        shown = f"{rank}, {alpha}, {dropout}"
        raise UsageError(f"rank must be at least 1, alpha above 0, dropout in [0, 1); found {shown}")
    require_peft()
    chosen = _targets(backend, parts, targets)
    for part, layers in chosen.items():
        inject(backend, part, Adapted(rank, alpha, dropout, layers))


def inject(backend: Backend, part: Modality, adapted: Adapted) -> None:
    """Freeze a tower and give the named layers their matrices, drawn from torch's random state."""
    peft = require_peft()
    state = backend.lora or Lora()
    state.trained |= {name for name, p in backend.named_parameters() if p.requires_grad and MARK not in name}
    root = root_of(backend, part)
    top = backend.get_submodule(root)
    _split(top, adapted.layers)
    outside = {n: p.requires_grad for n, p in backend.named_parameters() if not backend.belongs_to(part, n, head=False)}
    config = peft.LoraConfig(
        r=adapted.rank,
        lora_alpha=adapted.alpha,
        lora_dropout=adapted.dropout,
        target_modules="|".join(re.escape(name) for name in adapted.layers),  # a list would match by suffix, too
    )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of Conv1D's transposed weights: known
        peft.inject_adapter_in_model(config, top, ADAPTER)
    del top.peft_config  # transformers would save it in place of the model
    for name, parameter in backend.named_parameters():
        if name not in outside:
            parameter.requires_grad_(MARK in name)
        elif backend.belongs_to(part, name):  # its head
            parameter.requires_grad_(name in backend.fresh)
        else:
            parameter.requires_grad_(outside[name])
    state.parts[part] = adapted
    backend.lora = state
    backend.fresh |= {n for n, _ in backend.named_parameters() if MARK in n and backend.belongs_to(part, n)}
    for name, module in backend.named_modules():
        if isinstance(module, _BATCH_NORM) and backend.belongs_to(part, name, head=False):
            state.still.append(module.eval())


def require_peft() -> Any:
    """The module peft.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("LoRA needs peft, which is not installed", fix=install_command("lora")) from error
    return peft


def _targets(
    backend: Backend, parts: Sequence[Modality], wanted: Sequence[str] | None
) -> dict[Modality, tuple[str, ...]]:
    """Names below each root: the linear layers of attention and MLP, or the layers whose names end as asked."""
    if wanted is None:
        return {part: _linear_layers(backend, part) for part in parts}
    layers = {part: _adaptable(backend, part) for part in parts}
    known = sorted({name.rpartition(".")[2] for named in layers.values() for name in named})
    where = f"{' and '.join(parts)} tower"
    for ending in wanted:  # of both towers, one may have it
        if not any(_ends(name, ending) for named in layers.values() for name in named):
            message = f"no layer called {ending!r} that LoRA could adapt.{near(ending, known)}"
            raise ModelError(message, where=where, fix=f"some of: {', '.join(known)}")
    matches = {part: tuple(sorted(n for n in layers[part] if any(_ends(n, e) for e in wanted))) for part in parts}
    if lacking := [part for part in parts if not matches[part]]:
        message = f"the {lacking[0]} tower has no layer called {' or '.join(map(repr, wanted))}"
        raise ModelError(message, where=where, fix=f"some of: {', '.join(known)}")
    return matches


def _ends(name: str, ending: str) -> bool:
    """Also where the ending names what holds the layer: `attn` stands for all of its projections."""
    return f".{ending}." in f".{name}."


def _linear_layers(backend: Backend, part: Modality) -> tuple[str, ...]:
    inside = {id(module) for block in transformer_blocks(backend, part) for module in block.modules()}
    layers = _adaptable(backend, part)
    names = [name for name, module in layers.items() if id(module) in inside and not _is_convolution(module)]
    if not names:
        message = f"the {part} tower has no linear layers in its blocks, so there is no default for LoRA"
        raise ModelError(message, fix="targets= with the names of layers, for example of convolutions")
    return tuple(sorted(names))


def _adaptable(backend: Backend, part: Modality) -> dict[str, nn.Module]:
    """Layers by their names below the root; of packed attention, the names that its projections will have."""
    root = root_of(backend, part)
    linear_layers: dict[str, nn.Module] = {}
    for name, module in backend.named_modules():
        below = name.removeprefix(f"{root}.")
        if not backend.belongs_to(part, name, head=False) or name == root:
            continue
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None and module.bias_k is None:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    linear_layers[f"{below}.{projection}"] = module
        elif isinstance(module, _ADAPTABLE) and type(module).__name__ != "NonDynamicallyQuantizableLinear":
            linear_layers[below] = module
    return linear_layers


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def _split(top: nn.Module, layers: Sequence[str]) -> None:
    for name in {layer.rpartition(".")[0] for layer in layers} - {""}:
        module = top.get_submodule(name) if _exists(top, name) else None
        if isinstance(module, nn.MultiheadAttention):
            _replace(top, name, SplitAttention(module))


def _exists(top: nn.Module, name: str) -> bool:
    return any(name == path for path, _ in top.named_modules())


def _replace(top: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(top.get_submodule(parent) if parent else top, leaf, module)


def merged(backend: Backend) -> Backend:
    """The backend itself, or if it has LoRA a copy on the CPU whose weights hold the updates."""
    return _plain(backend, merge=True)


def base(backend: Backend) -> Backend:
    """The backend itself, or if it has LoRA a copy on the CPU without the updates of the towers."""
    return _plain(backend, merge=False)


def _plain(backend: Backend, *, merge: bool) -> Backend:
    if backend.lora is None:
        return backend
    plain = copy.deepcopy(backend).cpu()
    unload(plain, merge=merge)
    _forget(plain)
    return plain.eval()


def merge_in_place(backend: Backend) -> None:
    """Add the updates to the weights and drop the matrices; what trained before LoRA came trains again."""
    assert backend.lora is not None
    device = backend.device
    unload(backend.cpu(), merge=True)  # on the CPU, as `merged` does it: to the same last bit
    backend.to(device)
    for name, parameter in backend.named_parameters():
        if name in backend.lora.trained:
            parameter.requires_grad_(True)
    _forget(backend)


def _forget(backend: Backend) -> None:
    backend.lora = None
    backend.fresh = frozenset(name for name in backend.fresh if MARK not in name)


def unload(backend: Backend, *, merge: bool) -> None:
    """Put plain layers back in place of peft's."""
    for name, layer in list(_tuned(backend)):
        if merge:
            layer.merge()
        _replace(backend, name, layer.get_base_layer())
    for name, module in list(backend.named_modules()):
        if isinstance(module, SplitAttention):
            _replace(backend, name, module.packed())


def _tuned(backend: Backend) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in backend.named_modules() if isinstance(module, BaseTunerLayer))
