"""From what a tower gives for each patch or token to one vector."""

from __future__ import annotations

from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.models.backends.families import settle_end_of_text
from clipkit.models.processor import ImageSide, TransformersTexts

Pooling = Literal["auto", "cls", "mean", "last", "eos", "pooler"]


def pool_image(output: Any, pooling: str) -> Tensor:
    """(n, width) from a vision tower's output: `pooler`, `cls` or `mean`."""
    if pooling == "pooler":
        return _pooler_output(output).flatten(1)  # convolutional towers of transformers pool to (n, width, 1, 1)
    hidden: Tensor = output.last_hidden_state
    if hidden.ndim == 4:  # (n, width, height, width) of a convolutional tower
        hidden = hidden.flatten(2).transpose(1, 2)
    return hidden[:, 0] if pooling == "cls" else hidden.mean(1)


def pool_text(output: Any, pooling: str, input_ids: Tensor, mask: Tensor | None, eos: int | None) -> Tensor:
    """(n, width) from a text tower's output: `pooler`, `cls`, `mean` over the mask, `last` token, first `eos`."""
    if pooling == "pooler":
        return _pooler_output(output)
    hidden: Tensor = output.last_hidden_state  # (n, length, width)
    mask = torch.ones_like(input_ids) if mask is None else mask
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    # positions * mask: the last real token, also where the tokenizer pads on the left
    at = (positions * mask).argmax(1) if pooling == "last" else torch.eq(input_ids, eos or 0).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def _pooler_output(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise ModelError("the tower gives no pooler_output", fix="choose another pooling, for example 'mean'")
    return torch.as_tensor(pooled)


def choose_image_pooling(tower: nn.Module, output: Any) -> str:
    """The pooling that this vision tower was made for."""
    if getattr(output, "pooler_output", None) is not None and not _has_tanh_pooler(tower):
        return "pooler"
    hidden = output.last_hidden_state
    has_cls = any(name.endswith("cls_token") for name, _ in tower.named_parameters())
    return "cls" if hidden.ndim == 3 and has_cls else "mean"


def choose_text_pooling(tower: nn.Module, output: Any, *, causal: bool) -> str:
    """The pooling that this text tower was made for, and the mean over the mask where it has none."""
    if getattr(output, "pooler_output", None) is not None and not _has_tanh_pooler(tower):
        return "pooler"
    return "last" if causal else "mean"


def _has_tanh_pooler(tower: nn.Module) -> bool:
    # BERT's and ViT's pooler (dense, tanh) served a pretraining task and is often missing from checkpoints.
    pooler = getattr(tower, "pooler", None)
    return pooler is not None and any(isinstance(module, nn.Tanh) for module in pooler.modules())


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
