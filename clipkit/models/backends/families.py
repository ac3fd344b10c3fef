"""The dual encoders of transformers that are known here, and the few facts in which they differ.

None of these facts stands in a model's files, and a wrong one gives wrong embeddings without any error.
A model of another kind is therefore refused.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from transformers import (
    GemmaTokenizer,
    Siglip2Tokenizer,
)

from clipkit.errors import ModelError
from clipkit.models.processor import Padding


@dataclass(frozen=True)
class Family:
    """One kind of dual encoder; CLIP itself by default."""

    image_projection: bool = True  # a module of its own, so that a locked tower's features can be cached before it
    text_projection: bool = True
    temperature: bool = False  # divides the logits, in place of exp(logit_scale)
    image_pooling: str = "cls"
    text_pooling: str = "eos"
    padding: Padding = "longest"
    mask: bool = True  # whether the text tower is given the attention mask
    context_length: int | None = None  # of training, where neither the config nor the tokenizer says it
    unread: tuple[str, ...] = ()  # modules whose output reaches no embedding: they would get no gradient


FAMILIES = {
    "clip": Family(),
    "metaclip_2": Family(),
    "altclip": Family(text_pooling="cls"),
    "chinese_clip": Family(text_pooling="cls"),
    # Reads the last position of a text padded to full length, and was trained without a mask.
    "siglip": Family(
        image_projection=False,
        text_projection=False,
        image_pooling="attention",
        text_pooling="last",
        padding="max_length",
        mask=False,
    ),
    "align": Family(
        image_projection=False,
        temperature=True,
        image_pooling="mean",
        text_pooling="cls",
        padding="max_length",
        context_length=64,
        unread=("text_model.pooler",),
    ),
}


def family_of(model_type: str, model: Any) -> Family:
    """What is known of a kind of model; `model` is one, or its class, for the message if nothing is.

    Raises:
        ModelError: not a dual encoder, or one whose text treatment is not known here.
    """
    if model_type == "siglip2":
        message = "SigLIP 2 NaFlex takes images of any shape as lists of patches, which is not supported"
        raise ModelError(message, fix="a SigLIP 2 of fixed resolution, e.g. google/siglip2-base-patch16-224")
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    towers = "join it with another tower: DualEncoder.from_towers(vision, text, tokenizer)"
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ModelError(f"{name} is not a dual encoder: it does not embed both images and texts", fix=towers)
    known = ", ".join(sorted(FAMILIES))
    message = f"{name} ({model_type}) is none of the dual encoders known here: {known}"
    raise ModelError(message, fix="its towers can be joined anew: DualEncoder.from_towers(vision, text, tokenizer)")


def as_trained(model_type: str, tokenizer: Any) -> Any:
    """The tokenizer in the case that its model was trained with.

    SigLIP 2 saw lower-cased texts (Tschannen et al. 2025, section 2.1). The checkpoints of fixed
    resolution bring Gemma's tokenizer, which keeps the case: transformers corrects it for NaFlex alone.
    """
    if model_type != "siglip" or not isinstance(tokenizer, GemmaTokenizer):
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return Siglip2Tokenizer.from_pretrained(folder, local_files_only=True)


def settle_end_of_text(text_tower: Any, tokenizer: Any) -> None:
    """Let a tower that pools at the end of a text pool at the tokenizer's token, wherever its id stands.

    Old configs of CLIP say 2, and transformers then pools at the highest id of a text: right until a
    token is added above the end of text. With the true id written into model and config, both are right.

    Raises:
        ModelError: the config names another token; it would not be found, and position 0 be pooled.
    """
    end = tokenizer.eos_token_id
    expected = getattr(text_tower.config, "eos_token_id", None)
    if end is not None and expected == end:
        return
    if end is None or expected != _HIGHEST_ID or text_tower.config.model_type.startswith("metaclip"):
        message = f"the text tower pools at token {expected}, the tokenizer ends texts with {end}"
        raise ModelError(message, topic="pooling", fix="set eos_token_id in the text config to the tokenizer's")
    text_tower.eos_token_id = text_tower.config.eos_token_id = end


_HIGHEST_ID = 2  # what transformers' CLIP takes for "the highest id", whatever token 2 may be
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj")


def positions_of(text: Any, pad_token_id: int | None) -> int:
    """How many tokens a text tower has positions for. RoBERTa counts them from the padding's id upwards."""
    positions = int(getattr(text.config, "max_position_embeddings", None) or 10**9)
    for name, module in text.named_modules():
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and offset is not None:
            if offset != pad_token_id:
                message = f"the text tower takes {offset} for padding, the tokenizer pads with {pad_token_id}"
                raise ModelError(message, fix="set pad_token_id in the tower's config to the tokenizer's")
            return int(positions - offset - 1)
    return positions


def activation_of(config: Any) -> str | None:
    """The activation that a config names; of a timm model, the architecture that decides it."""
    for key in (*_ACTIVATIONS, "architecture"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            return value
    return None
