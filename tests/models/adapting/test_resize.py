"""Resized models: the positions are the native libraries', and what is saved opens as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import ModelError, UsageError
from clipkit.models.adapting.positions import resample_grid, resample_line
from clipkit.models.dual_encoder import DualEncoder

Images = list[Image.Image]
Make = Callable[..., DualEncoder]
Reopen = Callable[[DualEncoder, Path], DualEncoder]


def embeddings(model: DualEncoder, images: Images, texts: list[str]) -> Tensor:
    return torch.cat([model.encode_images(images), model.encode_texts(texts)])


def positions(model: DualEncoder, part: str) -> tuple[str, Tensor]:
    return next(
        (name, p.detach())
        for name, p in model.backend.named_parameters()
        if "position" in name and model.backend.belongs_to(part, name)  # type: ignore[arg-type]
    )


def test_a_ramp_stays_a_ramp() -> None:
    row = torch.linspace(0, 1, 8)
    grid = torch.stack([row.repeat(8), row.repeat_interleave(8)], 1)  # (64, 2): column and row of each patch
    table = torch.cat([torch.tensor([[7.0, 9.0]]), grid])
    found = resample_grid(table, 1, 8, 16)
    assert torch.equal(found[0], table[0])  # the class token keeps its own
    square = found[1:].reshape(16, 16, 2)
    inside = square[3:-3, 3:-3]
    steps = inside[:, 1:, 0] - inside[:, :-1, 0]
    assert (steps - 1 / 14).abs().max() < 1e-5  # half of 1 / 7
    assert torch.allclose(square[..., 0], square[..., 1].T)
    assert resample_grid(table[None], 1, 8, 4).shape == (1, 17, 2)


def test_a_line_is_interpolated_or_cut() -> None:
    table = torch.arange(6.0).view(6, 1)
    assert resample_line(table, 2, 8).flatten().tolist() == [0, 1, 2, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5]
    assert resample_line(table, 2, 3).flatten().tolist() == [0, 1, 2, 3, 4]
    assert resample_line(table, 0, 6) is not table
    assert torch.equal(resample_line(table, 0, 6), table)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_another_image_size_survives_saving(
    any_model: DualEncoder, factor: float, images: Images, texts: list[str], tmp_path: Path, reopen: Reopen
) -> None:
    before = embeddings(any_model, images, texts)
    size = int(any_model.processor.image_size * factor)
    trained = {name: p.requires_grad for name, p in any_model.named_parameters()}
    any_model.resize(image_size=size)
    assert any_model.processor.image_size == size
    assert any_model.processor.images(images).shape[2:] == (size, size)
    expected = embeddings(any_model, images, texts)
    assert not torch.equal(expected[:4], before[:4])
    assert torch.equal(expected[4:], before[4:])
    assert {name: p.requires_grad for name, p in any_model.named_parameters()} == trained
    again = reopen(any_model, tmp_path / "saved")
    assert again.processor.image_size == size
    assert (embeddings(again, images, texts) - expected).abs().max() <= 1e-6
    assert again.fingerprint().difference(any_model.fingerprint()) == []


@pytest.mark.parametrize("more", [11, -6])
def test_another_context_length_survives_saving(
    any_model: DualEncoder, more: int, images: Images, texts: list[str], tmp_path: Path, reopen: Reopen
) -> None:
    length = any_model.processor.context_length + more
    before = embeddings(any_model, images, texts)
    any_model.resize(context_length=length)
    assert any_model.processor.context_length == length
    longest = max(any_model.processor.token_counts(texts))
    assert any_model.processor.texts(texts)["input_ids"].shape[1] in (length, longest)
    expected = embeddings(any_model, images, texts)
    assert torch.equal(expected[:4], before[:4])
    assert not torch.equal(expected[4:], before[4:])  # the last text fills any length
    again = reopen(any_model, tmp_path / "saved")
    assert again.processor.context_length == length
    assert (embeddings(again, images, texts) - expected).abs().max() <= 1e-6
    assert again.fingerprint().difference(any_model.fingerprint()) == []
    _, table = positions(any_model, "text")
    assert len(table) == (512 if any_model.backend.family == "towers" else length)  # BERT has more than 77 + 11


def test_there_and_back_is_nearly_the_same(any_model: DualEncoder, images: Images, texts: list[str]) -> None:
    name, before = positions(any_model, "image")
    smooth = torch.linspace(0, 1, before.shape[-2]).unsqueeze(1).expand(-1, before.shape[-1])
    any_model.backend.get_parameter(name).data.copy_(smooth.reshape(before.shape))
    size = any_model.processor.image_size
    any_model.resize(image_size=4 * size).resize(image_size=size)
    assert (positions(any_model, "image")[1] - smooth.reshape(before.shape)).abs().max() < 0.15


def test_open_clip_resamples_as_this_does(open_clip_arch: Callable[..., str], tmp_path: Path) -> None:
    import open_clip
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    arch = open_clip_arch("tiny-resize")
    made, _, preprocess = open_clip.create_model_and_transforms(arch)
    state = copy.deepcopy(made.state_dict())
    target = open_clip.create_model(arch, force_image_size=80, force_context_length=33)
    resize_pos_embed(state, target)
    resize_text_pos_embed(state, target)
    model = DualEncoder.from_open_clip(made, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    model.resize(image_size=80, context_length=33)
    found = model.backend.model.state_dict()
    assert found.keys() == state.keys()
    for name, expected in state.items():
        assert (found[name] - expected).abs().max() <= 1e-6, name
    assert torch.equal(model.backend.model.attn_mask, target.attn_mask)


def test_native_transformers_opens_it(clip_folder: Path, images: Images, texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    model = DualEncoder.from_pretrained(clip_folder).resize(image_size=48, context_length=40)
    model.save_pretrained(tmp_path / "saved")
    plain, processor = AutoModel.from_pretrained(tmp_path / "saved"), AutoProcessor.from_pretrained(tmp_path / "saved")
    batch = processor(images=images, text=texts, padding="max_length", truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (4, 40)
    assert batch["pixel_values"].shape == (4, 3, 48, 48)
    with torch.no_grad():
        out = plain(**batch)
    assert (out.image_embeds - model.encode_images(images)).abs().max() < 1e-5
    assert (out.text_embeds - model.encode_texts(texts)).abs().max() < 1e-5


def test_timm_resamples_as_this_does(make_towers: Make, vision_tower: Callable[[str], Any]) -> None:
    import timm

    model = make_towers(vision_tower("vit_tiny_patch16_224"))
    native = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)
    native.load_state_dict(model.backend.vision.timm_model.state_dict())
    native.set_input_size(img_size=80)
    model.resize(image_size=80)
    assert (model.backend.vision.timm_model.pos_embed - native.pos_embed).abs().max() < 1e-6
    assert model.backend.vision.config.model_args["img_size"] == 80


@pytest.mark.parametrize(
    ("kind", "size", "tables"),
    [("dinov2", 48, 1), ("vit_tiny_patch16_224", 64, 1), ("swin", 48, 0), ("resnet18", 48, 0), ("dinov3", 48, 0)],
)
def test_other_towers(
    make_towers: Make,
    vision_tower: Callable[[str], Any],
    kind: str,
    size: int,
    tables: int,
    images: Images,
    tmp_path: Path,
    reopen: Reopen,
) -> None:
    model = make_towers(vision_tower(kind), image_size=32)
    before = {name: p.shape for name, p in model.named_parameters()}
    model.resize(image_size=size)
    assert sum(p.shape != before[name] for name, p in model.named_parameters()) == tables
    again = reopen(model, tmp_path / "saved")
    assert (again.encode_images(images) - model.encode_images(images)).abs().max() <= 1e-6
    assert again.processor.image_size == size


def test_relative_positions_are_not_interpolated(make_towers: Make, vision_tower: Callable[[str], Any]) -> None:
    model = make_towers(vision_tower("beit"), image_size=32)
    before = model.fingerprint()
    with pytest.raises(ModelError, match=r"relative_position_bias_table holds relative positions"):
        model.resize(image_size=48, context_length=60)
    assert model.fingerprint() == before  # the text side was not touched either


def test_longer_than_a_bert(
    make_towers: Make, images: Images, texts: list[str], tmp_path: Path, reopen: Reopen
) -> None:
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = RobertaModel(RobertaConfig(**size, vocab_size=200, pad_token_id=0, max_position_embeddings=25))
    model = make_towers(text=text)
    assert model.processor.context_length == 24  # row 0 is the padding's
    table = text.embeddings.position_embeddings.weight.detach().clone()
    model.resize(context_length=48)
    longer = text.embeddings.position_embeddings.weight
    assert torch.equal(longer[0], table[0])
    assert torch.allclose(longer[1], table[1])
    assert longer.shape == (49, 32)
    expected = embeddings(model, images, texts)
    assert (embeddings(reopen(model, tmp_path / "saved"), images, texts) - expected).abs().max() <= 1e-6


def test_rotary_positions_end_where_they_end(make_towers: Make, texts: list[str]) -> None:
    from transformers import ModernBertConfig, ModernBertModel

    tokens = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = ModernBertModel(ModernBertConfig(**size, **tokens, vocab_size=200, max_position_embeddings=64))
    model = make_towers(text=text, context_length=20)
    assert model.resize(context_length=64).processor.texts(texts)["input_ids"].shape[1] > 20
    with pytest.raises(ModelError, match=r"rotary or relative(?s:.)*context_length=64 or less"):
        model.resize(context_length=65)


def test_what_cannot_be_resized_is_said(towers: DualEncoder) -> None:
    with pytest.raises(UsageError, match="resize to what"):
        towers.resize()
    with pytest.raises(UsageError, match="at least 1"):
        towers.resize(image_size=-3)
    with pytest.raises(ModelError, match="image size cannot be changed"):
        towers.resize(image_size=4)  # less than a patch
    with pytest.raises(UsageError, match="LoRA cannot be resized"):
        towers.add_lora("image", rank=2).resize(image_size=64)


def test_open_clip_cannot_open_a_resized_tower_of_timm(open_clip_arch: Callable[..., str]) -> None:
    import open_clip

    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    arch = open_clip_arch("tiny-timm-resize", vision_cfg=vision)
    made, _, preprocess = open_clip.create_model_and_transforms(arch)
    model = DualEncoder.from_open_clip(made, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    with pytest.raises(ModelError, match=r"builds towers of timm for one size(?s:.)*from_towers"):
        model.resize(image_size=96)


def test_training_goes_on_after_it(any_model: DualEncoder, images: Images, texts: list[str]) -> None:
    any_model.resize(image_size=2 * any_model.processor.image_size).train()
    out = any_model(pixel_values=any_model.processor.images(images), **any_model.processor.texts(texts))
    (out.image @ out.text.T).sum().backward()
    name, _ = positions(any_model, "image")
    gradient = any_model.backend.get_parameter(name).grad
    assert gradient is not None
    assert math.isfinite(gradient.abs().sum())
    assert gradient.abs().sum() > 0
