from __future__ import annotations

import warnings
from pathlib import Path

import datasets
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipkit.errors import BadImage, DataError, UsageError
from clipkit.evaluation.zero_shot import ZeroShotEvaluator
from clipkit.labelling import classifier
from clipkit.labelling.classifier import ZeroShotClassifier

NAMES = ["red", "green", "blue", "yellow", "cyan", "magenta", "black"]
LABELS = [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 0]


@pytest.fixture
def images(tiny, tmp_path: Path) -> list[Path]:
    return tiny.write_pictures(tmp_path, range(11))


def labelled(
    images: list[Path], labels: list, names: list[str] | None = None, column: str = "label"
) -> datasets.Dataset:
    data = datasets.Dataset.from_dict({"image": [str(path) for path in images], column: labels})
    data = data.cast_column("image", datasets.Image(decode=False))
    return data if names is None else data.cast_column(column, datasets.ClassLabel(names=names))


def test_measures_the_classifier_itself(model, images) -> None:
    evaluator = ZeroShotEvaluator(labelled(images, LABELS, NAMES), templates=["a photo of {}", "the {c}"])
    found = evaluator(model)
    classify = ZeroShotClassifier(model, NAMES, templates=["a photo of {}", "the {c}"])
    scores, predicted = classify.probabilities(model.encode_images(images)), [p.index for p in classify(images)]
    assert found["zero_shot/top1"] == pytest.approx(sum(a == b for a, b in zip(predicted, LABELS, strict=True)) / 11)
    top5 = top_k_accuracy_score(LABELS, scores.numpy(), k=5, labels=range(7))
    assert found["zero_shot/top5"] == pytest.approx(top5)
    # classes without an image do not count (scikit-learn: those only predicted are ignored, with a warning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["zero_shot/mean_per_class"] == pytest.approx(balanced_accuracy_score(LABELS, predicted))
    assert evaluator.last is not None
    assert [p.index for p in evaluator.last.predictions] == predicted
    assert sum(count for *_, count in evaluator.last.most_confused(100)) == round(11 * (1 - found["zero_shot/top1"]))
    black = evaluator.last.per_class[6]
    assert (black.name, black.n, black.recall) == ("black", 0, None)
    assert sum(row.named for row in evaluator.last.per_class) == 11


def test_baselines_and_counts(images) -> None:
    evaluator = ZeroShotEvaluator(labelled(images, LABELS, NAMES), name="z")
    assert evaluator.chance() == pytest.approx({"z/top1": 1 / 7, "z/top5": 5 / 7, "z/mean_per_class": 1 / 7})
    assert evaluator.majority() == pytest.approx({"z/top1": 4 / 11, "z/top5": 10 / 11, "z/mean_per_class": 1 / 6})
    assert evaluator.counts() == {"z/images": 11, "z/classes": 7, "z/classes_present": 6}


def test_top5_only_with_more_than_five_classes(model, images) -> None:
    few = ZeroShotEvaluator(labelled(images, [i % 5 for i in range(11)], NAMES[:5]))
    assert set(few(model)) == set(few.chance()) == set(few.majority()) == {"zero_shot/top1", "zero_shot/mean_per_class"}


def test_a_collapsed_model_scores_chance_exactly(model, images, monkeypatch) -> None:
    unit = torch.nn.functional.normalize(torch.randn(1, 16), dim=1)
    monkeypatch.setattr(model.backend, "project_image", lambda features: unit.repeat(len(features), 1))
    monkeypatch.setattr(model.backend, "project_text", lambda features: unit.repeat(len(features), 1))
    evaluator = ZeroShotEvaluator(labelled(images, LABELS, NAMES))
    assert evaluator(model) == pytest.approx(evaluator.chance())


