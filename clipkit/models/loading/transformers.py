"""One tower, its tokenizer and its image transform, from what a user has: a model or a name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from clipkit.errors import ModelError, option, typed
from clipkit.files import read_json
from clipkit.modality import Modality
from clipkit.models.backends.families import family_of
from clipkit.models.backends.transformers import TransformersBackend, _join, wrap
from clipkit.models.image_transform import ImageTransform, Resize
from clipkit.models.loading.hub import find_folder
from clipkit.models.loading.layouts import steps_after
from clipkit.models.loading.remote_code import refuse_code
from clipkit.models.loading.weights import check_folder, load_exactly
from clipkit.models.processor import ImageSide, Processor, TransformersImages

logger = logging.getLogger("clipkit")
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.spm", "*bpe*", "*.tiktoken")


def open_tower(tower: Any, part: Modality, pooling: str, trust: bool, class_name: str | None = None) -> PreTrainedModel:
    """The tower itself, or the one that a name stands for; out of a dual encoder, its half.

    BERT's and ViT's `pooler` may be missing from a checkpoint: it is dropped unless the pooling reads it.
    """
    if isinstance(tower, PreTrainedModel):
        return tower
    if not isinstance(tower, str | Path):
        raise ModelError(f"a tower is a transformers model, a folder or a hub name; found {type(tower).__name__}")
    folder = find_folder(tower)
    check_folder(folder, trust_remote_code=trust)
    loader = getattr(transformers, class_name or _class_name(folder, part), AutoModel)
    spare_pooler = () if pooling == "pooler" else ("pooler.",)
    options: dict[str, Any] = {"trust_remote_code": trust} if loader is AutoModel else {}
    if (config := _timm_config(folder)) is not None:
        options["config"] = config
    model, missing = load_exactly(loader.from_pretrained, folder, spare=True, may_lack=spare_pooler, **options)
    if missing:
        model.pooler = None
    return getattr(model, "vision_model" if part == "image" else "text_model", model)


def _class_name(folder: Path, part: Modality) -> str:
    """Of an encoder and decoder (T5 and its relatives) the encoder alone reads texts."""
    name = str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(str(read_json(folder / "config.json").get("model_type"))))
    return name if part == "text" and name.endswith("EncoderModel") else "AutoModel"


def _timm_config(folder: Path) -> Any:
    """Of a folder that timm wrote, the config that transformers makes of it, so that it can build the model.

    timm 1.0.31 repeats the number of classes in `model_args`, and transformers 5.23 then passes it twice: an error.
    """
    config = read_json(folder / "config.json")
    if "pretrained_cfg" not in config or "num_classes" not in (config.get("model_args") or {}):
        return None
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    return config


def trained_pooling(text: Any, asked: str) -> Any:
    """The pooling that a folder of sentence-transformers was trained with, where `auto` is asked for."""
    steps = steps_after(find_folder(text)) if isinstance(text, str | Path) else []
    if left_out := [step.kind for step in steps if step.kind not in _NO_WEIGHTS]:
        names = ", ".join(left_out)
        logger.warning("%s: %s of sentence-transformers is left out; the new text head stands for it", text, names)
    config = next((step.folder / "config.json" for step in steps if step.kind == "Pooling"), None)
    if asked != "auto" or config is None:
        return asked
    settings = read_json(config)
    modes = []
    for key, mode in _SENTENCE_POOLING.items():
        if settings.get(key) is True or settings.get("pooling_mode") == mode:
            modes.append(mode)
    pooling = {"cls": "cls", "mean": "mean", "lasttoken": "last"}.get(modes[0]) if len(modes) == 1 else None
    if pooling is None:
        fix = "choose text_pooling= yourself: the heads are new and will learn from it"
        raise ModelError(f"its pooling is not known here: {settings}", where=config, fix=fix)
    return pooling


_NO_WEIGHTS = ("Pooling", "Normalize", "Dropout")  # steps of sentence-transformers that nothing is lost with


# Of sentence-transformers' pooling config: the switches up to version 5, and the one word since.
_SENTENCE_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


def open_tokenizer(tokenizer: Any, trust: bool) -> Any:
    """A tokenizer as it is, or the one that a folder or hub name holds."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    folder = find_folder(tokenizer)
    refuse_code(folder, trust_remote_code=trust)
    if not holds_vocabulary(folder):
        # transformers would make up an empty tokenizer of the right class
        fix = "copy the tokenizer's files (tokenizer.json and tokenizer_config.json) from the original model"
        raise ModelError("the tokenizer's vocabulary is missing", where=folder, fix=fix)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        name = option("model.tokenizer", "FOLDER", python="tokenizer=")
        fix = f"name it: {name}; or copy tokenizer.json into the folder"
        raise ModelError(f"no tokenizer could be opened: {error}", where=folder, fix=fix) from error


