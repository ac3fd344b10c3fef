"""Image size and context length of a processor, compared with what its towers were built for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clipkit.models.checks.finding import Finding, why

if TYPE_CHECKING:
    from clipkit.models.backend import Backend
    from clipkit.models.dual_encoder import DualEncoder

PREPROCESSING = "preprocessor_config.json (processor_config.json, open_clip_config.json)"


def size_findings(model: DualEncoder, family: str) -> Iterator[Finding]:
    given = model.processor.image_size
    expected = tower_size(model.backend)
    if expected is not None and given != expected:
        what = f"image size: the processor gives {given} pixels, the image tower takes {expected}"
        yield Finding(
            "error",
            "image size",
            what,
            "the tower refuses such images or reads its positions wrongly",
            f"size {expected} in {PREPROCESSING}",
        )
    length = model.processor.context_length
    positions = text_positions(model.backend)
    if positions is not None and length > positions:
        what = f"context length: texts of up to {length} tokens, but the text tower has {positions} positions"
        yield Finding(
            "error",
            "context length",
            what,
            "long texts fail or are read wrongly",
            f"model_max_length {positions} in tokenizer_config.json",
        )
    elif positions is not None and length != positions and family == "siglip":
        what = f"context length: {length} tokens, but the text tower has {positions} positions and reads the last one"
        yield Finding(
            "error", "context length", what, why("padding"), f"model_max_length {positions} in tokenizer_config.json"
        )


def tower_size(backend: Backend) -> int | None:
    """Pixels that the image tower was built for, if it says so."""
    model: Any = getattr(backend, "model", None)
    visual = getattr(model, "visual", None)
    config = getattr(getattr(model, "config", None), "vision_config", None) or getattr(
        getattr(backend, "vision", None), "config", None
    )
    positions = any(
        "position" in name and p.ndim > 1 for name, p in backend.named_parameters() if backend.belongs_to("image", name)
    )
    size = getattr(visual, "image_size", None) if visual is not None else getattr(config, "image_size", None)
    size = max(size) if isinstance(size, tuple | list) else size
    return size if isinstance(size, int) and positions else None


def text_positions(backend: Backend) -> int | None:
    """How many tokens the text tower has positions for, if it says so."""
    model: Any = getattr(backend, "model", None)
    if getattr(model, "context_length", None) is not None:
        return int(model.context_length)
    config = getattr(getattr(model, "config", None), "text_config", None)
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and positions > 0 else None
