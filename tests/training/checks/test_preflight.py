"""Pre-flight against hand-worked figures, and against the loss of a model that was trained to its floor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset

from clipkit import Paired, SameGroup, TrainConfig, Trainer, Views
from clipkit.data.batches.plan import Plan
from clipkit.training.checks.preflight import Preflight, preflight


def look(pairs: Any, *, model: Any = None, similar: Any = None, rate: float = 0.1, smoothing: float = 0.0) -> Preflight:
    config = TrainConfig("unused", batch_size=16, scale_learning_rate=rate, label_smoothing=smoothing)
    plan = Plan([len(texts) for texts in pairs["texts"]], batch_size=16)
    notions = similar if isinstance(similar, list) else [similar or Paired()]
    return preflight(model or tiny.make_model(), pairs, plan, notions, config, steps=100, sigmoid=False)


def same_captions(pairs: Any, every: int) -> Any:
    """One caption for `every` rows in a row, and no other."""
    texts = [[f"a {tiny.COLOURS[row // every]} square"] for row in range(len(pairs))]
    columns = {name: pairs[name] for name in ("image", "colour", "place")}
    return Dataset.from_dict({**columns, "texts": texts, "label": [row // every for row in range(len(pairs))]})


def test_what_has_no_duplicates_has_no_floor() -> None:
    report = look(tiny.make_pairs())
    assert report.start == pytest.approx(math.log(16))
    assert report.floor == 0
    assert report.false_negatives == {"caption": 0, "picture": 0}
    assert (report.truncated, report.captions, report.batches) == (0, 32, 2)
    assert report.warnings == ()


def test_a_batch_of_one_caption_a_colour() -> None:
    pairs = same_captions(tiny.make_pairs(), 4).select(range(16))  # the whole is one batch: four captions, four each
    report = look(pairs)
    assert report.floor == pytest.approx(math.log(4))
    assert report.false_negatives == {"caption": 16 * 3, "picture": 0, "label": 16 * 3}
    said = " ".join(report.warnings)
    assert "50 % of the first loss can never be learnt away" in said
    assert 'SameGroup("label")' in said
    assert "one batch is the whole epoch" in said

    grouped = look(pairs, similar=SameGroup("label"))
    assert "targets are spread over several pairs" in grouped.warnings[0]
    assert grouped.floor == pytest.approx(math.log(4))  # the entropy of four positives
    assert grouped.false_negatives == {"caption": 0, "picture": 0, "label": 0}
    ignored = look(pairs, similar=Paired(known={"texts": "ignore"}))
    assert ignored.floor == 0


def test_several_notions_and_label_smoothing_have_their_own_floor() -> None:
    pairs = tiny.make_pairs()
    both = look(pairs, similar=[Paired(), Views(views=3, weight=0.5)])
    assert both.start == pytest.approx(math.log(16) + 0.5 * math.log(47))
    assert both.floor == pytest.approx(0.5 * math.log(2))  # each view has two others of its picture
    smooth = look(pairs, smoothing=0.1)
    own, other = 0.9 + 0.1 / 16, 0.1 / 16
    assert smooth.floor == pytest.approx(-own * math.log(own) - 15 * other * math.log(other))


def test_training_ends_on_the_floor_and_not_below(tmp_path: Path) -> None:
    pairs = same_captions(tiny.make_pairs(), 4).select(range(16))
    rates = {"learning_rate": 3e-3, "head_learning_rate": 3e-3, "scale_learning_rate": 0.03}
    config = TrainConfig(
        str(tmp_path / "run"), batch_size=16, max_steps=150, epochs=150, augmentation="none", progress=False, **rates
    )
    trainer = Trainer(tiny.make_model(), pairs, config)
    last = trainer.train().history[-1]["loss"]
    floor = json.loads((tmp_path / "run" / "preflight.json").read_text())["floor"]
    assert floor == look(pairs).floor
    assert floor - 1e-5 <= last < floor + 0.02


def test_long_captions_and_a_slow_scale_are_told() -> None:
    pairs = tiny.make_pairs()
    longer = pairs.map(lambda row: {"texts": [f"{row['texts'][0]} a square a square a square"]})
    report = look(longer, rate=1e-3)
    assert report.truncated == 1
    assert report.scale[0] == pytest.approx(1 / 0.07, rel=1e-5)
    assert report.scale[2] == pytest.approx(report.scale[0] ** 2 / report.scale[1], rel=1e-6)
    said = " ".join(report.warnings)
    assert "100 % of the captions are cut" in said
    assert "the scale can only move from 14.3 to 15." in said
    assert any("captions cut: 100.0 % of 32" in line for line in report.lines())


def test_equal_pictures_are_seen_without_opening_them() -> None:
    pairs = tiny.make_pairs().select([0] * 8 + list(range(8)))
    report = look(pairs)
    assert report.false_negatives["picture"] == 9 * 8
    assert report.floor > 1
