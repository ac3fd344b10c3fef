"""Opens two towers and joins them: from names, from a folder that clipkit saved, from a VisionTextDualEncoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.backends.families import positions_of
from clipkit.models.backends.pooling import Pooling, probe_image, probe_text
from clipkit.models.backends.towers import LN_1_OVER_007, Head, Joint, TowersBackend
from clipkit.models.image_transform import Resize
from clipkit.models.loading.hub import find_folder
from clipkit.models.loading.transformers import (
    image_side_for,
    open_tokenizer,
    open_tower,
    saved_transform,
    trained_pooling,
)
from clipkit.models.loading.weights import check_folder, load_exactly
from clipkit.models.processor import Processor, TransformersTexts


def join_towers(
    vision: Any,
    text: Any,
    tokenizer: Any = None,
    *,
    dim: int = 512,
    image_size: int | None = None,
    image_processor: Any = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    channels: int | None = None,
    resize: Resize | None = None,
    head: Head = "linear",
    image_pooling: Pooling = "auto",
    text_pooling: Pooling = "auto",
    context_length: int | None = None,
    logit_scale: float = LN_1_OVER_007,
    logit_bias: float | None = None,
    trust_remote_code: bool = False,
) -> tuple[TowersBackend, Processor]:
    """The parts of `DualEncoder.from_towers`, which documents the arguments."""
    if tokenizer is None and not isinstance(text, str | Path):
        raise ModelError("a text tower given as a model needs tokenizer= beside it")
    tokenizer = open_tokenizer(text if tokenizer is None else tokenizer, trust_remote_code)
    folder = find_folder(vision) if isinstance(vision, str | Path) else None
    vision = open_tower(vision, "image", image_pooling, trust_remote_code)
    image_side = image_side_for(
        vision,
        folder,
        image_processor,
        image_size=image_size,
        mean=image_mean,
        std=image_std,
        channels=channels,
        resize=resize,
        trust_remote_code=trust_remote_code,
    )
    text_pooling = trained_pooling(text, text_pooling)
    text = open_tower(text, "text", text_pooling, trust_remote_code)
    siglip = str(text.config.model_type).startswith("siglip")  # pools the last position, trained on full padding
    length = _context_length(context_length, text, tokenizer)
    text_side = TransformersTexts(tokenizer, length, padding="max_length" if siglip else "longest", mask=not siglip)
    _check_vocabulary(text, tokenizer)
    image_by, image_width = probe_image(vision, image_side, image_pooling)
    text_by, text_width = probe_text(text, text_side, text_pooling)
    joint = Joint(dim, head, image_by, text_by, length, text_side.padding, text_side.mask, tokenizer.eos_token_id)
    backend = TowersBackend(vision, text, joint, (image_width, text_width), logit_scale, logit_bias)
    return backend, Processor(image_side, text_side)


def open_towers(
    folder: Path, settings: dict[str, Any], trust_remote_code: bool = False
) -> tuple[TowersBackend, Processor]:
    """What `TowersBackend.save` wrote, with the settings that clipkit.json keeps."""
    classes = settings["classes"]
    joint = Joint.from_settings(settings)
    vision = open_tower(folder / "vision", "image", joint.image_pooling, trust_remote_code, classes["vision"])
    text = open_tower(folder / "text", "text", joint.text_pooling, trust_remote_code, classes["text"])
    weights = load_file(folder / "heads.safetensors")
    first = {
        side: weights.get(f"{side}_head.weight", weights.get(f"{side}_head.0.weight")) for side in ("image", "text")
    }
    if first["image"] is None or first["text"] is None or "logit_scale" not in weights:
        raise CorruptArtefact("heads.safetensors lacks a head or the logit scale", where=folder)
    widths = (first["image"].shape[1], first["text"].shape[1])
    bias = float(weights["logit_bias"]) if "logit_bias" in weights else None
    backend = TowersBackend(vision, text, joint, widths, 0.0, bias)
    missing = backend.load_state_dict(weights, strict=False)
    lost = [name for name in missing.missing_keys if not name.startswith(("vision.", "text."))]
    if lost or missing.unexpected_keys:
        raise CorruptArtefact(f"heads.safetensors does not fit: {lost + missing.unexpected_keys}", where=folder)
    text_side = TransformersTexts(
        open_tokenizer(folder, trust_remote_code),
        joint.context_length,
        padding=joint.padding,
        mask=joint.attention_mask,
    )
    image_side = saved_transform(folder, trust_remote_code)
    if image_side is None:
        raise CorruptArtefact("preprocessor_config.json is missing", where=folder)
    probe_image(vision, image_side, joint.image_pooling)
    probe_text(text, text_side, joint.text_pooling)
    return backend, Processor(image_side, text_side)


def _context_length(asked: int | None, text: nn.Module, tokenizer: Any) -> int:
    longest = min(positions_of(text, tokenizer.pad_token_id), int(tokenizer.model_max_length))
    if asked is not None and asked > longest:
        fix = f"context_length={longest} or less"
        raise ModelError(f"context_length={asked}, but the text tower or its tokenizer ends at {longest}", fix=fix)
    return min(asked or 77, longest)


def _check_vocabulary(text: Any, tokenizer: Any) -> None:
    highest, known = max(tokenizer.get_vocab().values()), text.config.vocab_size
    if highest >= known:
        fix = f"vocab_size={highest + 1} in the tower's config, or the tokenizer that belongs to the tower"
        raise ModelError(f"the tokenizer gives ids up to {highest}, the text tower knows {known} tokens", fix=fix)


def open_vtde(
    folder: Path, settings: dict[str, Any] | None, trust_remote_code: bool = False
) -> tuple[TowersBackend, Processor]:
    """Split a folder of this class into two towers and their heads.

    Args:
        settings: what clipkit.json keeps (`TowersBackend.settings`); None if transformers wrote the folder.
    """
    check_folder(folder, trust_remote_code=trust_remote_code)
    model, _ = load_exactly(AutoModel.from_pretrained, folder, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(folder, trust_remote_code)
    image_side = saved_transform(folder, trust_remote_code)
    if image_side is None:
        raise CorruptArtefact("preprocessor_config.json is missing, so the transform is unknown", where=folder)
    joint = Joint.from_settings(settings) if settings else _native_joint(model, tokenizer)
    vision, text = model.vision_model, model.text_model
    backend = TowersBackend(vision, text, joint, (model.vision_embed_dim, model.text_embed_dim), 0.0, None)
    for ours, theirs in (("image_head", "visual_projection"), ("text_head", "text_projection")):
        setattr(backend, ours, getattr(model, theirs))
    backend.logit_scale = model.logit_scale
    text_side = TransformersTexts(tokenizer, joint.context_length, padding=joint.padding, mask=joint.attention_mask)
    probe_image(vision, image_side, joint.image_pooling)
    probe_text(text, text_side, joint.text_pooling)
    return backend, Processor(image_side, text_side)


def _native_joint(model: Any, tokenizer: Any) -> Joint:
    cut = tokenizer.init_kwargs.get("max_length") or tokenizer.model_max_length  # where AutoProcessor cuts
    longest = min(positions_of(model.text_model, tokenizer.pad_token_id), int(cut))
    if longest >= 10**9:
        fix = "set model_max_length in tokenizer_config.json"
        raise ModelError("neither the text tower nor the tokenizer says how long a text may be", fix=fix)
    mask = "attention_mask" in tokenizer.model_input_names
    return Joint(
        int(model.projection_dim), "linear", "pooler", "pooler", longest, "longest", mask, tokenizer.eos_token_id
    )
