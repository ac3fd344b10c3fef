"""What an image transform really does, measured by running it on small drawn images: configs can lie, pixels cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipkit.models.processor import ImageSide

UNKNOWN = "unlike any known"
_CLOSE = 0.01  # mean difference of pixels in [0, 1]; the filters lie 0.02 to 0.2 apart on noise, rounding moves 0.002

_SMOOTH: dict[str, Any] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class _Axis(NamedTuple):
    """How one side of the source lands on one side of the output."""

    step: float  # source pixels from one output pixel to the next
    start: float  # source pixels left of the output
    linear: bool


def measure_transform(side: ImageSide) -> dict[str, Any]:
    """Size, channels, mean and std, resize, crop, filter and antialias of a transform, in words.

    Equal words stand for equal transforms, whichever library runs them. What cannot be recognised is called
    "unlike any known", and then the transform's own settings are part of the facts.
    """
    goal = side.image_size
    black, white, red = (side([Image.new("RGB", (goal, goal), colour)])[0] for colour in ("black", "white", "red"))
    low, high = black.mean((1, 2)), white.mean((1, 2))
    std = 1 / (high - low)
    facts: dict[str, Any] = {
        "size": "x".join(str(n) for n in black.shape[1:]),
        "channels": _channels((red.mean((1, 2)) - low) * std),
        "mean": _numbers(-low * std),
        "std": _numbers(std),
    }
    unit = _Unit(side, low, std)
    facts |= _geometry(unit, goal)
    if UNKNOWN in facts.values():
        facts["transform"] = json.dumps(side.describe(), sort_keys=True, default=str)
    return facts


class _Unit:
    """A transform with its normalisation undone: grey pixels to (height, width) in [0, 1]."""

    def __init__(self, side: ImageSide, low: Tensor, std: Tensor) -> None:
        self.side, self.low, self.std = side, low.view(-1, 1, 1), std.view(-1, 1, 1)

    def __call__(self, grey: np.ndarray[Any, Any]) -> Tensor:
        image = Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, -1))
        return ((self.side([image])[0] - self.low) * self.std).mean(0)


def _channels(red: Tensor) -> str:
    """How red comes out tells the order of the channels."""
    shapes = {"RGB": (1.0, 0.0, 0.0), "BGR": (0.0, 0.0, 1.0), "grey": (0.299,), "grey in three": (0.299,) * 3}
    for name, expected in shapes.items():
        if len(expected) == len(red) and (red - torch.tensor(expected)).abs().max() < 0.01:
            return name
    return UNKNOWN


def _numbers(values: Tensor) -> str:
    return " ".join(_number(float(value)) for value in values)


def _number(value: float) -> str:
    """The shortest decimal that stands for a value; float noise of 1e-6 does not move it."""
    for digits in range(1, 5):
        # 0.0237 of a unit: no decimal anyone writes has a remainder on this edge, so noise decides nothing
        if abs(value - round(value, digits)) < 0.0237 * 10.0**-digits:
            return f"{round(value, digits) + 0.0:g}"
    return f"{value + 0.0:.4f}"


def _geometry(unit: _Unit, goal: int) -> dict[str, str]:
    width, height = 3 * goal, 2 * goal
    ramps = _ramp(width, height), _ramp(height, width).T
    across, down = unit(ramps[0]), unit(ramps[1])
    if across.shape == (height, width):
        return {"resize": "none", "crop": "none", "crop_rounding": "-", "filter": "-", "antialias": "-"}
    x, y = _axis(across.mean(0), width), _axis(down.mean(1), height)
    out = across.shape[0]
    if not (x.linear and y.linear) or across.shape[0] != across.shape[1]:
        return dict.fromkeys(("resize", "crop", "crop_rounding", "filter", "antialias"), UNKNOWN)
    fitted = width / x.step, height / y.step  # size between resize and crop
    short, same_scale = round(min(fitted)), abs(x.step / y.step - 1) < 0.02
    resized = "none" if abs(x.step - 1) < 0.01 and same_scale else ""
    resized = resized or (f"shortest side to {short}" if same_scale else f"squash to {short}x{short}")
    return {
        "resize": resized,
        "crop": _crop((x, y), fitted, out),
        "crop_rounding": _rounding(unit, short, out) if same_scale and resized != "none" else "-",
        **_filter(unit, goal, short, out, resized),
    }


@lru_cache(8)
def _ramp(width: int, height: int) -> np.ndarray[Any, Any]:
    row = np.round(np.arange(width) * (255 / (width - 1)))
    return np.repeat(row[None], height, 0)


def _axis(profile: Tensor, length: int) -> _Axis:
    """A straight line through what the output saw of a ramp; its ends are left out, because filters bend them."""
    n = len(profile)
    kept = torch.arange(n, dtype=torch.float64)[n // 8 : n - n // 8]
    source = profile.double()[n // 8 : n - n // 8] * (length - 1) + 0.5
    centred = kept - kept.mean()
    step = float((centred * source).sum() / centred.square().sum())
    first = float(source.mean()) - step * float(kept.mean())
    residual = float((first + step * kept - source).abs().max())
    return _Axis(step, first - step / 2, step > 0 and residual < 0.02 * length)


def _crop(axes: tuple[_Axis, _Axis], fitted: tuple[float, float], out: int) -> str:
    margins = [side - out for side in fitted]
    if max(margins) < 0.6:
        return "none"
    for axis, margin in zip(axes, margins, strict=True):
        if abs(axis.start / axis.step - margin / 2) > 1:
            return f"off centre {out}x{out}"
    return f"centre {out}x{out}"


def _rounding(unit: _Unit, short: int, out: int) -> str:
    """Where the crop lies if the margin is odd: transformers rounds down, torchvision up at 3, 7, 11 ..."""
    width = out + 3
    while width < short + 3 or (width - out) % 4 != 3:
        width += 1
    noise = _noise(width, short)
    seen, top = unit(noise), (short - out) // 2
    for name, left in (("down", (width - out) // 2), ("up", (width - out) // 2 + 1)):
        for row in (top, top + 1):
            expected = torch.from_numpy(noise[row : row + out, left : left + out] / 255)
            if expected.shape == seen.shape and (seen - expected).abs().mean() < _CLOSE:
                return name
    return UNKNOWN


def _filter(unit: _Unit, goal: int, short: int, out: int, resized: str) -> dict[str, str]:
    if resized == "none":
        return {"filter": "-", "antialias": "-"}
    side = 2 * goal + goal // 3 + 1
    seen = unit(_noise(side, side))
    errors: dict[tuple[str, str], float] = {}
    for top in {(short - out) // 2, (short - out + 1) // 2}:
        for name, resampled in _references(side, short):
            expected = resampled[top : top + out, top : top + out]
            if expected.shape == seen.shape:
                error = float((seen - expected).abs().mean())
                errors[name] = min(error, errors.get(name, 1.0))
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or errors[best] > _CLOSE:
        return {"filter": UNKNOWN, "antialias": UNKNOWN}
    return {"filter": best[0], "antialias": best[1]}


@lru_cache(4)
def _noise(width: int, height: int) -> np.ndarray[Any, Any]:
    """Every pixel its own grey value, by integers alone, so that it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint64)
    mixed = (x * np.uint64(374761393) + y * np.uint64(668265263)) & np.uint64(0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> np.uint64(13))) * np.uint64(1274126177)) & np.uint64(0xFFFFFFFF)
    grey: np.ndarray[Any, Any] = ((mixed ^ (mixed >> np.uint64(16))) & np.uint64(255)).astype(np.uint8)
    return grey


