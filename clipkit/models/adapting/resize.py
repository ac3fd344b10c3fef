"""Other image sizes and context lengths for a model that exists: positions are interpolated, once and for good."""

from __future__ import annotations

from dataclasses import replace

from clipkit.errors import UsageError
from clipkit.models.adapting import resize_open_clip, resize_transformers
from clipkit.models.backend import Backend
from clipkit.models.processor import Processor


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
    native = resize_open_clip if backend.family == "open_clip" else resize_transformers
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
