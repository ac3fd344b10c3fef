from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, UsageError
from clipkit.labelling.classifier import ZeroShotClassifier

NAMES = ["red", "green", "blue", "black"]


def test_equals_plain_softmax(model, tiny) -> None:
    images = [tiny.picture(i) for i in range(7)]
    classify = ZeroShotClassifier(model, NAMES, templates="a photo of {}")
    x, w = model.encode_images(images), model.encode_texts([f"a photo of {name}" for name in NAMES])
    expected = torch.softmax(model.logit_scale.exp().detach() * x @ w.T, dim=1)
    for row, (p, e) in enumerate(zip(classify(images, batch_size=3), expected, strict=True)):
        assert (p.row, p.index, p.label) == (row, int(e.argmax()), NAMES[int(e.argmax())])
        assert p.score == pytest.approx(float(e.max()), abs=1e-5)
        assert [label for label, _ in p.top] == [NAMES[i] for i in e.argsort(descending=True)]
        assert [score for _, score in p.top] == pytest.approx(sorted(e.tolist(), reverse=True), abs=1e-5)
        assert sum(score for _, score in p.top) == pytest.approx(1)


def test_the_models_own_scale_counts(tiny) -> None:
    own = tiny.tiny_model()
    mild = ZeroShotClassifier(own, NAMES)([tiny.picture(0)])[0]
    with torch.no_grad():
        own.logit_scale.add_(2.0)
    sharp = ZeroShotClassifier(own, NAMES)([tiny.picture(0)])[0]
    assert sharp.label == mild.label
    assert sharp.score > mild.score


def test_sigmoid_models_judge_each_class_for_itself(tiny) -> None:
    own = tiny.tiny_model(logit_bias=-2.0)
    assert own.similarity == "sigmoid"
    images = [tiny.picture(i) for i in range(3)]
    found = ZeroShotClassifier(own, NAMES, templates="{}")(images)
    cosine = own.encode_images(images) @ own.encode_texts(NAMES).T
    expected = torch.sigmoid(own.logit_scale.exp().detach() * cosine - 2.0).amax(1)
    assert [p.score for p in found] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [p.label for p in ZeroShotClassifier(own, ["red"])(images)] == ["red"] * 3


def test_top(model, tiny) -> None:
    classify = ZeroShotClassifier(model, NAMES)
    assert [len(classify([tiny.picture(0)], top_k=k)[0].top) for k in (1, 3, 99)] == [1, 3, 4]
    with pytest.raises(UsageError, match="top_k"):
        classify([tiny.picture(0)], top_k=0)


def test_order_and_alignment(model, tiny, tmp_path: Path) -> None:
    paths = tiny.write_pictures(tmp_path, range(9))
    classify = ZeroShotClassifier(model, NAMES)
    together = classify(paths, batch_size=4)
    alone = [classify([path])[0] for path in paths]
    assert [p.label for p in together] == [p.label for p in alone]
    assert [p.label for p in classify(path for path in paths)] == [p.label for p in alone]
    assert classify([]) == []


def test_bad_images(model, tiny, tmp_path: Path) -> None:
    paths = tiny.write_pictures(tmp_path, range(3))
    paths[1].write_bytes(b"")
    classify = ZeroShotClassifier(model, NAMES)
    with pytest.raises(BadImage, match=r"001\.png"):
        classify(paths)
    assert [p.row for p in classify(paths, on_bad="skip")] == [0, 2]
    found = classify.label(paths)
    assert [p.row for p in found.predictions] == [0, 2]
    assert [(r.row, r.code) for r in found.rejected] == [(1, "EMPTY")]


def test_one_image_in_place_of_a_list(model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="list of images"):
        ZeroShotClassifier(model, NAMES)("a.png")


def test_store_is_used_for_both_sides(model, tiny) -> None:
    with EmbeddingStore() as store:
        first = ZeroShotClassifier(model, NAMES, store=store)([tiny.picture(0)])
        assert len(store) == 5
        assert ZeroShotClassifier(model, NAMES, store=store)([tiny.picture(0)]) == first
        assert len(store) == 5


def test_constant_model_has_equal_logits_for_every_class(model) -> None:
    """Equal columns of a product must come out equal, or a collapsed model would score more than chance."""
    classify = ZeroShotClassifier(model, [str(i) for i in range(37)])
    for classes, dim in ((37, 16), (1000, 515), (7, 768), (101, 64)):
        classify.weights = torch.randn(1, dim).expand(classes, dim).contiguous()
        logits = classify.logits(torch.randn(33, dim))
        assert torch.equal(logits, logits[:, :1].expand_as(logits))


def test_what_the_model_cannot_see_of_the_classes_is_told(tiny, caplog) -> None:
    own = tiny.tiny_model()
    with caplog.at_level(logging.WARNING, "clipkit"):
        notices = ZeroShotClassifier(own, ["red", "zebra", "sea_lion"]).notices
        ZeroShotClassifier(own, ["red", "zebra", "sea_lion"])
    assert [(each.code, each.texts) for each in notices] == [
        ("UNKNOWN", ("zebra",)),
        ("UNKNOWN", ("sea_lion",)),  # "sea lion" has one unknown token more
    ]
    assert [record.message for record in caplog.records] == [each.message for each in notices]
    assert ZeroShotClassifier(own, ["red", "green"]).notices == []
