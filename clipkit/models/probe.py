"""Learning about a tower by running it once: its pooling, its width, what of it the pooling reads."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.models.families import settle_end_of_text
from clipkit.models.pooling import choose_image_pooling, choose_text_pooling, pool_image, pool_text
from clipkit.models.processor import ImageSide, TransformersTexts


def probe_image(tower: Any, image_side: ImageSide, pooling: str) -> tuple[str, int]:
    """The pooling in place of "auto", and the width of what comes out; freezes what the pooling never reads."""
    output = tower.eval()(pixel_values=image_side([Image.new("RGB", (8, 8))]).to(tower.device, tower.dtype))
    pooling = choose_image_pooling(tower, output) if pooling == "auto" else pooling
    pooled = pool_image(output, pooling)
    _freeze_unread(tower, pooled)
    return pooling, pooled.shape[1]


def probe_text(tower: Any, text_side: TransformersTexts, pooling: str) -> tuple[str, int]:
    inputs = {name: value.to(tower.device) for name, value in text_side(["a text", "another, longer text"]).items()}
    output, ids = tower.eval()(**inputs), inputs["input_ids"]
    if pooling == "auto":
        pooling = choose_text_pooling(tower, output, causal=_is_causal(tower, ids))
    _check_eos(tower, text_side, pooling)
    eos = text_side.tokenizer.eos_token_id
    pooled = pool_text(output, pooling, ids, inputs.get("attention_mask"), eos)
    _freeze_unread(tower, pooled)
    return pooling, pooled.shape[1]


def _freeze_unread(tower: nn.Module, pooled: Tensor) -> None:
    # BERT's pooler under mean pooling, say: it would get no gradient, and DDP refuses such parameters.
    trained = [p for p in tower.parameters() if p.requires_grad]
    if trained:
        gradients = torch.autograd.grad(pooled.float().sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


@torch.no_grad()
def _is_causal(tower: Any, input_ids: Tensor) -> bool:
    """Whether the first position is blind to a change of the last one."""
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % tower.config.vocab_size
    first = [tower(input_ids=ids).last_hidden_state[:, 0] for ids in (input_ids, changed)]
    return torch.equal(*first)


def _check_eos(tower: Any, text_side: TransformersTexts, pooling: str) -> None:
    if pooling == "eos" and not text_side.ends_texts:
        fix = "a tokenizer that adds its end-of-text token (add_eos_token=True), or text_pooling='last'"
        raise ModelError("pooling 'eos' needs a tokenizer that ends each text with an end-of-text token", fix=fix)
    if pooling == "pooler" and str(tower.config.model_type).startswith(("clip", "metaclip")):
        settle_end_of_text(tower, text_side.tokenizer)
