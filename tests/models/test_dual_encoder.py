from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipkit import progress
from clipkit.errors import BadImage, DataError, ModelError, UsageError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.processor import Processor

Images = list[Image.Image]
Make = Callable[..., DualEncoder]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def batch_norm_vision() -> Any:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    torch.manual_seed(4)
    settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    return TimmWrapperModel(TimmWrapperConfig(architecture="mobilenetv2_035", pretrained_cfg=settings))


def test_embeddings_are_unit_float32_on_the_cpu(towers: DualEncoder, images: Images, texts: list[str]) -> None:
    for found in (towers.encode_images(images), towers.encode_texts(texts)):
        assert found.shape == (4, 12)
        assert found.dtype is torch.float32
        assert not found.requires_grad
        assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-6)
    assert towers.encode_images([]).shape == towers.encode_texts([]).shape == (0, 12)


def test_an_image_may_come_in_any_form(towers: DualEncoder, images: Images, photo_paths: list[Path]) -> None:
    expected = towers.encode_images(images)
    forms: list[list[Any]] = [
        [str(path) for path in photo_paths],
        list(photo_paths),
        [png(image) for image in images],
        [np.asarray(image) for image in images],
        [{"bytes": None, "path": str(path)} for path in photo_paths],
        [{"bytes": png(image), "path": None} for image in images],
    ]
    for items in forms:
        assert torch.equal(towers.encode_images(items), expected)


def test_matryoshka_keeps_the_first_components(towers: DualEncoder, images: Images, texts: list[str]) -> None:
    whole, words = towers.encode_images(images), towers.encode_texts(texts)
    expected = torch.nn.functional.normalize(whole[:, :5], dim=1)
    assert torch.equal(towers.encode_images(images, dim=5), expected)
    assert towers.encode_texts(texts, dim=5).shape == (4, 5)
    assert torch.allclose(towers.encode_texts(texts, dim=5).norm(dim=1), torch.ones(4), atol=1e-6)
    assert torch.allclose(towers.encode_texts(texts, dim=12), words, atol=1e-6)
    for dim in (0, 13, -1):
        with pytest.raises(UsageError, match=f"dim={dim}, but the model's embeddings have 12 components"):
            towers.encode_images(images, dim=dim)


