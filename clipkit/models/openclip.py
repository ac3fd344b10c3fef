"""Models of open_clip, in open_clip's own format. open_clip takes seconds to import: only this file does."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipkit.errors import ModelError
from clipkit.files import dump_json
from clipkit.models.backend import Backend, Names, Part
from clipkit.models.names import near
from clipkit.models.processor import Processor, hash_tokenizer
from clipkit.models.text_facts import END, START, vocabulary_hash
from clipkit.models.weights import check_finite, check_safetensors, quiet, read_json

CONFIG, WEIGHTS, HUB = "open_clip_config.json", "open_clip_model.safetensors", "hf-hub:"
_TEXT = ("text", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")


class OpenClipBackend(Backend):
    """A model with `encode_image`, `encode_text`, `visual` and `logit_scale`.

    Args:
        model: as open_clip made it.
        config: its `model_cfg`; None if it is not known, and then it cannot be saved.
    """

    family = "open_clip"
    names = {  # noqa: RUF012
        "image": Names(("model.visual",), ()),
        "text": Names(tuple(f"model.{name}" for name in _TEXT), ()),
    }

    def __init__(self, model: Any, config: dict[str, Any] | None) -> None:
        super().__init__()
        self.model, self.config = model, config
        ids = torch.zeros(1, model.context_length, dtype=torch.long, device=model.logit_scale.device)
        with torch.no_grad():
            self.dim = int(model.encode_text(ids).shape[1])

    def scalars(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.model.logit_scale, getattr(self.model, "logit_bias", None)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixel_values)
        return features

    def project_image(self, features: Tensor) -> Tensor:
        return features

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(input_ids)  # finds padding by itself
        return features

    def describe(self, part: Part) -> dict[str, Any]:
        return {"class": type(self.model).__name__}

    def save(self, folder: Path, processor: Processor) -> None:
        if self.config is None:
            fix = "from_open_clip(model, preprocess, tokenizer, arch=...) with the name given to create_model"
            raise ModelError("an open_clip model does not know its own architecture, and it was not given", fix=fix)
        weights = {name: tensor.contiguous().clone() for name, tensor in self.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        processor.save(folder)
        body = {"model_cfg": self._config(processor), "preprocess_cfg": _preprocess_config(self.model)}
        (folder / CONFIG).write_text(dump_json(body), encoding="utf-8")

    def _config(self, processor: Processor) -> dict[str, Any]:
        """The config of the model as it stands: overrides given at its creation are not in the original."""
        config = copy.deepcopy(self.config or {})
        config["vision_cfg"]["image_size"] = _square(self.model.visual.image_size)
        config["text_cfg"]["context_length"] = processor.context_length
        bias = self.scalars()[1]
        if bias is not None:
            config.setdefault("init_logit_bias", float(bias.detach().reshape(())))
        config["text_cfg"].pop("hf_tokenizer_name", None)
        if _is_hf(processor.text_side):
            config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads its files from the same folder
        return config


def _square(size: Any) -> Any:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return int(sides[0]) if sides[0] == sides[1] else [int(side) for side in sides]


def _preprocess_config(model: Any) -> dict[str, Any]:
    found = dict(model.visual.preprocess_cfg)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


class OpenClipImages:
    """open_clip's evaluation transform, used as it is."""

    def __init__(self, preprocess: Callable[[Image.Image], Tensor], settings: Mapping[str, Any]) -> None:
        self.preprocess, self.settings = preprocess, dict(settings)
        size = self.settings["size"]
        self.image_size = size if isinstance(size, int) else max(size)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.preprocess(image) for image in images])

    def describe(self) -> dict[str, Any]:
        # Its text names every step with its numbers, whoever built it.
        steps = " ".join(str(self.preprocess).replace("[", "(").replace("]", ")").split())
        return {"transform": steps, "image_size": self.image_size, **_jsonable(self.settings)}

    def save(self, folder: Path) -> None:
        """Nothing: open_clip_config.json holds it."""


