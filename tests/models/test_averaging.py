"""Weight arithmetic against arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit import average, interpolate
from clipkit.errors import ModelError, UsageError
from clipkit.models.dual_encoder import DualEncoder

Images = list[Image.Image]
Make = Callable[..., DualEncoder]
Reopen = Callable[[DualEncoder, Path], DualEncoder]


def shaken(model: DualEncoder, seed: int, by: float = 0.1) -> DualEncoder:
    """A copy with other weights, as after fine-tuning."""
    twin = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += by * torch.randn_like(parameter)
    return twin


def test_the_ends_are_the_models_themselves(any_model: DualEncoder, images: Images) -> None:
    tuned = shaken(any_model, 1)
    assert interpolate(any_model, tuned, 0).fingerprint().difference(any_model.fingerprint()) == []
    assert interpolate(any_model, tuned, 1).fingerprint().difference(tuned.fingerprint()) == []
    half = interpolate(any_model, tuned, 0.5)
    assert not torch.equal(half.encode_images(images), any_model.encode_images(images))
    assert not half.training


def test_between_them_lies_a_straight_line(any_model: DualEncoder, tmp_path: Path, reopen: Reopen) -> None:
    tuned = shaken(any_model, 1)
    found = interpolate(any_model, tuned, 0.3)
    mine, theirs = any_model.backend.state_dict(), tuned.backend.state_dict()
    for name, tensor in found.backend.state_dict().items():
        if tensor.is_floating_point():
            exact = 0.7 * mine[name].numpy().astype(np.float64) + 0.3 * theirs[name].numpy().astype(np.float64)
            assert np.array_equal(tensor.numpy(), exact.astype(np.float32)), name
    scale = 0.7 * any_model.logit_scale.detach().double() + 0.3 * tuned.logit_scale.detach().double()
    assert found.logit_scale.item() == scale.float().item()  # of the logarithm
    again = reopen(found, tmp_path / "saved")
    assert again.fingerprint().difference(found.fingerprint()) == []


def test_a_soup_is_the_mean(towers: DualEncoder) -> None:
    models = [shaken(towers, seed) for seed in range(3)]
    soup = average(models)
    states = [model.backend.state_dict() for model in models]
    for name, tensor in soup.backend.state_dict().items():
        if tensor.is_floating_point():
            exact = sum(state[name].double() for state in states) / 3
            assert (tensor.double() - exact).abs().max() < 1e-7
    assert average([towers]).fingerprint() == towers.fingerprint()
    assert [m.fingerprint().hash for m in models] == [shaken(towers, seed).fingerprint().hash for seed in range(3)]
    with pytest.raises(UsageError, match="no models"):
        average([])


def test_many_small_differences_are_not_lost(towers: DualEncoder) -> None:
    models = [copy.deepcopy(towers) for _ in range(64)]
    with torch.no_grad():
        for index, model in enumerate(models):
            model.logit_scale.fill_(16.0 + (2.0**-20 if index else 0.0))
    assert average(models).logit_scale.item() == np.float32(16 + 63 / 64 * 2.0**-20)


def test_integers_stay_and_statistics_lie_between(
    make_towers: Make, vision_tower: Callable[[str], Any], images: Images
) -> None:
    start = make_towers(vision_tower("mobilenetv2_035"))
    tuned = copy.deepcopy(start).train()
    tuned(pixel_values=tuned.processor.images(images))
    half = interpolate(start, tuned.eval(), 0.5).backend.state_dict()
    name = "vision.timm_model.bn1.running_mean"
    mean = (start.backend.state_dict()[name] + tuned.backend.state_dict()[name]) / 2
    assert torch.allclose(half[name], mean)
    assert half["vision.timm_model.bn1.num_batches_tracked"] == 0
    assert tuned.backend.state_dict()["vision.timm_model.bn1.num_batches_tracked"] == 1


def test_lora_is_merged_first(towers: DualEncoder, images: Images) -> None:
    tuned = copy.deepcopy(towers).add_lora("image", rank=2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    end = interpolate(towers, tuned, 1.0)
    assert (end.encode_images(images) - tuned.encode_images(images)).abs().max() < 1e-5
    assert end.lora is None
    assert tuned.lora is not None
    assert interpolate(tuned, towers, 1.0).fingerprint() == towers.fingerprint()


def test_models_that_differ_are_refused_by_the_first_difference(
    make_towers: Make, clip_folder: Path, siglip_folder: Path
) -> None:
    plain, mlp, biased = make_towers(), make_towers(head="mlp"), make_towers(logit_bias=-10.0)
    with pytest.raises(ModelError, match=r"differ in the weight image_head\.weight: \(12, 32\) and missing"):
        interpolate(plain, mlp, 0.5)
    with pytest.raises(ModelError, match=r"differ in the weight logit_bias: missing and \(\)"):
        average([plain, plain, biased])
    with pytest.raises(ModelError, match=r"text\.context_length: 77 and 40"):
        interpolate(plain, make_towers(context_length=40), 0.5)
    with pytest.raises(ModelError, match=r"image\.mean: .*0\.1"):
        interpolate(plain, make_towers(image_mean=[0.1] * 3), 0.5)
    with pytest.raises(ModelError, match="differ in the weight"):
        interpolate(DualEncoder.from_pretrained(clip_folder), DualEncoder.from_pretrained(siglip_folder), 0.5)
    resized = copy.deepcopy(plain).resize(image_size=64)
    with pytest.raises(ModelError, match=r"position_embeddings: \(1, 17, 32\) and \(1, 65, 32\)"):
        interpolate(plain, resized, 0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_lies_between_0_and_1(towers: DualEncoder, alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha goes from 0"):
        interpolate(towers, towers, alpha)
