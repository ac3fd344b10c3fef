from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from clipkit.errors import ModelError
from clipkit.models.image_transform import ImageTransform
from clipkit.models.processor import TransformersTexts, hash_tokenizer

Images = list[Image.Image]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
KERNELS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("resize", ["squash", "shortest"])
def test_the_transform_is_torchvisions(kernel: Any, resize: Any, images: Images) -> None:
    size: Any = (32, 32) if resize == "squash" else 40
    steps = [
        v2.Resize(size, KERNELS[kernel]),
        v2.CenterCrop(32),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
    ]
    native = v2.Compose([*steps, v2.Normalize(MEAN, STD)])
    mine = ImageTransform(32, MEAN, STD, resize, None if resize == "squash" else 40, kernel)
    batch = mine(images)
    assert batch.is_contiguous()
    for image, found in zip(images, batch, strict=True):
        assert (found - native(image)).abs().max() < 1e-6


def test_one_channel_is_luminance() -> None:
    found = ImageTransform(2, (0.0,), (1.0,))([Image.new("RGB", (2, 2), (255, 0, 0))])
    assert found.shape == (1, 1, 2, 2)
    assert found.unique().tolist() == pytest.approx([76 / 255])  # 0.299 of the red, ITU-R 601


def test_transformers_reads_the_transform_that_was_saved(images: Images, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    for resize in ("squash", "shortest"):
        mine = ImageTransform(32, MEAN, STD, resize, 40 if resize == "shortest" else None)  # type: ignore[arg-type]
        mine.save(tmp_path)
        found = ImageTransform.open(tmp_path)
        assert found is not None
        assert torch.equal(found(images), mine(images))
        native = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images, return_tensors="pt")[
            "pixel_values"
        ]
        difference = (native - mine(images)).abs().amax((1, 2, 3))
        # transformers crops an odd margin (the first image's) one pixel further to the left than torchvision
        assert difference[0 if resize == "squash" else 1 :].max() < 1e-6


@pytest.mark.parametrize("wrong", [{"mean": (0.5, 0.5), "std": (1, 1)}, {"std": (0, 1, 1)}, {"filter": "nearest"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ImageTransform(32, **wrong)


def test_a_tokenizer_without_padding_is_refused(word_tokenizer: Any) -> None:
    bare = pickle.loads(pickle.dumps(word_tokenizer))
    bare.pad_token = None
    with pytest.raises(ModelError, match="pad token"):
        TransformersTexts(bare, 8)


def test_the_hash_of_a_tokenizer_is_of_its_rules_alone(word_tokenizer: Any, texts: list[str]) -> None:
    before = hash_tokenizer(word_tokenizer)
    TransformersTexts(word_tokenizer, 3)(texts)  # leaves truncation and padding set inside the tokenizer
    assert hash_tokenizer(word_tokenizer) == before
    other = pickle.loads(pickle.dumps(word_tokenizer))
    other.add_tokens(["<new>"])
    assert hash_tokenizer(other) != before


def test_texts_are_padded_cut_and_counted(word_tokenizer: Any, texts: list[str]) -> None:
    side = TransformersTexts(word_tokenizer, 8)
    found = side(texts)
    assert {name: value.shape for name, value in found.items()} == {"input_ids": (4, 8), "attention_mask": (4, 8)}
    assert found["attention_mask"].sum(1).tolist() == [5, 6, 8, 8]
    assert side.counts(texts) == [5, 6, 9, 80]
    assert "attention_mask" not in TransformersTexts(word_tokenizer, 8, mask=False)(texts)
