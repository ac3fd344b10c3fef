"""Ways to train less than the whole model: freeze."""

from __future__ import annotations

from torch import nn

from clipkit.models.backend import Backend, Part


def freeze(backend: Backend, part: Part, *, head: bool = False) -> list[nn.Module]:
    """Stop the gradients of one tower; gives the modules that have to stay in eval mode.

    A frozen tower in training mode would still move its BatchNorm statistics and draw dropout.
    """
    for name, parameter in backend.named_parameters():
        if backend.owns(part, name, head=head):
            parameter.requires_grad_(False)
    modules = [module for name, module in backend.named_modules() if backend.owns(part, name, head=head)]
    for module in modules:
        module.eval()
    return modules
