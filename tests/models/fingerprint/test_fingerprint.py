from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from clipkit.modality import MODALITIES
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint import fingerprint as module
from clipkit.models.fingerprint.fingerprint import Fingerprint, hash_weights, settings_fingerprint

Make = Callable[..., DualEncoder]


def test_the_same_model_has_the_same_fingerprint(make_towers: Make) -> None:
    one, other = make_towers().fingerprint(), make_towers().fingerprint()
    assert one.hash == other.hash
    assert len(one.hash) == 16
    assert one.difference(other) == []
    assert Fingerprint.from_dict(json.loads(json.dumps(one.as_dict()))).hash == one.hash


def test_each_difference_is_named(make_towers: Make) -> None:
    one = make_towers().fingerprint()
    changed = {
        "image mean": make_towers(image_mean=(0.1, 0.2, 0.3)),
        "image resize": make_towers(resize="shortest"),
        "image head": make_towers(head="mlp"),
        "text pooling": make_towers(text_pooling="last"),
        "text context length": make_towers(context_length=9),
        "logit scale (its logarithm)": make_towers(logit_scale=1.0),
        "logit bias": make_towers(logit_bias=1.0),
    }
    for key, model in changed.items():
        other = model.fingerprint()
        assert other.hash != one.hash
        assert any(line.startswith(f"{key}: ") for line in one.difference(other)), key


def test_a_sides_hash_follows_that_side_alone(towers: DualEncoder) -> None:
    before = towers.fingerprint()
    with torch.no_grad():
        towers.backend.text_head.weight[0, 0] += 1e-3
        towers.logit_scale.add_(1)
    after = towers.fingerprint()
    assert after.image == before.image
    assert after.text != before.text
    assert [line.split(":")[0] for line in before.difference(after)] == ["logit scale (its logarithm)", "text weights"]


def test_names_shapes_and_types_are_part_of_the_hash() -> None:
    ones = torch.ones(4)
    others = [{"b": ones}, {"a": ones.view(2, 2)}, {"a": ones.int()}, {"a": ones + 1e-7}]
    hashes = {hash_weights(weights) for weights in [{"a": ones}, *others]}
    assert len(hashes) == 5
    assert hash_weights({"a": ones, "b": ones}) == hash_weights({"b": ones, "a": ones})
    assert hash_weights({"a": torch.tensor(1), "b": torch.ones(3, 2).T}) == hash_weights(
        {"a": torch.tensor(1), "b": torch.ones(2, 3)}
    )


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is remembered of other tests; how many tensors went through each SHA-256."""
    counts: list[int] = []
    original = module.sha256

    def counting(weights: dict[str, torch.Tensor]) -> str:
        counts.append(len(weights))
        return original(weights)

    monkeypatch.setattr(module, "sha256", counting)
    monkeypatch.setattr(module, "_hashed", {})
    return counts


def step(model: DualEncoder) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32), **model.processor.texts(["a cat", "two dogs"])}
    found = model(**inputs)
    (found.scale * found.image @ found.text.T).logsumexp(1).sum().backward()
    optimizer.step()


@torch.no_grad()
def in_place(model: DualEncoder) -> None:
    model.backend.image_head.weight.mul_(1.01)


def through_data(model: DualEncoder) -> None:
    version = model.backend.image_head.weight._version
    model.backend.image_head.weight.data.add_(1)
    assert model.backend.image_head.weight._version == version  # torch itself does not see it


def rows_swapped(model: DualEncoder) -> None:
    weight = model.backend.image_head.weight.data
    weight.copy_(weight.flip(0).clone())  # a sum would not see it


def through_numpy(model: DualEncoder) -> None:
    model.backend.image_head.weight.detach().numpy()[0, 0] += 1


def loaded(model: DualEncoder) -> None:
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})


def lora_added(model: DualEncoder) -> None:
    model.add_lora("image", rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)


def lora_merged(model: DualEncoder) -> None:
    lora_added(model)
    model.merge_lora()


def statistics(model: DualEncoder) -> None:
    model.backend.image_head.register_buffer("running_mean", torch.zeros(4))
    model.fingerprint()
    model.backend.image_head.running_mean.add_(1)


CHANGES: list[Callable[[DualEncoder], object]] = [
    step,
    in_place,
    through_data,
    rows_swapped,
    through_numpy,
    loaded,
    lora_added,
    lora_merged,
    statistics,
    lambda model: model.to(torch.bfloat16).to(torch.float32),
    lambda model: model.double(),
    lambda model: model.resize(image_size=48),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_is_hashed_once_and_no_change_is_missed(
    change: Callable[[DualEncoder], object], towers: DualEncoder, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = towers.fingerprint()
    assert towers.fingerprint() == before
    assert len(hashed) == len(MODALITIES)
    change(towers)
    after = towers.fingerprint()
    assert after.record["image"]["weights"] != before.record["image"]["weights"]
    once = len(hashed)
    assert towers.fingerprint() == after
    assert len(hashed) == once
    monkeypatch.setattr(module, "_hashed", {})
    assert towers.fingerprint() == after


def test_a_step_of_one_tower_leaves_the_other_hashed(towers: DualEncoder, hashed: list[int]) -> None:
    towers.fingerprint()
    with torch.no_grad():
        towers.backend.text_head.weight.add_(1)
    towers.fingerprint()
    assert len(hashed) == len(MODALITIES) + 1


def test_what_is_remembered_does_not_grow(hashed: list[int]) -> None:
    for number in range(module._REMEMBERED + 5):
        hash_weights({"a": torch.tensor([number])})
    assert len(module._hashed) == module._REMEMBERED


PROGRAM = """
import sys, torch
from clipkit import DualEncoder
for threads in (1, 3):
    torch.set_num_threads(threads)
    print(DualEncoder.from_pretrained(sys.argv[1]).fingerprint().hash)
