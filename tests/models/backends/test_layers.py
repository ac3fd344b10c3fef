"""The blocks of a tower are found by structure, and every parameter lies before, in, or after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clipkit.errors import ModelError
from clipkit.models.backends.layers import parameters_by_depth, transformer_blocks
from clipkit.models.dual_encoder import DualEncoder

Make = Callable[..., DualEncoder]


def text(kind: str) -> Any:
    import transformers as t

    if kind == "t5":
        return t.T5EncoderModel(t.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=200))
    return t.DistilBertModel(t.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=200))


def test_every_parameter_of_a_tower_has_one_place(any_model: DualEncoder) -> None:
    for part in ("image", "text"):
        found = parameters_by_depth(any_model.backend, any_model.processor, part)
        names = [*found.before, *(name for block in found.blocks for name in block), *found.after]
        owned = [
            n for n, _ in any_model.backend.named_parameters() if any_model.backend.belongs_to(part, n, head=False)
        ]
        assert sorted(names) == sorted(owned)
        assert len(found.blocks) == len(transformer_blocks(any_model.backend, part)) == 2
        assert any("position" in name for name in found.before)
        assert not any("position" in name for name in found.after)
        assert all(p.requires_grad for n, p in any_model.backend.named_parameters() if n in found.before)


def test_what_open_clip_registers_early_is_used_late(open_clip_arch: Callable[..., str]) -> None:
    import open_clip

    arch = open_clip_arch("tiny-order")
    made, _, preprocess = open_clip.create_model_and_transforms(arch)
    model = DualEncoder.from_open_clip(made, preprocess, open_clip.get_tokenizer(arch), arch=arch)
    image, words = (parameters_by_depth(model.backend, model.processor, part) for part in ("image", "text"))
    assert image.before == [
        "model.visual.class_embedding",
        "model.visual.positional_embedding",
        "model.visual.conv1.weight",
        "model.visual.ln_pre.weight",
        "model.visual.ln_pre.bias",
    ]
    assert "model.visual.proj" in image.after
    assert words.before == ["model.positional_embedding", "model.token_embedding.weight"]
    assert words.after == ["model.text_projection", "model.ln_final.weight", "model.ln_final.bias"]


@pytest.mark.parametrize(
    ("kind", "count", "after"),
    [
        ("dinov2", 2, ["embeddings.mask_token", "layernorm.weight", "layernorm.bias"]),
        ("swin", 2, ["layernorm.weight", "layernorm.bias"]),
        ("convnext", 4, ["layernorm.weight", "layernorm.bias"]),
        ("resnet18", 4, []),
        (
            "mobilenetv2_035",
            7,
            ["timm_model.conv_head.weight", "timm_model.bn2.weight", "timm_model.bn2.bias"],
        ),
    ],
)
def test_stages_of_other_towers(
    make_towers: Make, vision_tower: Callable[[str], Any], kind: str, count: int, after: list[str]
) -> None:
    model = make_towers(vision_tower(kind))
    found = parameters_by_depth(model.backend, model.processor, "image")
    assert len(found.blocks) == count
    assert [name.removeprefix("vision.") for name in found.after] == after
    assert all(found.blocks)
    assert found.before


@pytest.mark.parametrize(("kind", "before"), [("t5", "text.shared.weight"), ("distilbert", "text.embeddings")])
def test_blocks_of_other_text_towers(make_towers: Make, kind: str, before: str) -> None:
    model = make_towers(text=text(kind))
    found = parameters_by_depth(model.backend, model.processor, "text")
    assert len(found.blocks) == 2
    assert all(name.startswith(before) for name in found.before)


def test_looking_leaves_the_model_as_it_was(towers: DualEncoder) -> None:
    towers.train().freeze("image", blocks=1)
    modes = [module.training for module in towers.modules()]
    trained = [p.requires_grad for p in towers.parameters()]
    state = torch.get_rng_state()
    parameters_by_depth(towers.backend, towers.processor, "image")
    assert [module.training for module in towers.modules()] == modes
    assert [p.requires_grad for p in towers.parameters()] == trained
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in towers.modules())


def test_a_tower_without_blocks_is_said_to_have_none(towers: DualEncoder) -> None:
    towers.backend.vision = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="image tower has no list of blocks"):
        transformer_blocks(towers.backend, "image")
