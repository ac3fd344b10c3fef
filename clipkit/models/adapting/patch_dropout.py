"""Patch dropout (FLIP, Li et al. 2023): in training, the image tower sees a random part of the patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipkit.errors import ModelError, UsageError
from clipkit.models.backend import Backend
from clipkit.models.backends.layers import first_inputs, run_blank, transformer_blocks
from clipkit.models.eval_mode import eval_mode
from clipkit.models.processor import Processor


class PatchDropout:
    """A hook before the tower's first block, where every token has its position already.

    Draws from torch's own generator of the device, so that whoever replays it gets the same patches.

    Args:
        rate: part of the patches that is left out.
        prefix: tokens in front that are no patches, and stay.
        tower: nothing is dropped while it is in eval mode.
    """

    def __init__(self, rate: float, prefix: int, tower: nn.Module) -> None:
        self.rate, self.prefix, self.tower = rate, prefix, tower

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.tower.training or self.rate == 0:
            return None
        if args:
            return (self.keep(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.keep(kwargs["hidden_states"])}

    def keep(self, tokens: Tensor) -> Tensor:
        """(n, prefix + patches, width) to (n, prefix + kept, width), other patches for each image."""
        front, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        count = max(1, int(patches.shape[1] * (1 - self.rate)))
        drawn = torch.rand(patches.shape[:2], device=tokens.device).topk(count).indices.sort().values
        kept = patches.gather(1, drawn.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        return torch.cat([front, kept], dim=1)


def drop_patches(
    backend: Backend, processor: Processor, rate: float, present: PatchDropout | None
) -> PatchDropout | None:
    """What `DualEncoder.patch_dropout` documents; gives the hook, of which a model has one at most."""
    if not 0 <= rate < 1:
        raise UsageError(f"patch_dropout is a part of the patches, from 0 to below 1; found {rate}")
    if present is not None or rate == 0:
        if present is not None:
            present.rate = rate
        _silence_others(backend)
        return present
    prefix = _prefix(backend, processor)
    tower = backend.get_submodule(backend.names["image"].tower[0])
    hook = PatchDropout(rate, prefix, tower)
    handle = transformer_blocks(backend, "image")[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        _try(backend, processor, tower)
    except (RuntimeError, ValueError, IndexError) as error:
        handle.remove()
        message = f"the image tower ({type(tower).__name__}) cannot do without some of its patches"
        raise ModelError(message, fix="leave patch_dropout at 0") from error
    _silence_others(backend)
    return hook


def _prefix(backend: Backend, processor: Processor) -> int:
    """How many tokens stand before the patches, from the shapes at the first block."""
    inputs = first_inputs(backend, processor, "image")
    tokens, *others = inputs.tensors() or [torch.empty(0)]
    convolutions = [
        m for n, m in backend.named_modules() if isinstance(m, nn.Conv2d) and backend.belongs_to("image", n)
    ]
    patch = convolutions[0].stride[0] if convolutions else 0
    if tokens.ndim != 3 or not patch or convolutions[0].kernel_size != convolutions[0].stride:
        raise ModelError("the image tower is not a transformer over patches, so there are none to drop")
    if others:
        message = "the image tower hands its blocks positions or masks besides the tokens, which would no longer fit"
        raise ModelError(
            message, where=type(transformer_blocks(backend, "image")[0]).__name__, fix="leave patch_dropout at 0"
        )
    prefix = tokens.shape[1] - (processor.image_size // patch) ** 2
    if prefix < 0:
        raise ModelError("the image tower merges patches before its first block, so they cannot be dropped")
    return prefix


def _try(backend: Backend, processor: Processor, tower: nn.Module) -> None:
    with eval_mode(backend), torch.random.fork_rng(devices=[]), torch.no_grad():
        tower.training = True  # for the hook alone: no dropout, no statistics
        run_blank(backend, processor, "image", 2)


def _silence_others(backend: Backend) -> None:
    """One rate is enough: open_clip and timm build their own into models that were trained with it."""
    for name, module in backend.named_modules():
        if type(module).__name__.startswith("PatchDropout") and backend.belongs_to("image", name):
            module.prob = 0.0
