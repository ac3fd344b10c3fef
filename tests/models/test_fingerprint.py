from __future__ import annotations

import json
from collections.abc import Callable

import torch

from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.fingerprint import Fingerprint, hash_weights

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
