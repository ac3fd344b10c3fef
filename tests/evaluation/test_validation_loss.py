"""The loss on held-out pairs: its value, and what it does not depend on."""

import math

import pytest
import tiny
import torch
from torch.nn import functional as F

from clipkit.data.batches.plan import hash64
from clipkit.errors import DataError, UsageError
from clipkit.evaluation.validation_loss import ValidationLoss

make_model = tiny.make_model


@pytest.fixture(scope="module")
def pairs():
    return tiny.make_pairs()


def test_it_is_the_loss_of_clip(pairs):
    import open_clip

    model = make_model()
    images, texts = model.encode_images(pairs["image"]), model.encode_texts([each[0] for each in pairs["texts"]])
    found = ValidationLoss(pairs)
    wanted = open_clip.loss.ClipLoss()(images, texts, model.logit_scale.exp())
    assert found(model) == {"validation/loss": pytest.approx(float(wanted.detach()), rel=1e-5)}
    assert found.counts() == {"validation/pairs": 32, "validation/batches": 1}


def test_it_is_the_loss_of_siglip(pairs):
    import open_clip

    model = make_model(logit_bias=-3.0)
    images, texts = model.encode_images(pairs["image"]), model.encode_texts([each[0] for each in pairs["texts"]])
    wanted = open_clip.loss.SigLipLoss()(images, texts, model.logit_scale.exp(), model.logit_bias)
    assert ValidationLoss(pairs)(model)["validation/loss"] == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_batches_are_fixed_and_of_nearly_one_size(pairs):
    model = make_model()
    found = ValidationLoss(pairs, size=12, batch_size=5)
    assert found(model) == ValidationLoss(pairs, size=12, batch_size=64)(model)
    assert found.counts()["validation/batches"] == 3
    images, texts = model.encode_images(pairs["image"]), model.encode_texts([each[0] for each in pairs["texts"]])
    order = sorted(range(32), key=lambda row: hash64(0, row))
    logits = model.logit_scale.detach().exp() * images[order] @ texts[order].T
    parts = [logits[a:b, a:b] for a, b in ((0, 11), (11, 22), (22, 32))]
    losses = [
        (F.cross_entropy(x, torch.arange(len(x))) + F.cross_entropy(x.T, torch.arange(len(x)))) / 2 for x in parts
    ]
    wanted = sum(len(part) * loss for part, loss in zip(parts, losses, strict=True)) / 32
    assert found(model)["validation/loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_guess_costs_the_logarithm_of_the_batch(pairs):
    model = make_model()
    model.logit_scale.data.fill_(-50.0)
    assert ValidationLoss(pairs, size=8)(model)["validation/loss"] == pytest.approx(math.log(8), rel=1e-6)


def test_broken_images_are_left_out_where_that_is_asked_for(pairs):
    rows = pairs.to_list()
    rows[3]["image"]["bytes"] = b"no image"
    broken = type(pairs).from_list(rows, features=pairs.features)
    found = ValidationLoss(broken, on_bad="skip")
    found(make_model())
    assert [each.row for each in found.rejected] == [3]
    assert found.counts()["validation/pairs"] == 31


def test_sorted_tables_are_mixed(pairs):
    by_colour = pairs.select(range(32))  # four pictures of each colour stand together
    captions = [[f"a {colour} square"] for colour in by_colour["colour"]]
    alike = by_colour.remove_columns("texts").add_column("texts", captions)
    model = make_model()
    model.logit_scale.data.fill_(4.6)
    texts = ValidationLoss(alike, size=4)
    assert texts(model)["validation/loss"] > math.log(4) + 0.5  # in batches of one caption it would be nearly ln 4


def test_nothing_that_can_be_used(pairs):
    rows = pairs.select([0, 1]).to_list()
    for row in rows:
        row["image"]["bytes"] = b"no image"
    broken = type(pairs).from_list(rows, features=pairs.features)
    with pytest.raises(DataError, match="none of the images can be used"):
        ValidationLoss(broken, on_bad="skip")(make_model())


def test_what_cannot_be_measured_is_refused(pairs):
    with pytest.raises(UsageError, match="at least 2 pairs"):
        ValidationLoss(pairs, size=1)
    with pytest.raises(UsageError, match="at least 2 pairs, found 1"):
        ValidationLoss(pairs.select([0]))
    with pytest.raises(UsageError, match="no column 'image'"):
        ValidationLoss(pairs.remove_columns("image"))
    rows = pairs.to_list()
    rows[2]["texts"] = []
    with pytest.raises(DataError, match=r"without captions(?s:.)*row 2"):
        ValidationLoss(type(pairs).from_list(rows, features=pairs.features))
