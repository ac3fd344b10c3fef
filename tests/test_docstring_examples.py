"""The examples in the docstrings of losses, similarities and evaluators run, and every one has the fixed sections."""

from __future__ import annotations

import doctest

import datasets
import pytest
import torch

from clipkit.evaluation import retrieval, validation_loss, zero_shot
from clipkit.losses import contrastive, similarity

EXAMPLES = [
    contrastive.info_nce,
    contrastive.sigmoid_loss,
    contrastive.matryoshka,
    similarity.Paired,
    similarity.SameGroup,
    similarity.Views,
    similarity.Graded,
    retrieval.RetrievalEvaluator,
    zero_shot.ZeroShotEvaluator,
    validation_loss.ValidationLoss,
]
SECTIONS = ("Inputs:", "When to prefer it:", "Relations:", "Args:", "Raises:", "References:", "Example:")


@pytest.mark.parametrize("documented", EXAMPLES, ids=lambda documented: documented.__name__)
def test_the_example_runs(documented, model, tiny, tmp_path) -> None:
    paths = [str(path) for path in tiny.write_pictures(tmp_path, range(4))]
    table = {"image": paths, "texts": [[f"number {i}"] for i in range(4)], "label": [0, 1, 0, 1]}
    pairs = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))
    labelled = pairs.cast_column("label", datasets.ClassLabel(names=["red", "blue"]))
    names = vars(__import__(documented.__module__, fromlist=["_"])) | {
        "model": model,
        "pairs": pairs,
        "labelled": labelled,
        "torch": torch,
    }
    tests = doctest.DocTestFinder(recurse=False).find(documented, documented.__name__, globs=names)
    runner = doctest.DocTestRunner()
    results = [runner.run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("documented", EXAMPLES, ids=lambda documented: documented.__name__)
def test_the_sections_are_there_in_order(documented) -> None:
    text = documented.__doc__
    places = [text.find(section) for section in SECTIONS]
    assert -1 not in places
    assert places == sorted(places)
