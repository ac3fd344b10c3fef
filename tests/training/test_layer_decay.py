"""Learning rates that fall with depth."""

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from clipkit import TrainConfig
from clipkit.errors import ConfigError
from clipkit.training.optim import layer_factors, parameter_groups


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    import tiny

    from clipkit import DualEncoder

    base = tiny.make_model()
    tower = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(config)
    return DualEncoder.from_towers(
        model.vision_model, base.backend.text, base.processor.text_side.tokenizer, dim=16, context_length=8
    )


def test_factors_by_depth(clip):
    found = layer_factors(clip, 0.5)
    of = {name.removeprefix("backend.vision."): factor for name, factor in found.items() if ".vision." in name}
    assert of["embeddings.patch_embedding.weight"] == of["embeddings.position_embedding.weight"] == 0.5**4
    assert [of[f"encoder.layers.{i}.mlp.fc1.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert "post_layernorm.weight" not in of
    text = {name: factor for name, factor in found.items() if ".text." in name}
    assert text["backend.text.embeddings.word_embeddings.weight"] == 0.25  # one block


def test_groups_carry_the_rates(clip):
    names = {id(each): name for name, each in clip.named_parameters()}
    config = TrainConfig("x", learning_rate=1e-4, head_learning_rate=1e-3, scale_learning_rate=1e-2, layer_decay=0.5)
    rates = {names[id(p)]: (g["peak"], g["weight_decay"]) for g in parameter_groups(clip, config) for p in g["params"]}
    assert rates["backend.vision.encoder.layers.0.mlp.fc1.weight"] == (pytest.approx(1e-4 / 8), 0.1)
    assert rates["backend.vision.encoder.layers.0.mlp.fc1.bias"] == (pytest.approx(1e-4 / 8), 0)
    assert rates["backend.vision.post_layernorm.weight"] == (1e-4, 0)
    assert rates["backend.image_head.weight"] == (1e-3, 0.1)  # fresh
    assert rates["backend.logit_scale"] == (1e-2, 0)
    assert rates.keys() == {name for name, each in clip.named_parameters() if each.requires_grad}
    plain = parameter_groups(clip, TrainConfig("x", layer_decay=1.0))
    assert len(plain) == len(parameter_groups(clip, TrainConfig("x")))


def test_a_frozen_tower_needs_no_blocks(clip, monkeypatch):
    from clipkit.errors import ModelError, UsageError
    from clipkit.training import optim

    def none(backend, processor, part):
        raise ModelError(f"the {part} tower has no list of blocks")

    monkeypatch.setattr(optim, "layers", none)
    with pytest.raises(UsageError, match=r"no list of blocks(?s:.)*leave out layer_decay"):
        layer_factors(clip, 0.5)


def test_what_is_no_factor_is_refused():
    for value in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="layer_decay is a factor"):
            TrainConfig("x", layer_decay=value)
