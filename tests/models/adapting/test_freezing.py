"""Frozen blocks and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import ModelError, UsageError
from clipkit.models.backends.layers import parameters_by_depth, transformer_blocks
from clipkit.models.dual_encoder import DualEncoder

Images = list[Image.Image]
Make = Callable[..., DualEncoder]
Towers = Callable[[str], Any]


def inputs(model: DualEncoder, images: Images, texts: list[str]) -> dict[str, Tensor]:
    return {"pixel_values": model.processor.images(images), **model.processor.texts(texts)}


def step(model: DualEncoder, images: Images, texts: list[str]) -> set[str]:
    """One step of training; gives the names of what moved."""
    before = {name: tensor.clone() for name, tensor in model.backend.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    out = model(**inputs(model, images, texts))
    (out.scale * (out.image @ out.text.T)).log_softmax(1).diagonal().sum().backward()
    optimizer.step()
    return {name for name, tensor in model.backend.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("part", ["image", "text"])
def test_the_first_block_and_what_lies_before_it_stand_still(
    any_model: DualEncoder, part: Any, images: Images, texts: list[str]
) -> None:
    found = parameters_by_depth(any_model.backend, any_model.processor, part)
    any_model.freeze(part, blocks=1)
    moved = step(any_model, images, texts)
    assert not moved & {*found.before, *found.blocks[0]}
    # key biases have no gradient under softmax, and unread weights none at all
    assert {n for n in found.blocks[1] if n.endswith("weight")} <= moved
    first, second = transformer_blocks(any_model.backend, part)
    assert not any(module.training for module in first.modules())
    assert second.training
    any_model.eval().train()
    assert not first.training


def test_negative_blocks_count_from_the_end(towers: DualEncoder) -> None:
    found = parameters_by_depth(towers.backend, towers.processor, "text")
    read = {name for name, p in towers.backend.named_parameters() if p.requires_grad}
    towers.freeze("text", blocks=-2)  # nothing but what lies before the two
    trained = {name for name, p in towers.backend.named_parameters() if p.requires_grad}
    assert read - trained == set(found.before) & read
    towers.freeze("text", blocks=2)
    assert not any(
        towers.backend.belongs_to("text", n, head=False)
        for n, p in towers.backend.named_parameters()
        if p.requires_grad
    )  # BERT has nothing after its blocks but the pooler, which is not read
    assert not towers.backend.text.training


def test_blocks_that_do_not_exist_cannot_be_frozen(towers: DualEncoder) -> None:
    for count in (3, -3):
        with pytest.raises(UsageError, match=rf"blocks={count}, but the image tower has 2 blocks"):
            towers.freeze("image", blocks=count)
    with pytest.raises(UsageError, match="head=True locks a head on a whole tower"):
        towers.freeze("image", head=True, blocks=1)
    with pytest.raises(UsageError, match="found 'vision'"):
        towers.freeze("vision")  # type: ignore[arg-type]
    assert all(p.requires_grad for n, p in towers.named_parameters() if "pooler" not in n)


def test_statistics_of_frozen_stages_stand_still(
    make_towers: Make, vision_tower: Towers, images: Images, texts: list[str]
) -> None:
    model = make_towers(vision_tower("mobilenetv2_035")).freeze("image", blocks=3)
    moved = {name for name in step(model, images, texts) if "running" in name}
    kept = {name for name, _ in model.backend.named_buffers() if "running_mean" in name} - moved
    assert {name.split(".")[2] for name in kept} == {"bn1", "blocks"}
    assert all(int(name.split(".")[3]) < 3 for name in kept if "blocks" in name)
    assert {int(name.split(".")[3]) for name in moved if "blocks" in name} == {3, 4, 5, 6}


# -- gradient checkpointing ---------------------------------------------------------------------


def gradients(model: DualEncoder, images: Images, texts: list[str]) -> tuple[dict[str, Tensor], int]:
    """Of a loss with dropout on, and how many times the first image block was computed."""
    calls: list[int] = []
    block = transformer_blocks(model.backend, "image")[0]
    inner = next(module for module in block.modules() if not list(module.children()))  # inside what is checkpointed
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    model.train().zero_grad()
    torch.manual_seed(3)
    out = model(**inputs(model, images, texts))
    (out.scale * (out.image @ out.text.T)).log_softmax(1).diagonal().sum().backward()
    handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(calls)


def with_dropout(model: DualEncoder) -> DualEncoder:
    for module in model.modules():
        for name in ("dropout", "dropout_prob", "attention_dropout"):  # of attention, wherever it is a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    return model


def test_checkpointing_changes_no_gradient(any_model: DualEncoder, images: Images, texts: list[str]) -> None:
    with_dropout(any_model)
    plain, once = gradients(any_model, images, texts)
    same, twice = gradients(any_model.gradient_checkpointing(), images, texts)
    off, again = gradients(any_model.gradient_checkpointing(False), images, texts)
    assert (once, twice, again) == (1, 2, 1)
    assert plain.keys() == same.keys() == off.keys()
    for name, expected in plain.items():
        assert (same[name] - expected).abs().max() <= 1e-6, name


def test_dropout_is_drawn_in_these_gradients(any_model: DualEncoder, images: Images, texts: list[str]) -> None:
    for module in any_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, _ = gradients(any_model, images, texts)
    dropped, _ = gradients(with_dropout(any_model), images, texts)
    for part in ("image", "text"):
        names = [n for n in plain if any_model.backend.belongs_to(part, n.removeprefix("backend."))]
        assert any(not torch.equal(plain[n], dropped[n]) for n in names)


def test_checkpointing_behind_frozen_blocks(any_model: DualEncoder, images: Images, texts: list[str]) -> None:
    any_model.freeze("image", blocks=1).freeze("text", blocks=1)
    plain, _ = gradients(any_model, images, texts)
    same, _ = gradients(any_model.gradient_checkpointing(), images, texts)
    assert plain.keys() == same.keys()
    assert max(float((same[name] - plain[name]).abs().max()) for name in plain) <= 1e-6


def test_towers_that_cannot_are_refused_unless_they_stand_still(make_towers: Make, vision_tower: Towers) -> None:
    model = make_towers(vision_tower("mobilenetv2_035"))
    with pytest.raises(ModelError, match="BatchNorm, whose statistics"):
        model.gradient_checkpointing()
    model.freeze("image").gradient_checkpointing()
    model = make_towers(vision_tower("convnext"))
    with pytest.raises(ModelError, match=r"image tower \(ConvNextModel\) has no gradient checkpointing"):
        model.gradient_checkpointing()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.backend.text.modules())
