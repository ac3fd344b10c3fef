"""Models of open_clip, in open_clip's own format. open_clip takes seconds to import: only this file does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.files import dump_json
from clipkit.modality import Modality
from clipkit.models.backend import Backend, ParameterPrefixes
from clipkit.models.backends.open_clip_processor import OpenClipImages, OpenClipTexts, is_hf
from clipkit.models.processor import Processor
from clipkit.suggest import near

logger = logging.getLogger("clipkit")
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXT_CONFIG = (
    "text_config"  # a folder with the config of a text tower of transformers, which open_clip_config.json names
)
_TEXT = ("text", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")


class OpenClipBackend(Backend):
    """A model with `encode_image`, `encode_text`, `visual` and `logit_scale`.

    Of CoCa, the two towers: its caption decoder takes no part in embeddings and is frozen. It is saved as
    it was, so that open_clip opens the whole CoCa again, and it is in no fingerprint.

    Args:
        model: as open_clip made it.
        config: its `model_cfg`; None if it is not known, and then it cannot be saved.
        context_length: of its tokenizer.
    """

    family = "open_clip"
    names = {  # noqa: RUF012
        "image": ParameterPrefixes(("model.visual",), ()),
        "text": ParameterPrefixes(tuple(f"model.{name}" for name in _TEXT), ()),
    }

    def __init__(self, model: Any, config: dict[str, Any] | None, context_length: int) -> None:
        super().__init__()
        self.model, self.config = model, config
        if hasattr(model, "text_decoder"):
            model.text_decoder.requires_grad_(False)
        self.dim = int(config["embed_dim"]) if config is not None else _dim(model, context_length)

    def logit_scale_and_bias(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.model.logit_scale, getattr(self.model, "logit_bias", None)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixel_values, normalize=False)
        return features

    def project_image(self, features: Tensor) -> Tensor:
        return features

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(input_ids, normalize=False)  # finds padding by itself
        return features

    def project_text(self, features: Tensor) -> Tensor:
        return features  # the projection is a part of the tower

    def describe(self, part: Modality) -> dict[str, Any]:
        about = {"class": type(self.model).__name__}
        return about | (_text_pooling(self.model) if part == "text" else {"pooling": _image_pooling(self.model.visual)})

    def save(self, folder: Path, processor: Processor) -> None:
        if self.config is None:
            fix = "from_open_clip(model, preprocess, tokenizer, arch=...) with the name given to create_model"
            raise ModelError("an open_clip model does not know its own architecture, and it was not given", fix=fix)
        weights = {name: tensor.contiguous().clone() for name, tensor in self.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        processor.save(folder)
        if "hf_model_name" in self.config["text_cfg"]:
            self.model.text.config.save_pretrained(folder / TEXT_CONFIG)
        body = {"model_cfg": self._config(processor), "preprocess_cfg": _preprocess_config(self.model)}
        (folder / CONFIG).write_text(dump_json(body), encoding="utf-8")

    def _config(self, processor: Processor) -> dict[str, Any]:
        """The config of the model as it stands: overrides given at its creation are not in the original."""
        config = copy.deepcopy(self.config or {})
        config["vision_cfg"]["image_size"] = _square(self.model.visual.image_size)
        config["text_cfg"]["context_length"] = processor.context_length
        bias = self.logit_scale_and_bias()[1]
        if bias is not None:
            config.setdefault("init_logit_bias", float(bias.detach().reshape(())))
        config["text_cfg"].pop("hf_tokenizer_name", None)
        if is_hf(processor.text_side):
            config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads its files from the same folder
        return config


@torch.no_grad()
def _dim(model: Any, context_length: int) -> int:
    ids = torch.zeros(1, context_length, dtype=torch.long, device=model.logit_scale.device)
    return int(model.encode_text(ids).shape[1])


def _text_pooling(model: Any) -> dict[str, Any]:
    tower = getattr(model, "text", model)
    if hasattr(tower, "pooler"):  # a text tower of transformers
        return {"pooling": type(tower.pooler).__name__}
    if getattr(tower, "cls_emb", None) is not None:
        return {"pooling": "cls"}
    pooling, end = _pooled_token(model)
    return {"pooling": pooling, "eos_token_id": end} if pooling == "eos" else {"pooling": pooling}


def _pooled_token(model: Any) -> tuple[str, int | None]:
    tower, prefix = (model.text, "") if hasattr(model, "text") else (model, "text_")
    return getattr(tower, f"{prefix}pool_type", "none"), getattr(tower, f"{prefix}eos_id", None)


def _image_pooling(visual: Any) -> str:
    if getattr(visual, "attn_pool", None) is not None:
        return "attention"
    return str(getattr(visual, "pool_type", None) or getattr(getattr(visual, "trunk", None), "global_pool", "model's"))


def _square(size: Any) -> Any:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return int(sides[0]) if sides[0] == sides[1] else [int(side) for side in sides]


def _preprocess_config(model: Any) -> dict[str, Any]:
    settings = dict(model.visual.preprocess_cfg)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def wrap(
    model: Any, preprocess: Any, tokenizer: Any, arch: str | Mapping[str, Any] | None = None
) -> tuple[OpenClipBackend, Processor]:
    """The backend and processor for a model of open_clip that is loaded already."""
    config = open_clip.get_model_config(arch) if isinstance(arch, str) else arch
    if isinstance(arch, str) and config is None:
        raise unknown_architecture(arch)
    if not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
        raise ModelError(f"an open_clip model was expected, found {type(model).__name__}")
    images, texts = OpenClipImages(preprocess, open_clip.get_model_preprocess_cfg(model)), OpenClipTexts(tokenizer)
    config = None if config is None else copy.deepcopy(dict(config))
    _check_padding(model, texts)
    _settle_end_of_text(model, texts, config)
    return OpenClipBackend(model, config, texts.context_length), Processor(images, texts)


def _check_padding(model: Any, texts: OpenClipTexts) -> None:
    """A text tower of transformers masks the padding by its id, which must be the tokenizer's."""
    masked = getattr(getattr(getattr(model, "text", None), "config", None), "pad_token_id", None)
    if masked is not None and masked != texts.pad_token_id:
        message = f"the text tower takes {masked} for padding, the tokenizer pads with {texts.pad_token_id}"
        raise ModelError(message, fix="set pad_token_id in the tower's config to the tokenizer's")