def test_workers_and_batch_size_change_nothing(towers: DualEncoder, images: Images, texts: list[str]) -> None:
    many = images * 3
    expected = towers.encode_images(many, batch_size=5)
    assert torch.equal(towers.encode_images(many, batch_size=5, workers=2), expected)
    assert (towers.encode_images(many, batch_size=1) - expected).abs().max() < 1e-5
    assert (towers.encode_texts(texts, batch_size=1) - towers.encode_texts(texts)).abs().max() < 1e-5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_arrives_as_itself(
    workers: int, towers: DualEncoder, photo_paths: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    with pytest.raises(BadImage, match=r"bad\.jpg") as caught:
        towers.encode_images([*photo_paths, bad], batch_size=2, workers=workers)
    assert caught.value.code == "EMPTY"


def test_progress_goes_to_stderr(
    towers: DualEncoder, texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHORT", 0)
    towers.encode_texts(texts, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "embedding texts 4/4" in captured.err


@pytest.mark.parametrize("item", ["cat.jpg", b"...", Path("cat.jpg"), Image.new("RGB", (9, 9))])
def test_one_image_is_no_list_of_images(item: Any, towers: DualEncoder) -> None:
    with pytest.raises(UsageError, match="takes a list"):
        towers.encode_images(item)


def test_what_is_no_text_is_refused_by_position(towers: DualEncoder) -> None:
    with pytest.raises(UsageError, match="takes a list"):
        towers.encode_texts("a cat")
    with pytest.raises(DataError, match="item 1"):
        towers.encode_texts(["a cat", float("nan")])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="batch_size"):
        towers.encode_texts(["a cat"], batch_size=0)


def test_cut_texts_are_counted_in_the_log(
    towers: DualEncoder, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    towers.encode_texts(texts[:3])
    towers.save_pretrained(tmp_path / "saved")  # the built-in texts are cut, too
    assert not any("texts were cut" in message for message in caplog.messages)
    towers.encode_texts(["word " * 77, "word " * 78, *texts])
    assert caplog.messages[-1] == "2 of 6 texts were cut at 77 tokens"


def test_encoding_leaves_the_mode_of_every_module(towers: DualEncoder, texts: list[str]) -> None:
    towers.train()
    towers.backend.text.eval()
    before = [module.training for module in towers.modules()]
    dropped = towers.encode_texts(texts)
    assert [module.training for module in towers.modules()] == before
    towers.eval()
    assert torch.equal(towers.encode_texts(texts), dropped)  # no dropout was drawn


def test_bfloat16_comes_close_and_back_as_float32(towers: DualEncoder, images: Images) -> None:
    exact, half = towers.encode_images(images), towers.encode_images(images, dtype=torch.bfloat16)
    assert half.dtype is torch.float32
    assert 0 < (exact - half).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(towers.encode_images(images, dtype=torch.float32), exact)


def test_autocast_training_gives_float32_unit_embeddings(towers: DualEncoder, images: Images, texts: list[str]) -> None:
    inputs = {"pixel_values": towers.processor.images(images), **towers.processor.texts(texts)}
    with torch.autocast("cpu", torch.bfloat16):
        found = towers(**inputs)
    assert found.image.dtype is found.text.dtype is found.scale.dtype is torch.float32
    assert torch.allclose(found.text.norm(dim=1), torch.ones(4), atol=1e-6)


def test_a_non_finite_embedding_is_an_error_that_names_the_item(
    towers: DualEncoder, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = towers.backend.image_features

    def spoil(pixels: torch.Tensor) -> torch.Tensor:
        found = features(pixels)
        found[pixels.flatten(1).mean(1) > 0.9] = torch.nan  # the white image
        return found

    monkeypatch.setattr(towers.backend, "image_features", spoil)
    with pytest.raises(ModelError, match="item 4"):
        towers.encode_images([*images, Image.new("RGB", (20, 20), "white")], batch_size=3)


def test_scale_and_bias_are_parameters_found_once(make_towers: Make) -> None:
    model = make_towers(logit_bias=-5.0)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "logit" in name]
    assert sorted(names) == ["backend.logit_bias", "backend.logit_scale"]
    assert isinstance(model.logit_scale, nn.Parameter)
    assert model.similarity == "sigmoid"


def test_sides_are_independent(towers: DualEncoder, texts: list[str]) -> None:
    found = towers(**towers.processor.texts(texts))
    assert found.image is None
    assert found.text.shape == (4, 12)
    assert found.bias is None
    assert found.scale.item() == pytest.approx(1 / 0.07)


def test_a_frozen_tower_stays_as_it_is(make_towers: Make, images: Images) -> None:
    def statistics_after_a_step(model: DualEncoder) -> torch.Tensor:
        model.train()
        model(pixel_values=model.processor.images(images))
        return torch.cat([b.flatten() for n, b in model.named_buffers() if "running" in n])

    free, locked = make_towers(batch_norm_vision()), make_towers(batch_norm_vision()).freeze("image")
    before = statistics_after_a_step(copy.deepcopy(free).eval().freeze("image"))
    assert not torch.equal(statistics_after_a_step(free), before)  # BatchNorm moves if nothing locks it
    assert torch.equal(statistics_after_a_step(locked), before)
    trained = {name.split(".")[1] for name, p in locked.named_parameters() if p.requires_grad}
    assert trained == {"image_head", "text", "text_head", "logit_scale"}
    assert locked.backend.text.training
    assert not any(module.training for module in locked.backend.vision.modules())


def test_a_tower_can_be_locked_with_its_head(towers: DualEncoder) -> None:
    towers.freeze("text", head=True)
    trained = {name.split(".")[1] for name, p in towers.named_parameters() if p.requires_grad}
    assert trained == {"vision", "image_head", "logit_scale"}


def test_a_copy_keeps_its_own_tower_frozen(towers: DualEncoder) -> None:
    twin = copy.deepcopy(towers.freeze("image"))
    twin.train()
    assert not twin.backend.vision.training
    assert twin.backend.vision is not towers.backend.vision


def test_a_cast_spares_scale_and_bias(make_towers: Make, tmp_path: Path, images: Images) -> None:
    model = make_towers(logit_scale=4.6051, logit_bias=-10.03)
    model.save_pretrained(tmp_path / "saved")
    half = DualEncoder.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, device="cpu")
    assert half.dtype is torch.bfloat16
    assert torch.equal(half.logit_scale, model.logit_scale)
    assert (half.encode_images(images) - model.encode_images(images)).abs().max() < 0.05
    half.save_pretrained(tmp_path / "half")
    again = DualEncoder.from_pretrained(tmp_path / "half")
    assert again.dtype is torch.float32


def test_an_existing_folder_is_not_overwritten(towers: DualEncoder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    towers.save_pretrained(tmp_path / "empty")
    with pytest.raises(UsageError, match="not empty"):
        towers.save_pretrained(tmp_path / "empty")
    towers.save_pretrained(tmp_path / "empty", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="only a model"):
        towers.save_pretrained(tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "home"]


def test_weights_that_are_not_finite_are_not_saved(towers: DualEncoder, tmp_path: Path) -> None:
    with torch.no_grad():
        towers.logit_scale.fill_(torch.inf)
    with pytest.raises(ModelError, match="logit_scale"):
        towers.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_workers_are_given_no_weights(towers: DualEncoder) -> None:
    assert isinstance(towers.processor, Processor)
    sides = [vars(side) for side in (towers.processor.image_side, towers.processor.text_side)]
    assert not any(isinstance(value, nn.Module) for side in sides for value in side.values())
