"""CLIP, SigLIP and other dual encoders of transformers, in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.modality import Modality
from clipkit.models.backend import Backend, ParameterPrefixes
from clipkit.models.backends.families import activation_of, as_trained, family_of, positions_of, settle_end_of_text
from clipkit.models.backends.quiet import quiet
from clipkit.models.processor import Processor, TransformersImages, TransformersTexts


class TransformersBackend(Backend):
    """A model with `vision_model`, `text_model`, `get_image_features` and `get_text_features`.

    A `temperature` (ALIGN) is held as its `logit_scale`, and written back when the model is saved.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.family = str(model.config.model_type)
        self.about = family_of(self.family, model)
        self.model = model
        vision, projection = ("model.vision_model",), ("model.visual_projection",)
        self.names = {
            "image": ParameterPrefixes(vision, projection if self.about.image_projection else ()),
            "text": ParameterPrefixes(("model.text_model",), ("model.text_projection",)),
        }
        for name in self.about.unread:
            model.get_submodule(name).requires_grad_(False)
        if self.about.temperature:
            model.temperature.requires_grad_(False)
            self.logit_scale = nn.Parameter(-model.temperature.detach().double().log().float())
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            self.dim = self.embed_text(ids, torch.ones_like(ids) if self.about.mask else None).shape[1]

    def logit_scale_and_bias(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        scale = self.logit_scale if self.about.temperature else self.model.logit_scale
        return scale, getattr(self.model, "logit_bias", None)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        if self.about.image_projection:
            return _pooled(self.model.vision_model(pixel_values=pixel_values))
        return _pooled(self.model.get_image_features(pixel_values=pixel_values))

    def project_image(self, features: Tensor) -> Tensor:
        projected: Tensor = self.model.visual_projection(features) if self.about.image_projection else features
        return projected

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.model.text_model(input_ids=input_ids, **given, **inputs)
        features: Tensor = output.last_hidden_state[:, 0] if self.about.text_pooling == "cls" else output.pooler_output
        return features

    def project_text(self, features: Tensor) -> Tensor:
        projected: Tensor = self.model.text_projection(features) if self.about.text_projection else features
        return projected

    def describe(self, part: Modality) -> dict[str, Any]:
        tower = self.model.vision_model if part == "image" else self.model.text_model
        pooling = self.about.image_pooling if part == "image" else self.about.text_pooling
        about = {"class": type(self.model).__name__, "activation": activation_of(tower.config), "pooling": pooling}
        return {**about, "eos_token_id": tower.config.eos_token_id} if pooling == "eos" else about

    def save(self, folder: Path, processor: Processor) -> None:
        if self.about.temperature:
            self.model.temperature.data = self.logit_scale.detach().double().neg().exp().float()
        with quiet():
            self.model.save_pretrained(folder)
        processor.save(folder)


def _pooled(output: Any) -> Tensor:
    # transformers 5 gives an output object whose pooler_output is the projected vector
    return output if isinstance(output, Tensor) else torch.as_tensor(output.pooler_output)


def wrap(model: Any, processor: Any) -> tuple[TransformersBackend, Processor]:
    """The backend and processor for a model and its transformers processor, both loaded already."""
    family_of(model.config.model_type, model)
    image_processor, tokenizer = (getattr(processor, name, None) for name in ("image_processor", "tokenizer"))
    if image_processor is None or tokenizer is None:
        class_name = type(processor).__name__
        raise ModelError(f"a processor with an image_processor and a tokenizer was expected, found {class_name}")
    return _join(model, image_processor, tokenizer)


def _join(model: Any, image_processor: Any, tokenizer: Any) -> tuple[TransformersBackend, Processor]:
    about = family_of(model.config.model_type, model)
    tokenizer = as_trained(model.config.model_type, tokenizer)
    if about.text_pooling == "eos":
        settle_end_of_text(model.text_model, tokenizer)
    longest = min(positions_of(model.text_model, tokenizer.pad_token_id), int(tokenizer.model_max_length))
    texts = TransformersTexts(
        tokenizer,
        min(longest, about.context_length or longest),
        padding=about.padding,
        mask=about.mask,
        vocabulary=model.config.text_config.vocab_size,
    )
    return TransformersBackend(model), Processor(TransformersImages(image_processor), texts)
