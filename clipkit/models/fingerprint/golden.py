"""Golden embeddings: what a model gives for four built-in images and texts, in fp32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.modality import Modality
from clipkit.models.backend import Backend
from clipkit.models.encode import encode, image_chunks, text_chunks
from clipkit.models.processor import Processor
from clipkit.models.threads import one_thread

GOLDEN_TEXTS = (
    "a photo of a cat",
    "Two DOGS, running on a Beach!",
    "latin small letter e with acute",
    "one sentence that goes on and on, " * 20 + "and ends",  # 180 tokens: longer than the usual 64 and 77
)


def golden_images() -> list[Image.Image]:
    """Return four images drawn with integers alone, of odd sides and high frequency, wide and tall, small and large.

    Stripes, a disc on a ramp, noise, and noise larger than any model's input, where antialias and filter show.
    """
    return [image.copy() for image in _drawn()]


@cache
def _drawn() -> tuple[Image.Image, ...]:
    images = []
    for index, (width, height) in enumerate(((97, 61), (53, 89), (301, 223), (1021, 767))):
        y, x = np.mgrid[0:height, 0:width]
        noise = (x * 7919 + y * 104729 + x * y * 31 + (x * x + 3 * y * y) // 7) % 256
        blue = (noise * 101 + y) % 256
        if index == 0:
            red = (x // 5 % 2) * 255
            green = (y // 7 % 2) * 255
        elif index == 1:
            red = x * 255 // width
            green = y * 255 // height
            blue = ((x - width // 2) ** 2 + (y - height // 2) ** 2 < 400) * 255
        else:
            red = noise
            green = (noise * 37 + x) % 256
        images.append(Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)))
    return tuple(images)


GoldenEmbeddings = dict[Modality, Tensor]
FEW: dict[Modality, tuple[int, ...]] = {"image": (3,), "text": (0, 1, 3)}
"""Rows that show most: the image in which filter and crop show; texts that are short, with capitals, and cut."""


def golden_embeddings(
    backend: Backend, processor: Processor, rows: Mapping[Modality, Sequence[int]] | None = None
) -> GoldenEmbeddings:
    """Return the embeddings of the built-in images and texts, or of `rows` of them such as `FEW`; fp32, on the CPU."""
    plain = as_fp32_cpu(backend)
    images, texts = golden_images(), list(GOLDEN_TEXTS)
    if rows is not None:
        images = [images[row] for row in rows["image"]]
        texts = [texts[row] for row in rows["text"]]
    pixels = image_chunks(images, processor, len(images), 0)
    tokens = text_chunks(texts, processor, len(texts))
    with one_thread():
        return {
            "image": encode(plain, pixels, "image", images, dtype=torch.float32),
            "text": encode(plain, tokens, "text", texts, dtype=torch.float32),
        }


def as_fp32_cpu(backend: Backend) -> Backend:
    """Return the backend in fp32 on the CPU: itself if it is there already, else a copy."""
    if backend.device.type == "cpu" and backend.dtype is torch.float32:
        return backend
    return copy.deepcopy(backend).cpu().float()
