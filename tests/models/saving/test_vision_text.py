from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from plain import run_plain
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor, ViTImageProcessor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, golden_images
from clipkit.models.saving import vision_text as vtde

Make = Callable[..., DualEncoder]
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}
WORDS: dict[str, Any] = {**SMALL, "vocab_size": 200, "max_position_embeddings": 64}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
TIMM: dict[str, Any] = {"architecture": "mobilenetv2_035", "pretrained_cfg": {"input_size": [3, 32, 32]}}
SQUASH = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def build(class_name: str, settings: dict[str, Any]) -> Any:
    model_class = getattr(transformers, class_name)
    torch.manual_seed(5)
    model = model_class(model_class.config_class(**settings))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # or the last features would all be zero
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.01, 0.1)
    return model


def processor(crop: bool = False) -> Any:
    return CLIPImageProcessor(**CROP) if crop else ViTImageProcessor(**SQUASH)


# vision class and settings, text class and settings
FIT: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "DINOv2 + BERT": ("Dinov2Model", PATCHES, "BertModel", WORDS),
    "timm + RoBERTa": ("TimmWrapperModel", TIMM, "RobertaModel", WORDS | {"pad_token_id": 0}),
    "ViT + XLM-R": ("ViTModel", PATCHES, "XLMRobertaModel", WORDS | {"pad_token_id": 0}),
    "SigLIP + CLIP": ("SiglipVisionModel", PATCHES, "CLIPTextModel", WORDS),
    "CLIP + BERT": ("CLIPVisionModel", PATCHES, "BertModel", WORDS),
}


def ending(tokenizer: Any) -> Any:
    """The tokenizer with an end-of-text token, at which CLIP's text tower pools."""
    ending = copy.deepcopy(tokenizer)
    ending.add_special_tokens({"eos_token": "[EOS]"})
    special = [("[EOS]", ending.eos_token_id)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=special)
    return ending


def joined(case: str, make: Make) -> DualEncoder:
    vision, vision_settings, text, text_settings = FIT[case]
    plain = make().processor.text_side.tokenizer  # type: ignore[attr-defined]
    tokenizer = ending(plain) if text == "CLIPTextModel" else plain
    if text == "CLIPTextModel":
        text_settings = {**text_settings, "eos_token_id": tokenizer.eos_token_id}
    return make(
        build(vision, vision_settings),
        build(text, text_settings),
        image_pooling="pooler",
        text_pooling="pooler",
        tokenizer=tokenizer,
        image_processor=processor(crop=case.startswith("CLIP")),
    )


PIPELINE = """
import json, torch
from pathlib import Path
from PIL import Image
from transformers import AutoModel, AutoProcessor
from safetensors.torch import save_file
texts = json.loads(Path("texts.json").read_text())
images = [Image.open(f"{i}.png") for i in range(4)]
found = {}
for folder in sorted(path for path in Path(".").iterdir() if path.is_dir()):
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    found[f"{folder.name} image"], found[f"{folder.name} text"] = output.image_embeds, output.text_embeds
save_file({name: each.contiguous() for name, each in found.items()}, "found.safetensors")
"""