def holds_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary, in any of the forms that transformers reads."""
    return any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES)


def image_side_for(
    tower: PreTrainedModel,
    folder: Path | None,
    image_processor: Any = None,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    resize: Resize | None = None,
    trust_remote_code: bool = False,
) -> ImageSide:
    """The transform given, else the one in the tower's folder, else a light one from the tower's config."""
    if isinstance(image_processor, ImageTransform):
        return image_processor
    if image_processor is not None:
        return TransformersImages(image_processor)
    asked = any(value is not None for value in (image_size, mean, std, channels, resize))
    saved = None if folder is None or asked else saved_transform(folder, trust_remote_code)
    if saved is not None:
        return saved
    pretrained = getattr(tower.config, "pretrained_cfg", None) or {}
    if "input_size" in pretrained and "mean" in pretrained:
        known = timm_transform(pretrained, image_size)
        image_size, mean, std = known.image_size, mean or known.mean, std or known.std
        if resize in (None, known.resize):
            return replace(known, mean=tuple(mean), std=tuple(std))
    elif folder is not None and not asked:
        ways = "image_processor=, or image_size= with image_mean= and image_std="
        fix = typed(python=f"pass {ways}", shell="copy preprocessor_config.json from the original model into it")
        raise ModelError("no preprocessor_config.json: the image transform is unknown", where=folder, fix=fix)
    size = image_size or getattr(tower.config, "image_size", None)
    if not isinstance(size, int):
        raise ModelError("the vision tower does not say its image size", fix="pass image_size= (pixels)")
    channels = channels or len(mean or ()) or getattr(tower.config, "num_channels", None) or 3
    mean, std = ([0.5] * channels if values is None else values for values in (mean, std))
    return ImageTransform(size, tuple(mean), tuple(std), resize or "squash")


def saved_transform(folder: Path, trust_remote_code: bool = False) -> ImageSide | None:
    """The transform that clipkit or transformers wrote into a folder, if any."""
    refuse_code(folder, trust_remote_code=trust_remote_code)
    ours = ImageTransform.open(folder)
    if ours is None and any(
        (folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        return TransformersImages(
            AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        )
    return ours


def timm_transform(pretrained: dict[str, Any], image_size: int | None = None) -> ImageTransform:
    """The evaluation transform of a timm model's `pretrained_cfg`, as timm's create_transform builds it."""
    size = image_size or int(pretrained["input_size"][-1])
    mode, fraction = pretrained.get("crop_mode", "center"), float(pretrained.get("crop_pct") or 0.875)
    if mode not in ("center", "squash") or pretrained.get("crop_border_pixels"):
        raise ModelError(
            f"timm's crop_mode {mode!r} or a trimmed border is not known here", fix="pass image_processor="
        )
    mean, std = (tuple(float(x) for x in pretrained[key]) for key in ("mean", "std"))
    kernel: Any = pretrained.get("interpolation") or "bicubic"
    scaled = int(size / fraction)  # before the crop; under squash, timm resizes both sides to it and crops, too
    return ImageTransform(size, mean, std, "squash" if mode == "squash" else "shortest", scaled, kernel)


def open_folder(
    folder: Path, trust_remote_code: bool = False, *, fresh: bool = False
) -> tuple[TransformersBackend, Processor]:
    """Open a folder that transformers wrote; `fresh` leaves its weights aside and draws new ones."""
    check_folder(folder, trust_remote_code=trust_remote_code, weights=not fresh)
    written = read_json(folder / "config.json")
    model_type = str(written.get("model_type", "timm_wrapper" if "pretrained_cfg" in written else None))
    if model_type in CONFIG_MAPPING:  # before the weights are read, and whatever they hold
        family_of(model_type, MODEL_MAPPING.get(CONFIG_MAPPING[model_type], object))
    if fresh:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        model = AutoModel.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32).eval()
    else:
        model, _ = load_exactly(AutoModel.from_pretrained, folder, trust_remote_code=trust_remote_code)
    try:
        image_processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        fix = "copy preprocessor_config.json from the original model"
        raise ModelError(
            "no image processor could be opened, so the transform is unknown", where=folder, fix=fix
        ) from error
    return _join(model, image_processor, open_tokenizer(folder, trust_remote_code))


def from_config(config: PretrainedConfig, processor: Any) -> tuple[TransformersBackend, Processor]:
    """A model with random weights, and its transformers processor."""
    return wrap(AutoModel.from_config(config, dtype=torch.float32).eval(), processor)
