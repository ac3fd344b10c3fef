"""Resizing towers of transformers: the tower's own class, built with a changed config, says what has to change."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.adapting.positions import Change, cannot, resample_grid, resample_line, set_parameter, takes
from clipkit.models.backend import Backend, root_of
from clipkit.models.backends.quiet import quiet
from clipkit.models.image_transform import ImageTransform
from clipkit.models.processor import Processor, TransformersImages

_SIZES = ("size", "crop_size")


def image(backend: Backend, processor: Processor, goal: int) -> Change:
    """The change to images of `goal` pixels."""
    side = _image_side(processor.image_side, goal)
    tower = backend.get_submodule(root_of(backend, "image"))
    old, changes = _known_size(tower, goal)
    twin = _rebuilt(tower, changes) if changes else None
    tables = {} if twin is None else _wider(tower, twin, old, goal)
    if not (tables or (takes(backend, side) if twin is None else _runs(twin, side))):
        raise cannot("image", tower, f"it does not take images of {goal} pixels")

    def apply() -> None:
        if twin is not None:
            _transplant(tower, twin, tables)
        _set_configs(backend, "image", tower, changes)

    return Change(side, apply)


def _known_size(tower: Any, goal: int) -> tuple[int, dict[str, Any]]:
    """The size that a tower was built for, and what its config says for another; nothing where it says none."""
    config, inner = tower.config, getattr(tower, "timm_model", None)
    if inner is not None:  # timm's convolutional towers refuse to be told a size, and need none
        old = _only(getattr(getattr(inner, "patch_embed", None), "img_size", None))
        old = old if hasattr(inner, "set_input_size") else None
        return old or 0, {"model_args": {**(config.model_args or {}), "img_size": goal}} if old else {}
    size = getattr(config, "image_size", None)
    new = type(size)([goal] * len(size)) if isinstance(size, list | tuple) else goal
    return _only(size) or 0, {"image_size": new} if _only(size) else {}


def _runs(twin: Any, side: Any) -> bool:
    try:
        with torch.no_grad():
            twin.eval()(pixel_values=side([Image.new("RGB", (64, 64))]))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def _wider(tower: nn.Module, twin: nn.Module, old: int, goal: int) -> dict[str, Tensor]:
    patch, tables = _patch(tower), {}
    for name, table, shape in _differing(tower, twin):
        before, after = (old // patch, goal // patch) if patch else (0, 0)
        prefix = table.shape[-2] - before**2
        fits = prefix >= 0 and (*table.shape[:-2], prefix + after**2, table.shape[-1]) == shape
        if not (before and after and fits):
            raise cannot("image", tower, f"{name} holds relative positions, not a grid of absolute ones")
        tables[name] = resample_grid(table, prefix, before, after)
    return tables


def text(backend: Backend, processor: Processor, goal: int) -> Change:
    """The change to texts of `goal` tokens."""
    tower = backend.get_submodule(root_of(backend, "text"))
    side = _text_side(processor.text_side, goal)
    positions = getattr(tower.config, "max_position_embeddings", None)
    skipped, differing = 0, []
    if positions is not None:
        differing = _differing(tower, _rebuilt(tower, {"max_position_embeddings": positions + 1}))
        skipped = max((_skipped(tower, name) for name, _, _ in differing), default=0)
    usable = goal if positions is None else positions - skipped
    if goal > usable and not differing:
        why = f"its positions are rotary or relative, so that there are none to interpolate; it ends at {usable}"
        raise cannot("text", tower, why, f"context_length={usable} or less")
    whole = goal > usable or processor.context_length == usable  # else the tower had more positions than were used
    changes = {"max_position_embeddings": goal + skipped}
    twin = _rebuilt(tower, changes) if differing and whole else None
    tables = {} if twin is None else _longer(tower, twin, usable, goal)

    def apply() -> None:
        if twin is not None:
            _transplant(tower, twin, tables)
            _set_configs(backend, "text", tower, changes)
        if hasattr(backend, "joint"):
            backend.joint = replace(backend.joint, context_length=goal)  # type: ignore[type-var]

    return Change(side, apply)


def _longer(tower: nn.Module, twin: nn.Module, usable: int, goal: int) -> dict[str, Tensor]:
    tables = {}
    for name, table, shape in _differing(tower, twin):
        front = table.shape[-2] - usable
        if front < 0 or (*table.shape[:-2], front + goal, table.shape[-1]) != shape:
            raise cannot("text", tower, f"{name} holds relative positions, not one for each token")
        tables[name] = resample_line(table, front, goal)
    return tables


def _skipped(tower: nn.Module, name: str) -> int:
    """Rows that no token uses: RoBERTa and its relatives count positions from the padding's id upwards."""
    padding = getattr(tower.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _rebuilt(tower: Any, changes: dict[str, Any]) -> Any:
    """A tower of the same class with random weights and another config."""
    config = copy.deepcopy(tower.config)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]), quiet():
        return type(tower)(config)