class OpenClipTexts:
    """open_clip's tokenizer, used as it is."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.context_length = tokenizer, int(tokenizer.context_length)
        self._hash: str | None = None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(list(texts))}

    def counts(self, texts: Sequence[str]) -> list[int]:
        if _is_hf(self):
            cleaned = [self.tokenizer.clean_fn(text) for text in texts]
            rows = self.tokenizer.tokenizer(cleaned, padding=False, truncation=False, verbose=False)["input_ids"]
            return [len(row) for row in rows]
        return [len(self.tokenizer.encode(text)) + 2 for text in texts]  # start and end of text

    def describe(self) -> dict[str, Any]:
        if self._hash is None:
            self._hash = self._hash_tokenizer()
        return {"tokenizer": self._hash}

    def _hash_tokenizer(self) -> str:
        if _is_hf(self):
            return hash_tokenizer(self.tokenizer.tokenizer)
        start, end = (self.tokenizer.decoder[n] for n in (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id))
        return vocabulary_hash(self.tokenizer.encoder, {start: START, end: END})

    def save(self, folder: Path) -> None:
        if _is_hf(self):
            self.tokenizer.save_pretrained(folder)


def _is_hf(side: Any) -> bool:
    return hasattr(side.tokenizer, "tokenizer")


def _jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    jsonable: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return jsonable


def wrap(
    model: Any, preprocess: Any, tokenizer: Any, arch: str | Mapping[str, Any] | None = None
) -> tuple[OpenClipBackend, Processor]:
    """The backend and processor for a model of open_clip that is loaded already."""
    config = open_clip.get_model_config(arch) if isinstance(arch, str) else arch
    if isinstance(arch, str) and config is None:
        raise _unknown_architecture(arch)
    if not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
        raise ModelError(f"an open_clip model was expected, found {type(model).__name__}")
    images = OpenClipImages(preprocess, open_clip.get_model_preprocess_cfg(model))
    backend = OpenClipBackend(model, None if config is None else copy.deepcopy(dict(config)))
    return backend, Processor(images, OpenClipTexts(tokenizer))


def open_by_name(name: str) -> tuple[OpenClipBackend, Processor]:
    """`ARCH/TAG`, or `hf-hub:org/name`."""
    if name.startswith(HUB):
        return _create(name, name, None, {})
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        raise _unknown_architecture(arch)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    choice = f"open_clip:{arch}/TAG with TAG one of {', '.join(tags)}" if tags else "no weights are published for it"
    known = open_clip.get_pretrained_cfg(arch, tag) if tag else None
    if not known:
        message = f"no weights called {tag!r} for {arch}.{near(tag, tags)}" if tag else f"which weights of {arch}?"
        raise ModelError(message, where=f"open_clip:{name}", fix=choice)
    config = open_clip.get_model_config(arch)
    trained_quick, built_quick = (bool(c.get("quick_gelu", False)) for c in (known, config))
    if built_quick and not trained_quick:
        message = f"{arch} computes QuickGELU, but {tag!r} was trained without"
        raise ModelError(message, where=f"open_clip:{name}", fix=f"open_clip:{arch.replace('-quickgelu', '')}/{tag}")
    # A model of the wrong activation is 2.7 points worse on ImageNet; open_clip only warns.
    config["quick_gelu"] = trained_quick
    return _create(name, arch, config, {"pretrained": tag, "force_quick_gelu": trained_quick})


def _unknown_architecture(arch: str) -> ModelError:
    known = open_clip.list_models()
    fix = "open_clip:ARCH/TAG; open_clip.list_pretrained() lists them"
    return ModelError(f"open_clip knows no architecture {arch!r}.{near(arch, known)}", fix=fix)


def open_folder(folder: Path) -> tuple[OpenClipBackend, Processor]:
    """A folder with open_clip_config.json and safetensors."""
    path = folder / CONFIG
    if not path.is_file():
        fix = f"a folder that holds {CONFIG} beside the weights"
        raise ModelError(f"{CONFIG} is missing, so the model's shape is unknown", where=folder, fix=fix)
    config = read_json(path).get("model_cfg")
    if not isinstance(config, dict):
        raise ModelError("model_cfg is missing", where=path)
    check_safetensors(folder)
    _refuse_made_up_bias(folder, config)
    return _create(str(folder), f"local-dir:{folder}", config, {})


def _refuse_made_up_bias(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("init_logit_bias") is None:
        return
    for path in check_safetensors(folder):
        with safe_open(path, "pt") as weights:
            if "logit_bias" in weights.keys():  # noqa: SIM118
                return
    raise ModelError("weight logit_bias is missing; open_clip would take 0", where=folder)


def _create(
    name: str, model_name: str, config: dict[str, Any] | None, options: dict[str, Any]
) -> tuple[OpenClipBackend, Processor]:
    """Model, transform and tokenizer as open_clip itself opens them, with weights or not at all."""
    with _open_clip_errors(name), quiet():
        if config is None:
            config = open_clip.get_model_config(model_name)
        model = open_clip.create_model(model_name, require_pretrained=True, precision="fp32", **options)
        tokenizer = open_clip.get_tokenizer(model_name)
    check_finite(model, name)
    settings = open_clip.get_model_preprocess_cfg(model)
    preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return wrap(model.eval(), preprocess, tokenizer, config)


@contextmanager
def _open_clip_errors(name: str) -> Iterator[None]:
    # open_clip reports through the root logger, and gives it a handler for good if it has none.
    root, handler = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        message = f"open_clip cannot open it: {' '.join(lines[:3])[:400]}"
        fix = "check the name; offline, only weights that were downloaded before can be opened"
        raise ModelError(message, where=name, fix=fix) from error
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
