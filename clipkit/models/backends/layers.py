"""The blocks of a tower, found by its structure: the same rule for every library and family."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.backend import Backend
from clipkit.models.eval_mode import eval_mode
from clipkit.models.processor import Processor


class Layers(NamedTuple):
    """The names of a tower's parameters, by depth. Every one stands in exactly one place."""

    before: list[str]  # what the input of the first block depends on: patches, tokens, positions
    blocks: list[list[str]]
    after: list[str]  # norms, pooling, a projection inside the tower; also what is never read


class Inputs(NamedTuple):
    """What the first block of a tower is given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """All tensors in it, at any depth (positions often come as a tuple)."""
        return list(_tensors((self.args, list(self.kwargs.values()))))


def transformer_blocks(backend: Backend, part: Modality) -> list[nn.Module]:
    """The blocks of a tower, in order: transformer layers, or the stages of a convolutional tower.

    They are the members of the list that holds more of the tower's parameters than any other list does;
    ResNets without such a list have `layer1` to `layer4`.

    Raises:
        ModelError: the tower has no such list.
    """
    blocks: list[nn.Module] = []
    most = 0
    for name, module in backend.named_modules():
        for members in _lists(module) if backend.belongs_to(part, name, head=False) else ():
            held = sum(p.numel() for p in nn.ModuleList(members).parameters())
            if held > most:  # of nested lists the outer one comes first, and holds as much
                blocks, most = members, held
    if not blocks:
        raise ModelError(f"the {part} tower has no list of blocks that could be told apart", where=backend.family)
    return blocks


def _lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    if isinstance(module, nn.ModuleList | nn.Sequential):
        yield list(children.values())
        return
    numbered: dict[str, list[nn.Module]] = defaultdict(list)
    for name, child in children.items():
        if (match := re.fullmatch(r"(.*?)\d+", name)) and next(child.children(), None) is not None:
            numbered[match[1]].append(child)
    yield from (members for members in numbered.values() if len(members) > 1)


def parameters_by_depth(backend: Backend, processor: Processor, part: Modality) -> Layers:
    """A tower's parameters by depth; runs the tower up to its first block, on a blank input."""
    owned = {name: p for name, p in backend.named_parameters() if backend.belongs_to(part, name, head=False)}
    place = {id(p): depth for depth, block in enumerate(transformer_blocks(backend, part)) for p in block.parameters()}
    outside = {name: p for name, p in owned.items() if id(p) not in place}
    with _all_trained(list(outside.values())):
        reached = [x.float().sum() for x in first_inputs(backend, processor, part).tensors() if x.requires_grad]
        gradients = _gradients(reached, list(outside.values()))
    before = [name for name, gradient in zip(outside, gradients, strict=True) if gradient is not None]
    depth = 1 + max(place.values())
    inside = [[name for name, p in owned.items() if place.get(id(p)) == block] for block in range(depth)]
    return Layers(before, inside, [name for name in outside if name not in set(before)])


def _gradients(reached: list[Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not reached or not parameters:
        return (None,) * len(parameters)
    return torch.autograd.grad(torch.stack(reached).sum(), parameters, allow_unused=True)


@contextmanager
def _all_trained(parameters: list[nn.Parameter]) -> Iterator[None]:
    states = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, state in zip(parameters, states, strict=True):
            parameter.requires_grad_(state)


def first_inputs(backend: Backend, processor: Processor, part: Modality, count: int = 1) -> Inputs:
    """What the first block is given for `count` blank inputs, with its gradient; later blocks are not computed."""
    seen: list[Inputs] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Inputs(args, kwargs))
        raise _Enough

    # prepended: before any hook that alters the input
    handle = transformer_blocks(backend, part)[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with eval_mode(backend), torch.enable_grad():
            run_blank(backend, processor, part, count)
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise ModelError(f"the first block of the {part} tower took no part in its output", where=backend.family)


class _Enough(Exception):
    """Ends a forward pass on purpose."""


def run_blank(backend: Backend, processor: Processor, part: Modality, count: int = 1) -> Tensor:
    """The features of `count` black images, or embeddings of `count` texts of one letter."""
    weight = next(p for n, p in backend.named_parameters() if backend.belongs_to(part, n, head=False))
    if part == "image":
        pixels = processor.images([Image.new("RGB", (64, 64))] * count)
        return backend.image_features(pixels.to(weight.device, weight.dtype))
    inputs: dict[str, Any] = {"attention_mask": None}
    inputs |= {name: value.to(weight.device) for name, value in processor.texts(["a"] * count).items()}
    return backend.embed_text(**inputs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
