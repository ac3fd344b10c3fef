"""Position embeddings of another size: resampled as a grid or a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.backend import Backend
from clipkit.models.eval_mode import eval_mode


class Change(NamedTuple):
    """One side's change, checked and ready: nothing is touched before all of them are."""

    side: Any  # the new ImageSide or TextSide
    apply: Callable[[], None]  # gives the weights and configs their new shape


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
    weight = next(p for n, p in backend.named_parameters() if backend.belongs_to("image", n, head=False))
    with eval_mode(backend):
        try:
            backend.image_features(pixels.to(weight.device, weight.dtype))
        except (RuntimeError, ValueError, AssertionError):
            return False
    return True


def cannot(part: Modality, kind: object, why: str, fix: str | None = None) -> ModelError:
    what = "image size" if part == "image" else "context length"
    return ModelError(f"the {what} cannot be changed: {why}", where=f"{part} tower {type(kind).__name__}", fix=fix)