def test_towers_that_fit_are_opened_by_transformers_alone(make_towers: Make, tmp_path: Path) -> None:
    models = {case: joined(case, make_towers) for case in FIT}
    for case, model in models.items():
        model.processor.text_side.context_length = 50  # type: ignore[attr-defined]
        model.backend.joint = type(model.backend.joint)(**vars(model.backend.joint) | {"context_length": 50})
        saved = model.save_pretrained(tmp_path / case)
        assert saved.form == "vision-text-dual-encoder", (case, saved.why)
        again = DualEncoder.from_pretrained(tmp_path / case)
        assert again.fingerprint().difference(model.fingerprint()) == []
        assert again.backend.settings() == model.backend.settings()
        frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, again)]
        assert frozen[0] == frozen[1]
    images = golden_images()
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "texts.json").write_text(json.dumps(GOLDEN_TEXTS))
    run_plain(PIPELINE, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for case, model in models.items():
        assert (model.encode_images(images) - found[f"{case} image"]).abs().max() < 1e-5, case
        assert (model.encode_texts(list(GOLDEN_TEXTS)) - found[f"{case} text"]).abs().max() < 1e-5, case


# what of FIT's first case is changed, words of the reason
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "MLP": ({"head": "mlp"}, "MLP"),
    "bias": ({"logit_bias": -10.0}, "bias"),
    "mean": ({"text_pooling": "mean"}, "text pooling is 'mean'"),
    "cls": ({"image_pooling": "cls"}, "image pooling is 'cls'"),
    "our transform": ({"image_processor": None, "image_size": 32}, "other pixels"),
    "grey": ({"image_processor": None, "image_size": 32, "channels": 1}, "refuses|other pixels"),
    "ResNet": ({"vision": ("ResNetModel", {**STAGES, "embedding_size": 8})}, "refuses"),
    "DistilBERT": (
        {"text": ("DistilBertModel", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 200}),
         "text_pooling": "auto"},
        "text pooling is 'mean'",
    ),
    "SigLIP's text tower": ({"text": ("SiglipTextModel", WORDS)}, "refuses"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_saved_as_towers_and_says_why(case: str, make_towers: Make, tmp_path: Path) -> None:
    changes, words = MISFITS[case]
    vision, text = changes.get("vision", ("Dinov2Model", PATCHES)), changes.get("text", ("BertModel", WORDS))
    options = {"image_pooling": "pooler", "text_pooling": "pooler", "image_processor": processor(), **changes}
    options |= {"vision": build(*vision), "text": build(*text)}
    if case == "grey":
        options["vision"] = build("Dinov2Model", PATCHES | {"num_channels": 1})
    saved = make_towers(**options).save_pretrained(tmp_path / "saved")
    assert saved.form == "towers"
    assert re.search(words, saved.why), saved.why
    assert json.loads((tmp_path / "saved" / "clipkit.json").read_text())["why"] == saved.why
    assert not (tmp_path / "saved" / "config.json").exists()
    assert (tmp_path / "saved" / "without_clipkit.py").is_file()


def test_a_difference_is_found_by_trying(
    make_towers: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = vtde._renamed

    def spoilt(backend: Any) -> dict[str, Tensor]:
        weights = renamed(backend)
        weights["text_projection.weight"] = weights["text_projection.weight"].flip(0)
        return weights

    monkeypatch.setattr(vtde, "_renamed", spoilt)
    with caplog.at_level("INFO", logger="clipkit"):
        saved = joined("DINOv2 + BERT", make_towers).save_pretrained(tmp_path / "saved")
    assert "other text embeddings" in saved.why
    assert saved.why in caplog.text
    DualEncoder.from_pretrained(tmp_path / "saved")


def native(folder: Path, tokenizer: Any, cut: int | None = None) -> Path:
    """A model that transformers itself joined and wrote; the tokenizer cuts at 40 tokens, or at `cut` by a setting."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    if cut:
        tokenizer.backend_tokenizer.enable_truncation(cut)
    torch.manual_seed(6)
    model = transformers.VisionTextDualEncoderModel(
        vision_model=build("ViTModel", PATCHES), text_model=build("BertModel", WORDS)
    )
    tokenizer.model_max_length = 40
    model.save_pretrained(folder)
    transformers.VisionTextDualEncoderProcessor(processor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cut", [None, 12])
def test_a_folder_of_transformers_opens_with_parity(
    cut: int | None, word_tokenizer: Any, images: list[Image.Image], texts: list[str], tmp_path: Path
) -> None:
    folder = native(tmp_path / "native", word_tokenizer, cut)
    model, plain = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = plain(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    opened = DualEncoder.from_pretrained(folder)
    assert opened.backend.family == "towers"
    assert opened.processor.context_length == (cut or 40)
    assert (opened.encode_images(images) - F.normalize(output.image_embeds)).abs().max() < 1e-5
    assert (opened.encode_texts(texts) - F.normalize(output.text_embeds)).abs().max() < 1e-5
    logits = opened.logit_scale.exp() * opened.encode_images(images) @ opened.encode_texts(texts).T
    assert (logits - output.logits_per_image).abs().max() < 1e-4

    saved = opened.save_pretrained(tmp_path / "saved")
    assert saved.form == "vision-text-dual-encoder"
    assert DualEncoder.from_pretrained(tmp_path / "saved").fingerprint().difference(opened.fingerprint()) == []


def test_a_broken_folder_is_refused(word_tokenizer: Any, tmp_path: Path) -> None:
    folder = native(tmp_path / "native", word_tokenizer)
    (folder / "processor_config.json").unlink()
    with pytest.raises(CorruptArtefact, match="transform"):
        DualEncoder.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        DualEncoder.from_pretrained(folder)
