"""Joined towers as a VisionTextDualEncoder of transformers, wherever that class can hold them.

It projects `output[1]` of both towers by bias-free layers and has no logit bias. Whether a model is more than
that is tested, not listed: the files are opened by transformers alone and have to give the same embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from clipkit.models.backends.quiet import quiet
from clipkit.models.backends.towers import TowersBackend
from clipkit.models.fingerprint.golden import FEW, GOLDEN_TEXTS, GoldenEmbeddings, golden_images
from clipkit.models.processor import Processor, TransformersTexts

FORM = "vision-text-dual-encoder"
TOLERANCE = 1e-5  # of pixels and of embeddings


# What transformers raises for a tower that it cannot put into this class, or not run there.
_REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, ImportError)


def attempt(backend: TowersBackend, processor: Processor, folder: Path, golden: GoldenEmbeddings) -> str | None:
    """Write into `folder` and try it end to end.

    Returns:
        None if transformers alone gives `golden` to 1e-5 from what was written, else the reason why not.
    """
    reason = _inexpressible(backend)
    if reason is not None:
        return reason
    try:
        write(backend, processor, folder)
        with quiet():
            return _difference(folder, processor, golden)
    except _REFUSALS as error:
        return f"transformers refuses these towers: {(str(error).strip() or repr(error)).splitlines()[0]}"


def _inexpressible(backend: TowersBackend) -> str | None:
    joint = backend.joint
    if joint.head != "linear":
        return "that class has no MLP heads"
    if backend.logit_bias is not None:
        return "that class has no logit bias"
    pooled_otherwise = {"image": joint.image_pooling, "text": joint.text_pooling}
    for side, pooling in pooled_otherwise.items():
        if pooling != "pooler":
            return f"that class reads a tower's pooler_output, and the {side} pooling is {pooling!r}"
    return None


def write(backend: TowersBackend, processor: Processor, folder: Path) -> None:
    """Write the model's, the tokenizer's and the image processor's files into `folder`."""
    vision, text = copy.deepcopy(backend.vision.config), copy.deepcopy(backend.text.config)
    for config, head in ((vision, backend.image_head), (text, backend.text_head)):
        if getattr(config, "hidden_size", None) is None:
            config.hidden_size = head.in_features  # timm's wrapper has none, and VisionTextDualEncoder asks for it
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=backend.dim)
    with torch.device("meta"):
        shell = VisionTextDualEncoderModel(config)
    shell.load_state_dict(_renamed(backend), assign=True)  # the very tensors, no copies
    with quiet():
        shell.save_pretrained(folder)
    assert isinstance(processor.text_side, TransformersTexts)  # towers have no other
    tokenizer = copy.deepcopy(processor.text_side.tokenizer)
    tokenizer.model_max_length = processor.context_length  # where `truncation=True` cuts
    tokenizer.init_kwargs.pop("max_length", None)
    if tokenizer.is_fast:  # or the last call's length would be saved, and AutoProcessor cut there
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    processor.image_side.save(folder)


def _renamed(backend: TowersBackend) -> dict[str, Tensor]:
    ours = {"vision": "vision_model", "text": "text_model", "image_head": "visual_projection"}
    theirs = ours | {"text_head": "text_projection"}
    renamed = {}
    for name, tensor in backend.state_dict().items():
        part, _, rest = name.partition(".")
        renamed[f"{theirs[part]}.{rest}" if rest else part] = tensor
    return renamed


def _difference(folder: Path, processor: Processor, golden: GoldenEmbeddings) -> str | None:
    """Return how transformers' own pipeline differs from ours, in words; None if it does not."""
    native = AutoProcessor.from_pretrained(folder, local_files_only=True)
    images = golden_images()
    several = [*images, *_odd_sizes(images[-1], processor.image_size)]
    pixels = native.image_processor(images=several, return_tensors="pt")["pixel_values"]
    worst = float((pixels - processor.images(several)).abs().max())
    if not worst <= TOLERANCE:
        return f"{type(native.image_processor).__name__} of transformers gives other pixels (by up to {worst:.2g})"
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    few = [images[row] for row in FEW["image"]], [GOLDEN_TEXTS[row] for row in FEW["text"]]
    embeddings = embed(model, native, *few, processor)
    for side, vectors in embeddings.items():
        worst = float((vectors - golden[side]).abs().max())
        if not worst <= TOLERANCE:
            return f"transformers gives other {side} embeddings (by up to {worst:.2g})"
    return None


def _odd_sizes(image: Image.Image, size: int) -> list[Image.Image]:
    # A centre crop of an odd remainder is rounded up by some, down by others.
    return [image.resize((2 * size + more, 2 * size)) for more in (2, 4, 6, 8)]


@torch.no_grad()
def embed(
    model: Any, native: Any, images: Sequence[Image.Image], texts: Sequence[str], processor: Processor
) -> GoldenEmbeddings:
    """Return the embeddings that the documented calls of transformers give."""
    side = processor.text_side
    assert isinstance(side, TransformersTexts)
    inputs = native(
        images=list(images),
        text=list(texts),
        padding=side.padding,
        truncation=True,
        max_length=side.context_length,
        return_tensors="pt",
    )
    output = model(**inputs)
    return {"image": F.normalize(output.image_embeds, dim=-1), "text": F.normalize(output.text_embeds, dim=-1)}
