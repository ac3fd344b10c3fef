"""Rates by depth, decay where it belongs, and the temperature left to itself."""

import logging

import pytest
import tiny
import torch

from clipkit import TrainConfig, Trainer
from clipkit.errors import UsageError
from clipkit.training.optimizer import build_optimizer, layer_factors, parameter_groups


def make_model():
    """Towers of three and two blocks; as after loading a model, nothing in it is fresh."""
    model = tiny.make_model(layers=(3, 2))
    model.fresh = frozenset()
    return model


def rates(model, **settings):
    """Name of each trained parameter -> (learning rate, weight decay)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, TrainConfig("x", learning_rate=1.0, **settings))
    pairs = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(pairs) == len(dict(pairs)) == sum(parameter.requires_grad for parameter in model.parameters())
    return dict(pairs)


def test_each_block_learns_slower_than_the_next():
    group_of = rates(make_model(), layer_decay=0.5, scale_learning_rate=3.0)
    expected = {
        "vision.embeddings.patch_embeddings.projection.weight": 0.125,
        "vision.embeddings.position_embeddings": 0.125,
        "vision.layers.0.mlp.fc1.weight": 0.25,
        "vision.layers.1.layernorm_before.bias": 0.5,
        "vision.layers.2.mlp.fc1.weight": 1,
        "vision.layernorm.weight": 1,
        "image_head.weight": 1,
        "text.embeddings.word_embeddings.weight": 0.25,
        "text.embeddings.LayerNorm.weight": 0.25,
        "text.encoder.layer.0.output.dense.weight": 0.5,
        "text.encoder.layer.1.output.dense.weight": 1,
        "text_head.weight": 1,
        "logit_scale": 3,
    }
    assert {name: group_of[f"backend.{name}"][0] for name in expected} == expected
    assert {rate for rate, _ in group_of.values()} == {0.125, 0.25, 0.5, 1, 3}
    plain = rates(make_model(), scale_learning_rate=3.0)
    assert {name: decay for name, (_, decay) in group_of.items()} == {name: decay for name, (_, decay) in plain.items()}


def test_a_decay_of_one_changes_nothing():
    assert rates(make_model(), layer_decay=1.0) == rates(make_model())


def test_frozen_blocks_count_and_frozen_towers_are_left_alone():
    model = make_model().freeze("image", blocks=2).freeze("text")
    group_of = {name: rate for name, (rate, _) in rates(model, layer_decay=0.5).items()}
    assert {rate for name, rate in group_of.items() if ".vision." in name} == {1}
    model = make_model().freeze("text")
    model.freeze("image", blocks=1)
    group_of = {name: rate for name, (rate, _) in rates(model, layer_decay=0.5).items()}
    assert {rate for name, rate in group_of.items() if ".layers.1." in name} == {0.5}
    assert not [name for name in group_of if ".text." in name]


def test_lora_decays_with_the_block_that_it_adapts():
    model = make_model().add_lora("image")
    group_of = rates(model, layer_decay=0.5, head_learning_rate=8.0)
    for block, rate in enumerate((2, 4, 8)):
        own = {rate for name, (rate, _) in group_of.items() if f".layers.{block}." in name and "lora" in name}
        assert own == {rate}


def test_fresh_weights_learn_at_their_own_rate():
    model = make_model()
    model.fresh = frozenset(name for name, _ in model.named_parameters() if "head" in name)
    group_of = rates(model, layer_decay=0.5, head_learning_rate=8.0)
    assert group_of["backend.image_head.weight"][0] == 8
    model.fresh = frozenset(name for name, _ in model.named_parameters())
    with pytest.raises(UsageError, match=r"towers that train from pretrained weights, and there is none"):
        layer_factors(model, 0.5)


def test_a_tower_without_blocks_is_refused_before_the_run(tmp_path):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Linear(3 * 16 * 16, 16)

    model = make_model()
    model.backend.vision = Flat()
    settings = TrainConfig(str(tmp_path / "run"), batch_size=8, layer_decay=0.5, progress=False)
    with pytest.raises(UsageError, match=r"the image tower has no list of blocks(?s:.)*layer_decay(?s:.)*leave it out"):
        Trainer(model, tiny.make_pairs(), settings)


def test_a_loaded_temperature_is_kept_and_never_decayed():
    """Radford et al. 2021 clip it at 100; at CLIP's 100 plain decay would be 80 after 10,000 steps."""
    model = make_model()
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    optimizer = build_optimizer(model, TrainConfig("x", learning_rate=1e-2, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    head = model.backend.image_head.weight.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert float(model.logit_scale.detach()) == 4.0
    assert torch.allclose(model.backend.image_head.weight, head * (1 - 0.005) ** 3)


def test_tokens_and_positions_are_not_decayed():
    group_of = rates(make_model())
    for name in ("vision.embeddings.cls_token", "vision.embeddings.position_embeddings"):
        assert group_of[f"backend.{name}"][1] == 0
    assert group_of["backend.text.embeddings.position_embeddings.weight"][1] == 0
    assert group_of["backend.text.embeddings.word_embeddings.weight"][1] > 0
    assert {decay for name, (_, decay) in group_of.items() if name.endswith("bias")} == {0}


def test_the_groups_are_counted_in_the_log_and_the_steps_go_by_depth(tmp_path, caplog):
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TrainConfig(
        str(tmp_path / "run"), batch_size=8, max_steps=1, layer_decay=0.1, learning_rate=1e-3, eps=1e-12, progress=False
    )
    with caplog.at_level(logging.INFO, logger="clipkit"):
        Trainer(model, tiny.make_pairs(), settings).train()
    groups = len(parameter_groups(model, settings))
    assert f"layer_decay 0.1: {groups} groups of parameters, at learning rates from 1e-06 to 0.001" in caplog.text
    # Adam's first step is the learning rate for every weight with a gradient
    for block, rate in enumerate((1e-5, 1e-4, 1e-3)):
        name = f"backend.vision.layers.{block}.mlp.fc1.bias"
        moved = (dict(model.named_parameters())[name].detach() - before[name]).abs().max()
        assert float(moved) == pytest.approx(rate, rel=1e-2)
