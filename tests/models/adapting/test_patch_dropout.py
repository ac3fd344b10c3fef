"""Patch dropout: fewer patches in training, none less in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import ModelError, UsageError
from clipkit.models.adapting.patch_dropout import PatchDropout
from clipkit.models.backends.layers import transformer_blocks
from clipkit.models.dual_encoder import DualEncoder

Images = list[Image.Image]
Make = Callable[..., DualEncoder]


def tokens_seen(model: DualEncoder, pixels: Tensor) -> Tensor:
    """What the first block is given: (n, tokens, width)."""
    seen: list[Tensor] = []
    handle = transformer_blocks(model.backend, "image")[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model.vision_features(pixels)
    handle.remove()
    return seen[0]


def test_half_of_the_patches_are_left_in_training_and_all_in_eval(any_model: DualEncoder, images: Images) -> None:
    pixels = any_model.processor.images(images)
    before = any_model.encode_images(images)
    whole = tokens_seen(any_model, pixels).shape[1]
    any_model.patch_dropout(0.5)
    assert torch.equal(any_model.encode_images(images), before)
    any_model.train()
    prefix = 0 if any_model.backend.family == "siglip" else 1
    assert tokens_seen(any_model, pixels).shape[1] == prefix + (whole - prefix) // 2
    assert torch.equal(any_model.encode_images(images), before)
    any_model.patch_dropout(0.75)
    assert tokens_seen(any_model, pixels).shape[1] == prefix + (whole - prefix) // 4
    any_model.patch_dropout(0)
    assert tokens_seen(any_model, pixels).shape[1] == whole


def test_replayed_random_numbers_give_the_same_patches(any_model: DualEncoder, images: Images) -> None:
    pixels = any_model.patch_dropout(0.5).train().processor.images(images)
    for module in any_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)
    first, other = any_model.vision_features(pixels), any_model.vision_features(pixels)
    torch.manual_seed(1)
    assert torch.equal(any_model.vision_features(pixels), first)
    assert not torch.equal(other, first)


def test_kept_patches_are_whole_in_order_and_differ_between_images() -> None:
    tower = torch.nn.Identity().train()
    tokens = torch.arange(40.0).repeat(3, 1).unsqueeze(-1).expand(-1, -1, 2)
    torch.manual_seed(0)
    kept = PatchDropout(0.7, 4, tower).keep(tokens)
    assert kept.shape == (3, 4 + 10, 2)
    assert torch.equal(kept[:, :4], tokens[:, :4])
    assert torch.equal(kept[..., 0], kept[..., 1])
    assert (kept[:, 1:, 0] > kept[:, :-1, 0]).all()
    assert not torch.equal(kept[0], kept[1])
    assert PatchDropout(0.99, 0, tower).keep(tokens).shape[1] == 1  # never none at all


def test_every_patch_is_left_out_equally_often() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(16.0).repeat(4000, 1).unsqueeze(-1)
    counts = PatchDropout(0.5, 0, torch.nn.Identity()).keep(tokens).flatten().long().bincount(minlength=16)
    assert (counts / 4000 - 0.5).abs().max() < 0.04


def test_a_frozen_tower_sees_everything_and_frozen_blocks_do_not(towers: DualEncoder, images: Images) -> None:
    pixels = towers.processor.images(images)
    part = copy.deepcopy(towers).patch_dropout(0.5).freeze("image", blocks=1).train()
    assert tokens_seen(part, pixels).shape[1] == 9
    locked = towers.patch_dropout(0.5).freeze("image").train()
    assert tokens_seen(locked, pixels).shape[1] == 17


def test_a_copy_drops_for_itself(towers: DualEncoder, images: Images) -> None:
    pixels = towers.processor.images(images)
    twin = copy.deepcopy(towers.patch_dropout(0.5))
    twin.patch_dropout(0).train()
    towers.train()
    assert tokens_seen(twin, pixels).shape[1] == 17
    assert tokens_seen(towers, pixels).shape[1] == 9


def test_gradients_with_checkpointing_are_those_without(any_model: DualEncoder, images: Images) -> None:
    pixels = any_model.processor.images(images)

    def gradients(model: DualEncoder) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        model.train().vision_features(pixels).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(any_model.patch_dropout(0.5))
    same = gradients(any_model.gradient_checkpointing())
    assert plain.keys() == same.keys()
    assert max(float((same[name] - plain[name]).abs().max()) for name in plain) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("swin", "cannot do without some of its patches"),
        ("beit", "cannot do without some of its patches"),
        ("dinov3", "positions or masks besides the tokens"),
        ("convnext", "not a transformer over patches"),
        ("mobilenetv2_035", "not a transformer over patches"),
    ],
)
def test_towers_that_need_every_patch_are_refused(
    make_towers: Make, vision_tower: Callable[[str], Any], kind: str, words: str, images: Images
) -> None:
    model = make_towers(vision_tower(kind), image_size=32)
    with pytest.raises(ModelError, match=words):
        model.patch_dropout(0.5)
    assert model.patch_dropout(0) is model
    model.train().vision_features(model.processor.images(images))


def test_registers_stay(make_towers: Make) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = make_towers(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size))).patch_dropout(0.5)
    assert model._patches is not None
    assert model._patches.prefix == 5


def test_open_clips_own_is_replaced(open_clip_arch: Callable[..., str], images: Images) -> None:
    import open_clip

    vision = {"image_size": 48, "layers": 2, "width": 32, "patch_size": 12, "head_width": 16, "patch_dropout": 0.5}
    arch = open_clip_arch("tiny-flip", vision_cfg=vision)
    made, _, preprocess = open_clip.create_model_and_transforms(arch)
    model = DualEncoder.from_open_clip(made, preprocess, open_clip.get_tokenizer(arch), arch=arch).train()
    pixels = model.processor.images(images)
    assert tokens_seen(model, pixels).shape[1] == 9
    assert tokens_seen(model.patch_dropout(0.25), pixels).shape[1] == 13
    assert tokens_seen(model.patch_dropout(0), pixels).shape[1] == 17


@pytest.mark.parametrize("rate", [1, -0.1, 2.0])
def test_a_rate_is_a_part(towers: DualEncoder, rate: float) -> None:
    with pytest.raises(UsageError, match="part of the patches"):
        towers.patch_dropout(rate)
