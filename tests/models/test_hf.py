from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from clipkit.errors import CorruptArtefact, ModelError
from clipkit.models.dual_encoder import DualEncoder

Images = list[Image.Image]


def pipeline(folder: Path, images: Images, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """transformers alone, as its documentation shows it: embeddings and logits."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    siglip = model.config.model_type == "siglip"
    padding = "max_length" if siglip else True
    inputs = processor(text=texts, images=images, padding=padding, truncation=True, return_tensors="pt")
    if siglip:
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        output = model(**inputs)
    return F.normalize(output.image_embeds), F.normalize(output.text_embeds), output.logits_per_image


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_folder")
    return found


def test_embeddings_equal_the_whole_pipeline_of_transformers(folder: Path, images: Images, texts: list[str]) -> None:
    image, text, logits = pipeline(folder, images, texts)
    model = DualEncoder.from_pretrained(folder)
    assert (model.encode_images(images) - image).abs().max() < 1e-5
    assert (model.encode_texts(texts) - text).abs().max() < 1e-5
    found = model(pixel_values=model.processor.images(images), **model.processor.texts(texts))
    mine = found.scale * found.image @ found.text.T + (0 if found.bias is None else found.bias)
    assert (mine - logits).abs().max() < 1e-4
    assert model.similarity == ("sigmoid" if "siglip" in str(folder) else "softmax")


def test_a_saved_folder_opens_in_plain_transformers(
    folder: Path, images: Images, texts: list[str], tmp_path: Path
) -> None:
    model = DualEncoder.from_pretrained(folder)
    with torch.no_grad():
        next(model.backend.parameters()).mul_(1.01)
        model.logit_scale.add_(0.5)
    model.save_pretrained(tmp_path / "saved")
    image, text, _ = pipeline(tmp_path / "saved", images, texts)
    assert (model.encode_images(images) - image).abs().max() < 1e-5
    assert (model.encode_texts(texts) - text).abs().max() < 1e-5
    again = DualEncoder.from_pretrained(tmp_path / "saved")
    assert again.fingerprint().difference(model.fingerprint()) == []
    assert torch.equal(again.logit_scale, model.logit_scale)


def test_a_loaded_model_can_be_wrapped(folder: Path, images: Images) -> None:
    model = DualEncoder.from_transformers(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
    assert torch.equal(model.encode_images(images), DualEncoder.from_pretrained(folder).encode_images(images))


def test_texts_are_cut_and_counted(clip_folder: Path, siglip_folder: Path, texts: list[str]) -> None:
    clip, siglip = (DualEncoder.from_pretrained(f).processor for f in (clip_folder, siglip_folder))
    cut = clip.texts(texts)["input_ids"][3]
    assert len(cut) == clip.context_length == 24
    assert cut[-1] == 1  # the end-of-text token is kept
    assert clip.token_counts(texts)[3] > 24
    padded = siglip.texts(["a cat"])
    assert padded["input_ids"].shape == (1, 16)
    assert "attention_mask" not in padded


def test_locked_features_stand_in_for_pixels(folder: Path, images: Images) -> None:
    model = DualEncoder.from_pretrained(folder)
    pixels = model.processor.images(images)
    features = model.vision_features(pixels)
    assert torch.equal(model(image_features=features).image, model(pixel_values=pixels).image)
    assert features.shape[1] == 32  # CLIP's width before its projection to 16


Change = Callable[[Path], object]


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        changed = change(weights)
        save_file(changed if isinstance(changed, dict) else weights, folder / "model.safetensors", {"format": "pt"})

    return edit


def edit_config(**values: Any) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BROKEN: dict[str, tuple[Change, type[Exception], str]] = {
    "missing key": (edit_weights(lambda w: w.pop("visual_projection.weight")), ModelError, "visual_projection.weight"),
    "left-over key": (edit_weights(lambda w: w.update(extra=torch.zeros(1))), ModelError, "no place for: extra"),
    "prefix": (edit_weights(lambda w: {f"module.{k}": v for k, v in w.items()}), ModelError, "prefix"),
    "shape": (edit_weights(lambda w: w.update({"text_projection.weight": torch.zeros(3, 3)})), ModelError, r"\(3, 3\)"),
    "NaN": (edit_weights(lambda w: w["text_projection.weight"][0].fill_(torch.nan)), ModelError, "NaN"),
    "no config": (lambda f: (f / "config.json").unlink(), ModelError, "config.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), CorruptArtefact, "not a JSON"),
    "pickle": (only_pickle, ModelError, "pickled weights were found: pytorch_model.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ModelError, "no weights"),
    "code": (edit_config(auto_map={"AutoModel": "evil.Model"}), ModelError, "run its own code"),
    "hidden code": (edit_config(_attn_implementation_internal="a/b"), ModelError, "run its own code"),
    "LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ModelError,
        "git lfs pull",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        CorruptArtefact,
        "model.safetensors",
    ),
    "NaFlex": (edit_config(model_type="siglip2"), ModelError, "NaFlex"),
    "unknown kind": (edit_config(model_type="no_such_kind"), ModelError, "cannot open"),
    "one tower": (edit_config(model_type="clip_vision_model"), ModelError, "from_towers"),
    "no transform": (lambda f: (f / "processor_config.json").unlink(), ModelError, "image processor"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], ModelError, "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(case: str, clip_folder: Path, tmp_path: Path) -> None:
    change, error, words = BROKEN[case]
    folder = shutil.copytree(clip_folder, tmp_path / "broken")
    change(folder)
    with pytest.raises(error, match=words):
        DualEncoder.from_pretrained(folder)


def test_naflex_is_refused_by_name() -> None:
    from transformers import Siglip2Config, Siglip2Model

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Siglip2Model(Siglip2Config(text_config=small | {"vocab_size": 9}, vision_config=small))
    with pytest.raises(ModelError, match="NaFlex"):
        DualEncoder.from_transformers(model, None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("openai/clip-vit-base-patch23", "openai/clip-vit-base-patch32"),
        ("/no/such/folder", "no such model folder"),
        ("clip", "no such model folder"),
        ("a/b/c/d", "a model's name is"),
    ],
)
def test_an_unknown_name_offline_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        DualEncoder.from_pretrained(name)


def test_a_neighbouring_folder_is_suggested(clip_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"Did you mean .*clip"):
        DualEncoder.from_pretrained(str(clip_folder) + "s")
