"""A light image transform of our own, for towers that come without one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import ModelError
from clipkit.files import dump_json

Resize = Literal["squash", "shortest"]
Filter = Literal["bicubic", "bilinear"]
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MARK = "clipkit_transform"  # in preprocessor_config.json: this file describes an ImageTransform


@dataclass(frozen=True)
class ImageTransform:
    """RGB images to a tensor: resize with PIL, crop, scale to [0, 1], normalise.

    Args:
        image_size: height and width that come out, in pixels.
        mean, std: of each channel, of values in [0, 1]; their length is the number of channels (1 or 3).
        resize: `squash` to a square of side `resize_to`, or the `shortest` side to it; then a centre crop.
        resize_to: pixels before the crop; `image_size` unless given.
        filter: PIL's `bicubic` or `bilinear`, both antialiased.
    """

    image_size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: Resize = "squash"
    resize_to: int | None = None
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            shown = f"mean={self.mean}, std={self.std}"
            raise ModelError(f"mean and std must have 1 or 3 values each, std above 0; found {shown}")
        if self.filter not in _FILTERS:
            raise ModelError(f"the filter must be one of {', '.join(_FILTERS)}; found {self.filter!r}")

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(self._fit(image)) for image in images]))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        mean, std = self._moments
        return pixels.float().div_(255).sub_(mean).div_(std).contiguous()

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)

    def _fit(self, image: Image.Image) -> Image.Image:
        if len(self.mean) == 1:
            image = image.convert("L")
        width, height, goal = *image.size, self.image_size
        short = self.resize_to or goal
        if self.resize == "squash":
            if (width, height) != (short, short):
                width, height = short, short
                image = image.resize((short, short), _FILTERS[self.filter])
        elif min(width, height) != short:  # the longer side is rounded down, as torchvision does
            width, height = (max(short, short * side // min(width, height)) for side in (width, height))
            image = image.resize((width, height), _FILTERS[self.filter])
        left, top = (round((side - goal) / 2) for side in (width, height))
        return image if image.size == (goal, goal) else image.crop((left, top, left + goal, top + goal))

    def describe(self) -> dict[str, Any]:
        return {"transform": "ImageTransform", **self._fields()}

    @property
    def _crops(self) -> bool:
        return self.resize != "squash" or self.resize_to not in (None, self.image_size)

    def _fields(self) -> dict[str, Any]:
        crop = self.image_size if self._crops else None
        return {
            "image_size": self.image_size,
            "resize": self.resize,
            "resize_to": self.resize_to or self.image_size,
            "crop": crop,
            "filter": self.filter,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def save(self, folder: Path) -> None:
        """Write a preprocessor_config.json that transformers reads, too (three channels)."""
        side = {"height": self.image_size, "width": self.image_size}
        short = self.resize_to or self.image_size
        config = {
            "image_processor_type": "CLIPImageProcessor" if self._crops else "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": short, "width": short} if self.resize == "squash" else {"shortest_edge": short},
            "resample": int(_FILTERS[self.filter]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            _MARK: self._fields(),
        }
        if self._crops:
            config |= {"do_center_crop": True, "crop_size": side}
        (folder / "preprocessor_config.json").write_text(dump_json(config), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> ImageTransform | None:
        """The transform that `save` wrote into `folder`; None if another library wrote the file, or none did."""
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")).get(_MARK) if path.is_file() else None
        if settings is None:
            return None
        fields = {key: settings[key] for key in ("image_size", "resize", "resize_to", "filter")}
        return cls(**fields, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
