"""What a test set is too small to tell is told, once, and stands in result.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest

from clipkit.evaluation.result import build_result
from clipkit.evaluation.retrieval import RetrievalEvaluator
from clipkit.evaluation.small import small_test
from clipkit.evaluation.zero_shot import ZeroShotEvaluator


@pytest.mark.parametrize(
    ("queries", "chance", "majority", "said"),
    [
        ({"images": 1}, {"z/top1": 0.1}, None, "of 1 images each is worth 100 points"),
        ({"images": 24}, {"z/top1": 0.1}, None, "of 24 images each is worth 4 points"),
        ({"images": 50}, {"z/top1": 1.0, "z/mean_per_class": 1.0}, None, "top1, mean_per_class can only be 1"),
        ({"images": 50}, {"z/top1": 1 / 6, "z/top5": 5 / 6}, None, "by chance top5 is 0.83"),
        ({"images": 50}, {"z/top1": 0.1}, {"z/top1": 1.0}, "all images are of one class"),
        ({"images": 50}, {"z/top1": 0.5}, {"z/top1": 0.9}, None),  # two classes are no fault of a test
    ],
)
def test_what_is_said(queries, chance, majority, said) -> None:
    messages = [each.message for each in small_test("z", queries, chance, majority)]
    assert messages == ([] if said is None else [f"z: this test set tells little: {said}"])


def pairs_of(paths: list[Path]) -> datasets.Dataset:
    texts = [["a red square"], ["a zebra"], ["Square a"]] * (len(paths) // 3)
    table = {
        "image": [str(path) for path in paths],
        "texts": texts,
        "label": ["red", "Red", "zebra"] * (len(paths) // 3),
    }
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))


def test_told_before_training_and_once(model, tiny, tmp_path: Path, caplog) -> None:
    paths = tiny.write_pictures(tmp_path, range(12))
    with caplog.at_level(logging.WARNING, "clipkit"):
        retrieval, zero_shot = RetrievalEvaluator(pairs_of(paths)), ZeroShotEvaluator(pairs_of(paths))
        line, other = [record.message for record in caplog.records]
        assert line == (
            "retrieval: this test set tells little: of 12 images each is worth 8 points; "
            "of 3 texts each is worth 33 points; "
            "text_to_image_recall@10, image_to_text_recall@5, image_to_text_recall@10 can only be 1; "
            "by chance text_to_image_recall@5 is 0.93"
        )
        assert other == "zero_shot: this test set tells little: of 12 images each is worth 8 points"
        metrics = [evaluator(model) for evaluator in (retrieval, zero_shot, retrieval, zero_shot)]
    assert metrics[0]["retrieval/image_to_text_recall@5"] == 1.0
    told = [record.message for record in caplog.records]
    assert len(told) == len(set(told)) == 6, told
    result = build_result(model, metrics[0], [retrieval, zero_shot], 0, 1.0)
    assert [(each["code"], each["texts"]) for each in result["warnings"]] == [
        ("SMALL_TEST", []),
        ("SMALL_TEST", []),
        ("UNKNOWN", ["Red"]),
        ("UNKNOWN", ["zebra"]),
        ("SAME", ["Red", "zebra"]),
        ("CASE", ["Red", "red"]),
    ]
    assert json.loads(json.dumps(result["warnings"])) == result["warnings"]


def test_copies_of_one_image_are_one_image(model, tiny, tmp_path: Path, caplog) -> None:
    paths = tiny.write_pictures(tmp_path, range(12))
    for path in paths:
        path.write_bytes(paths[0].read_bytes())
    evaluator = RetrievalEvaluator(pairs_of(paths), ks=(1,))
    with caplog.at_level(logging.WARNING, "clipkit"):
        assert evaluator(model)["retrieval/text_to_image_recall@1"] == 1.0
    assert "of 1 images each is worth 100 points" in caplog.text
    assert "text_to_image_recall@1, image_to_text_recall@1 can only be 1" in caplog.text