def _settle_end_of_text(model: Any, texts: OpenClipTexts, config: dict[str, Any] | None) -> None:
    """Pool at the end of text where open_clip would pool at the highest id, and a token stands above that end."""
    tower = getattr(model, "text", model)
    if hasattr(tower, "pooler") or getattr(tower, "cls_emb", None) is not None:
        return
    end, highest = texts.eos_token_id, texts.highest_id
    if _pooled_token(model)[0] != "argmax" or end == highest:
        return
    if end is None:
        message = f"the text tower pools at the highest id ({highest}), the tokenizer has no end-of-text token"
        raise ModelError(
            message, topic="pooling", fix="a tokenizer with an end-of-text token, or another pool_type in text_cfg"
        )
    logger.warning("token %d stands above the end of text (%d): texts are pooled at their end, not there", highest, end)
    names = ("pool_type", "eos_id") if tower is not model else ("text_pool_type", "text_eos_id")
    for name, value in zip(names, ("eos", end), strict=True):
        setattr(tower, name, value)
    if config is not None:
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": end}


def unknown_architecture(arch: str, hint: str = "") -> ModelError:
    """`hint` goes before the near names of architectures: folders, where a path may have been meant."""
    hint = hint or near(arch, open_clip.list_models())
    fix = "open_clip:ARCH/TAG; open_clip.list_pretrained() lists them"
    return ModelError(f"open_clip knows no architecture {arch!r}.{hint}", fix=fix)
