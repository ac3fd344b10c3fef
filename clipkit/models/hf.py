"""CLIP, SigLIP and other dual encoders of transformers, in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoImageProcessor, AutoModel

from clipkit.errors import ModelError
from clipkit.models.backend import Backend, Names, Part
from clipkit.models.open_tower import activation_of, open_tokenizer
from clipkit.models.processor import Processor, TransformersImages, TransformersTexts
from clipkit.models.weights import check_folder, load_exactly, quiet, read_json

# Where the image projection is a module of its own, a locked tower's features can be cached before it.
_PROJECTS_APART = ("clip",)


class TransformersBackend(Backend):
    """A model with `get_image_features` and `get_text_features`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not isinstance(getattr(model, "logit_scale", None), nn.Parameter):
            raise ModelError(f"{type(model).__name__} has no logit_scale parameter: it cannot be used here yet")
        self.model = model
        self.family = str(model.config.model_type)
        self._apart = self.family in _PROJECTS_APART
        vision, projection = ("model.vision_model",), ("model.visual_projection",)
        self.names = {
            "image": Names(vision, projection) if self._apart else Names(vision + projection, ()),
            "text": Names(("model.text_model",), ("model.text_projection",)),
        }
        with torch.no_grad():
            self.dim = self.embed_text(torch.zeros(1, 1, dtype=torch.long, device=model.device), None).shape[1]

    def scalars(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.model.logit_scale, getattr(self.model, "logit_bias", None)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        if self._apart:
            return _pooled(self.model.vision_model(pixel_values=pixel_values))
        return _pooled(self.model.get_image_features(pixel_values=pixel_values))

    def project_image(self, features: Tensor) -> Tensor:
        projected: Tensor = self.model.visual_projection(features) if self._apart else features
        return projected

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        return _pooled(self.model.get_text_features(input_ids=input_ids, **given, **inputs))

    def describe(self, part: Part) -> dict[str, Any]:
        config = self.model.config.vision_config if part == "image" else self.model.config.text_config
        return {"class": type(self.model).__name__, "activation": activation_of(config)}

    def save(self, folder: Path, processor: Processor) -> None:
        with quiet():
            self.model.save_pretrained(folder)
        processor.save(folder)


def _pooled(output: Any) -> Tensor:
    # transformers 5 gives an output object whose pooler_output is the projected vector
    return output if isinstance(output, Tensor) else torch.as_tensor(output.pooler_output)


def wrap(model: Any, processor: Any) -> tuple[TransformersBackend, Processor]:
    """The backend and processor for a model and its transformers processor, both loaded already."""
    _check_kind(model.config.model_type, model)
    image_processor, tokenizer = (getattr(processor, name, None) for name in ("image_processor", "tokenizer"))
    if image_processor is None or tokenizer is None:
        found = type(processor).__name__
        raise ModelError(f"a processor with an image_processor and a tokenizer was expected, found {found}")
    return TransformersBackend(model), _processor(model.config, image_processor, tokenizer)


def _check_kind(model_type: str, model: Any) -> None:
    if model_type == "siglip2":
        message = "SigLIP 2 NaFlex takes images of any shape as lists of patches, which is not supported"
        raise ModelError(message, fix="a SigLIP 2 of fixed resolution, e.g. google/siglip2-base-patch16-224")
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        fix = "join it with another tower: DualEncoder.from_towers(vision, text, tokenizer)"
        raise ModelError(f"{name} is no dual encoder: it does not embed both images and texts", fix=fix)


def _processor(config: Any, image_processor: Any, tokenizer: Any) -> Processor:
    siglip = config.model_type == "siglip"
    positions = int(getattr(config.text_config, "max_position_embeddings", 77))
    length = min(positions, int(tokenizer.model_max_length))
    # SigLIP reads the last position of a text padded to full length and was trained without a mask.
    padding, mask = ("max_length", False) if siglip else ("longest", True)
    texts = TransformersTexts(tokenizer, length, padding=padding, mask=mask)  # type: ignore[arg-type]
    return Processor(TransformersImages(image_processor), texts)


def open_folder(folder: Path, trust_remote_code: bool = False) -> tuple[TransformersBackend, Processor]:
    """Open a folder that transformers wrote."""
    check_folder(folder, trust_remote_code=trust_remote_code)
    model_type = str(read_json(folder / "config.json").get("model_type"))
    if model_type in CONFIG_MAPPING:  # before the weights are read, and whatever they hold
        _check_kind(model_type, MODEL_MAPPING.get(CONFIG_MAPPING[model_type], object))
    model, _ = load_exactly(AutoModel.from_pretrained, folder, trust_remote_code=trust_remote_code)
    _check_kind(model_type, model)
    try:
        image_processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        fix = "copy preprocessor_config.json from the original model"
        raise ModelError(
            "no image processor could be opened, so the transform is unknown", where=folder, fix=fix
        ) from error
    return TransformersBackend(model), _processor(
        model.config, image_processor, open_tokenizer(folder, trust_remote_code)
    )
