"""Resizing models of open_clip."""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from clipkit.errors import ModelError
from clipkit.models.adapting.positions import Change, cannot, resample_grid, resample_line, set_parameter, takes
from clipkit.models.backend import Backend
from clipkit.models.backends.open_clip_processor import OpenClipImages, OpenClipTexts
from clipkit.models.processor import Processor


def image(backend: Backend, processor: Processor, goal: int) -> Change:
    """The change to images of `goal` pixels."""
    visual: Any = backend.get_submodule("model.visual")
    side = _image_side(processor.image_side, goal)
    if hasattr(visual, "positional_embedding"):  # open_clip's own transformer
        name, before, after = "positional_embedding", visual.grid_size[0], goal // visual.patch_size[0]
    elif hasattr(getattr(visual, "attnpool", None), "positional_embedding"):  # its ResNet
        name, before, after = "attnpool.positional_embedding", processor.image_size // 32, goal // 32
    elif takes(backend, side):
        name, before, after = "", 0, 1
    else:
        why = "open_clip builds towers of timm for one size, so a saved model could not be opened again"
        raise cannot("image", visual, why, "resize the tower in transformers, with from_towers")
    if after < 1:
        raise cannot("image", visual, f"{goal} pixels are less than one patch")
    if hasattr(visual, "grid_size") and len(set(visual.grid_size)) > 1:
        raise cannot("image", visual, "its images are not square")

    def apply() -> None:
        if name:
            table = visual.get_parameter(name)
            set_parameter(visual, name, resample_grid(table, len(table) - before**2, before, after))
        if hasattr(visual, "grid_size"):
            visual.grid_size = (after, after)
        visual.image_size = goal if isinstance(visual.image_size, int) else (goal, goal)
        visual.preprocess_cfg = {**visual.preprocess_cfg, "size": side.settings["size"]}

    return Change(side, apply)


def _image_side(side: Any, goal: int) -> OpenClipImages:
    settings = dict(side.settings)
    if str(side.preprocess) != str(image_transform_v2(PreprocessCfg(**settings), is_train=False)):
        raise ModelError("the image transform is not the one that open_clip builds for this model")
    settings["size"] = goal if isinstance(settings["size"], int) else (goal, goal)
    return OpenClipImages(image_transform_v2(PreprocessCfg(**settings), is_train=False), settings)


def text(backend: Backend, processor: Processor, goal: int) -> Change:
    """The change to texts of `goal` tokens."""
    model: Any = backend.get_submodule("model")
    tower = model if hasattr(model, "positional_embedding") else model.text
    tokenizer = copy.copy(processor.text_side.tokenizer)  # type: ignore[attr-defined]
    tokenizer.context_length = goal
    side = OpenClipTexts(tokenizer)
    if getattr(tower, "cls_emb", None) is not None:
        raise cannot("text", tower, "CoCa's caption decoder has positions of its own")
    if not hasattr(tower, "positional_embedding"):
        _check_hf(tower, goal)
        return Change(side, lambda: None)

    def apply() -> None:
        set_parameter(tower, "positional_embedding", resample_line(tower.positional_embedding, 0, goal))
        if tower.attn_mask is not None:
            hidden = torch.full((goal, goal), float("-inf")).triu_(1)
            tower.attn_mask = hidden.to(tower.attn_mask.device, tower.attn_mask.dtype)
        tower.context_length = model.context_length = goal
        if hasattr(tower, "num_pos"):
            tower.num_pos = goal

    return Change(side, apply)


def _check_hf(tower: Any, goal: int) -> None:
    longest = getattr(tower.transformer.config, "max_position_embeddings", None)
    if longest is not None and goal > longest:
        why = f"open_clip builds this tower from a config on the hub, which ends at {longest}"
        raise cannot("text", tower, why, f"context_length={longest} or less")