def test_ways_to_name_the_classes(model, images) -> None:
    with_names = ZeroShotEvaluator(labelled(images, LABELS, NAMES))(model)
    bare = labelled(images, LABELS)
    assert ZeroShotEvaluator(bare, class_names=NAMES)(model) == with_names
    as_text = labelled(images, [NAMES[i] for i in LABELS], column="colour")
    assert ZeroShotEvaluator(as_text, class_names=NAMES, label="colour")(model) == with_names
    assert ZeroShotEvaluator(as_text, label="colour").class_names == sorted(NAMES[:6])
    shuffled = {name: [name, f"dark {name}"] for name in reversed(NAMES)}
    of_class_label = ZeroShotEvaluator(labelled(images, LABELS, NAMES), class_names=shuffled)
    assert list(of_class_label.class_names) == NAMES
    assert of_class_label(model) == ZeroShotEvaluator(as_text, class_names=shuffled, label="colour")(model)
    renamed = ZeroShotEvaluator(labelled(images, LABELS, [f"class {i}" for i in range(7)]), class_names=NAMES)
    assert renamed(model) == with_names


@pytest.mark.parametrize(
    ("labels", "names", "class_names", "error", "message"),
    [
        ([0, 1, None], NAMES, None, DataError, "1 of 3 have none"),
        ([0, 1, -1], None, NAMES, DataError, "have none"),
        ([0, 1, 9], None, NAMES, DataError, r"0\.\.6, found 9"),
        ([0, 1, 2], None, None, UsageError, "bare numbers"),
        (["red", "pink", "red"], None, NAMES, DataError, "'pink'"),
        ([0, 1, 2], NAMES, NAMES[:3], UsageError, "7 classes, class_names has 3"),
        ([0, 1, 2], NAMES[:3], {"red": "red"}, UsageError, "missing"),
        ([0.5, 1.0, 2.0], None, NAMES, DataError, "numbers or class names"),
    ],
)
def test_wrong_labels(images, labels, names, class_names, error, message) -> None:
    with pytest.raises(error, match=message):
        ZeroShotEvaluator(labelled(images[:3], labels, names), class_names=class_names)


def test_wrong_template_or_column_is_told_at_once(images) -> None:
    with pytest.raises(UsageError, match="slot"):
        ZeroShotEvaluator(labelled(images, LABELS, NAMES), templates="a photo")
    with pytest.raises(UsageError, match="column 'species'"):
        ZeroShotEvaluator(labelled(images, LABELS, NAMES), label="species")


def test_bad_images(model, images) -> None:
    images[2].write_bytes(b"")
    data = labelled(images, LABELS, NAMES)
    with pytest.raises(BadImage):
        ZeroShotEvaluator(data)(model)
    evaluator = ZeroShotEvaluator(data, on_bad="skip")
    found = evaluator(model)
    assert found == ZeroShotEvaluator(data.select([i for i in range(11) if i != 2]))(model)
    assert [(r.row, r.code) for r in evaluator.rejected] == [(2, "EMPTY")]
    assert evaluator(model) == found
    assert evaluator.counts()["zero_shot/images"] == 10


def test_the_scores_of_a_part_of_the_images_are_held_at_once(model, images, monkeypatch) -> None:
    whole = ZeroShotEvaluator(labelled(images, LABELS, NAMES))
    expected = whole(model)
    sizes = []
    logits = ZeroShotClassifier.logits

    def counting(self, vectors):
        sizes.append(len(vectors))
        return logits(self, vectors)

    monkeypatch.setattr(ZeroShotClassifier, "logits", counting)
    monkeypatch.setattr(classifier, "_SCORES", 3 * len(NAMES))
    tiled = ZeroShotEvaluator(labelled(images, LABELS, NAMES))
    assert tiled(model) == pytest.approx(expected)
    assert max(sizes) == 3
    assert sum(sizes) == 2 * 11  # the figures, and the predictions
    assert list(tiled.last.predictions) == list(whole.last.predictions)
    assert tiled.last.predictions[-1].row == 10
    assert [prediction.row for prediction in tiled.last.predictions[2:5]] == [2, 3, 4]
    assert torch.equal(tiled.last.confusion, whole.last.confusion)
