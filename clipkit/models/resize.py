"""Other image sizes and context lengths for a model that exists: positions are interpolated, once and for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipkit.errors import ModelError, UsageError
from clipkit.models.backend import Backend, Part
from clipkit.models.blocks import in_eval_mode
from clipkit.models.processor import Processor


class Change(NamedTuple):
    """One side's change, checked and ready: nothing is touched before all of them are."""

    side: Any  # the new ImageSide or TextSide
    apply: Callable[[], None]  # gives the weights and configs their new shape


def resize(
    backend: Backend, processor: Processor, image_size: int | None, context_length: int | None, *, lora: bool
) -> Processor:
    """What `DualEncoder.resize` documents; gives the processor that fits the model as it is then."""
    if image_size is None and context_length is None:
        raise UsageError("resize to what?", fix="image_size= in pixels, context_length= in tokens, or both")
    if lora:
        raise UsageError("a model with LoRA cannot be resized", fix="merge_lora() first, or resize before add_lora")
    if min(value for value in (image_size, context_length) if value is not None) < 1:
        raise UsageError(f"sizes are at least 1; found image_size={image_size}, context_length={context_length}")
    if backend.family == "open_clip":
        from clipkit.models import resize_openclip as native
    else:
        from clipkit.models import resize_transformers as native  # type: ignore[no-redef]
    image = native.image(backend, processor, image_size) if image_size else None
    text = native.text(backend, processor, context_length) if context_length else None
    for change in (image, text):
        if change is not None:
            change.apply()
    return replace(
        processor,
        image_side=image.side if image else processor.image_side,
        text_side=text.side if text else processor.text_side,
    )


def resample_grid(table: Tensor, prefix: int, old: int, new: int) -> Tensor:
    """(…, prefix + old², width) to (…, prefix + new², width): bicubic with antialias; the prefix stays as it is."""
    tokens = table.detach().float().reshape(table.shape[-2:])
    front, grid = tokens[:prefix], tokens[prefix:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    joined = _stack(front, grid.flatten(2)[0].T)
    return joined.reshape(*table.shape[:-2], *joined.shape).to(table.dtype)


def resample_line(table: Tensor, front: int, length: int) -> Tensor:
    """(…, front + old, width) to (…, front + length, width): linear if longer, cut if shorter."""
    tokens = table.detach().float().reshape(table.shape[-2:])
    first, line = tokens[:front], tokens[front:]
    if length > len(line):
        line = F.interpolate(line.T[None], size=length, mode="linear", align_corners=False)[0].T
    joined = _stack(first, line[:length])
    return joined.reshape(*table.shape[:-2], *joined.shape).to(table.dtype)


def _stack(front: Tensor, rest: Tensor) -> Tensor:
    joined: Tensor = rest.new_empty(len(front) + len(rest), rest.shape[1])
    joined[: len(front)], joined[len(front) :] = front, rest
    return joined


def set_parameter(root: nn.Module, name: str, values: Tensor) -> None:
    """Another shape for a parameter, which keeps its name and whether it is trained."""
    parent, _, leaf = name.rpartition(".")
    module = root.get_submodule(parent) if parent else root
    old = module.get_parameter(leaf)
    setattr(module, leaf, nn.Parameter(values.contiguous(), requires_grad=old.requires_grad))


def takes(backend: Backend, side: Any) -> bool:
    """Whether the image tower as it is computes features of what this transform gives."""
    pixels = side([Image.new("RGB", (64, 64))])
    weight = next(p for n, p in backend.named_parameters() if backend.owns("image", n, head=False))
    with in_eval_mode(backend):
        try:
            backend.image_features(pixels.to(weight.device, weight.dtype))
        except (RuntimeError, ValueError, AssertionError):
            return False
    return True


def cannot(part: Part, kind: object, why: str, fix: str | None = None) -> ModelError:
    what = "image size" if part == "image" else "context length"
    return ModelError(f"the {what} cannot be changed: {why}", where=f"{part} tower {type(kind).__name__}", fix=fix)