@lru_cache(4)
def _reference_list(side: int, short: int) -> list[tuple[tuple[str, str], Tensor]]:
    image = Image.fromarray(_noise(side, side))
    references = [
        ((name, "on"), torch.from_numpy(np.asarray(image.resize((short, short), kernel)) / 255.0))
        for name, kernel in _SMOOTH.items()
    ]
    nearest = np.asarray(image.resize((short, short), Image.Resampling.NEAREST)) / 255.0
    references.append((("nearest", "off"), torch.from_numpy(nearest)))
    pixels = torch.from_numpy(np.asarray(image) / 255.0)[None, None]
    for name in ("bilinear", "bicubic"):
        sampled = F.interpolate(pixels, (short, short), mode=name, align_corners=False)[0, 0].clamp(0, 1)
        references.append(((name, "off"), sampled))
    return references


def _references(side: int, short: int) -> Iterator[tuple[tuple[str, str], Tensor]]:
    yield from _reference_list(side, short)


def readable(facts: Mapping[str, Any]) -> str:
    """One line: `bicubic, antialias on; shortest side to 224, centre 224x224; mean ..., std ...`."""
    resize = f"{facts['resize']} ({facts['filter']}, antialias {facts['antialias']})"
    crop = "no crop" if facts["crop"] == "none" else f"crop {facts['crop']}"
    return f"{facts['channels']}, {resize}, {crop}, mean {facts['mean']}, std {facts['std']}"
