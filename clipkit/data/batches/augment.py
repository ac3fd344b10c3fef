"""Training augmentation by name: an image and a number in, an image out.

Evaluation never passes through here; the processor's own transform follows in both cases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Literal

from PIL import Image, ImageEnhance, ImageFilter

Augmentation = Literal["none", "crop", "crop+flip", "affine", "simclr"]
Augment = Callable[[Image.Image, random.Random], Image.Image]


def augment(image: Image.Image, name: Augmentation, seed: int) -> Image.Image:
    """Change an image at random, the same way for the same seed.

    Args:
        image: any PIL image.
        name: ``none``; ``crop``: 90-100 % of the area at an aspect within 3:4 and 4:3 of its own
            (open_clip's default for training); ``crop+flip``: also mirrored half of the time, wrong
            where captions say left or right; ``affine``: scaled by up to 8 %, turned and sheared by up
            to 3 degrees and moved by up to 4 % (2.5 % upwards), for drawings on a plain ground; ``simclr``:
            20-100 % of the area, mirrored, other colours, sometimes grey or blurred (Chen et al. 2020, appendix A,
            with a milder crop), for `Views`.
        seed: of this sample in this epoch.
    """
    return image if name == "none" else _BY_NAME[name](image, random.Random(seed))


def crop(image: Image.Image, rng: random.Random, smallest: float = 0.9) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1.0)
        aspect = width / height * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return image.crop((left, top, left + w, top + h))
    return image


def crop_flip(image: Image.Image, rng: random.Random, smallest: float = 0.9) -> Image.Image:
    cropped = crop(image, rng, smallest)
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cropped


def affine(image: Image.Image, rng: random.Random) -> Image.Image:
    width, height = image.size
    scale, turn, shear = 1 + rng.uniform(-0.08, 0.08), rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)
    dx, dy = rng.uniform(-0.04, 0.04) * width, rng.uniform(-0.025, 0.025) * height
    # output (x, y) -> input (a x + b y + c, d x + e y + f), around the centre
    a, b, d, e = scale * math.cos(turn), shear - math.sin(turn), math.sin(turn), scale * math.cos(turn)
    c = width / 2 - a * width / 2 - b * height / 2 + dx
    f = height / 2 - d * width / 2 - e * height / 2 + dy
    ground = image.getpixel((0, 0))
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=ground if isinstance(ground, tuple) else int(ground or 0),
    )


def simclr(image: Image.Image, rng: random.Random) -> Image.Image:
    view = crop_flip(image.convert("RGB"), rng, smallest=0.2)
    if rng.random() < 0.8:
        changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        rng.shuffle(changes)
        for change in changes:
            view = change(view).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if rng.random() < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(view.size) / 224))
    return view


_BY_NAME: dict[str, Augment] = {"crop": crop, "crop+flip": crop_flip, "affine": affine, "simclr": simclr}