def _differing(tower: nn.Module, twin: nn.Module) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """Parameters whose shape another config changes: name, weights, new shape."""
    mine = dict(tower.named_parameters())
    theirs = ((name, tuple(p.shape)) for name, p in twin.named_parameters() if name in mine)
    return [(name, mine[name], shape) for name, shape in theirs if tuple(mine[name].shape) != shape]


def _transplant(tower: nn.Module, twin: nn.Module, tables: dict[str, Tensor]) -> None:
    """Give a tower the tables, and from its twin the buffers and numbers that go with them."""
    for name, table in tables.items():
        set_parameter(tower, name, table)
    modules = dict(tower.named_modules())
    for name, theirs in twin.named_modules():
        mine = modules.get(name)
        if mine is None:
            continue
        for key, buffer in theirs._buffers.items():  # named_buffers leaves out those that are None
            here = mine._buffers.get(key)
            if (here is None) != (buffer is None) or (here is not None and here.shape != buffer.shape):
                mine._buffers[key] = None if buffer is None else buffer.to(next(tower.parameters()).device)
        for key, value in vars(theirs).items():
            if _numbers(value) and vars(mine).get(key, value) != value:
                setattr(mine, key, value)


def _numbers(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool)


def _set_configs(backend: Backend, part: Modality, tower: nn.Module, changes: dict[str, Any]) -> None:
    """In every copy of the tower's config: transformers gives one to each module, and one to the whole model."""
    whole = getattr(getattr(backend, "model", None), "config", None)
    inner = getattr(whole, "vision_config" if part == "image" else "text_config", None)
    for config in [inner, *(getattr(module, "config", None) for module in tower.modules())]:
        for key, value in changes.items():
            if hasattr(config, key):
                setattr(config, key, value)


def _only(size: Any) -> int | None:
    sides = {size} if isinstance(size, int) else set(size or ())
    return int(sides.pop()) if len(sides) == 1 else None


def _patch(tower: nn.Module) -> int | None:
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            return int(module.stride[0]) if module.kernel_size == module.stride else None
    return None


def _image_side(side: Any, goal: int) -> Any:
    if isinstance(side, ImageTransform):
        scaled = side.resize_to and round(side.resize_to * goal / side.image_size)
        return replace(side, image_size=goal, resize_to=scaled)
    if not isinstance(side, TransformersImages):
        raise ModelError(f"the image transform {type(side).__name__} cannot be resized")
    settings = side.image_processor.to_dict()
    for key in _SIZES:
        if settings.get(key):
            settings[key] = _scaled(settings[key], goal / side.image_size)
    resized = TransformersImages(type(side.image_processor).from_dict(settings))
    if resized.image_size != goal:
        raise ModelError(f"{type(side.image_processor).__name__} cannot be set to images of {goal} pixels")
    return resized


def _scaled(size: Any, factor: float) -> Any:
    if isinstance(size, int):
        return round(size * factor)
    return {key: round(value * factor) for key, value in dict(size).items() if value}


def _text_side(side: Any, goal: int) -> Any:
    resized = copy.copy(side)
    resized.tokenizer = copy.deepcopy(side.tokenizer)
    resized.tokenizer.model_max_length = goal
    resized.context_length = goal
    return resized