"""


def test_it_is_the_same_in_another_process_and_with_other_threads(clip_folder: Path) -> None:
    here = DualEncoder.from_pretrained(clip_folder).fingerprint().hash
    command = [sys.executable, "-c", PROGRAM, str(clip_folder)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert there == [here, here]


def test_float_noise_does_not_move_the_facts(any_model: DualEncoder) -> None:
    before = settings_fingerprint(any_model.backend, any_model.processor)
    with torch.no_grad():
        for name, parameter in any_model.named_parameters():
            if not name.endswith(("logit_scale", "logit_bias")):
                parameter.mul_(1 + 1e-6)
    after = settings_fingerprint(any_model.backend, any_model.processor)
    assert before.difference(after) == []
    assert settings_fingerprint(any_model.backend.double(), any_model.processor).difference(before) == []


def test_all_backends_have_the_same_keys(
    make_towers: Make, clip_folder: Path, siglip_folder: Path, open_clip_arch: Callable[..., str]
) -> None:
    arch = open_clip_arch("tiny-keys")
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    models = [
        make_towers(),
        DualEncoder.from_pretrained(clip_folder),
        DualEncoder.from_pretrained(siglip_folder),
        DualEncoder.from_open_clip(model, preprocess, open_clip.get_tokenizer(arch), arch=arch),
    ]
    keys = [{key: set(value) for key, value in m.fingerprint().record.items() if key in MODALITIES} for m in models]
    assert all(each == keys[0] for each in keys)


def test_measuring_changes_nothing(any_model: DualEncoder) -> None:
    any_model.train()
    state, random = {n: t.clone() for n, t in any_model.state_dict().items()}, torch.get_rng_state()
    any_model.fingerprint()
    assert all(module.training for module in any_model.modules())
    assert all(torch.equal(t, state[n]) for n, t in any_model.state_dict().items())
    assert all(p.grad is None for p in any_model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
