"""The report names what was planted, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from clipkit import progress
from clipkit.data.check import check_data
from clipkit.data.pairs import load_pairs
from clipkit.data.reading.rejects import LoadReport
from clipkit.errors import DataError


def encoded(number: int, kind: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[0, 0] = number
    Pillow.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def pairs_of(images: list[bytes], texts: list[list[str]], labels: list[int | None] | None = None) -> Dataset:
    features = Features(image=Image(decode=False), texts=List(Value("string")))
    columns: dict[str, Any] = {"image": [{"bytes": data, "path": None} for data in images], "texts": texts}
    if labels is not None:
        features["label"] = ClassLabel(names=["cat", "dog", "unused"])
        columns["label"] = labels
    return Dataset.from_dict(columns, features=features)


class Words:
    """A processor whose tokens are words, with one at the end."""

    context_length = 4

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 1 for text in texts]


def test_clean_data() -> None:
    pairs = pairs_of([encoded(n) for n in range(4)], [[f"text {n}"] for n in range(4)])
    report = check_data(pairs, processor=Words())
    assert (report.ok, report.exit_code, report.rows, report.images, report.captions) == (True, 0, 4, 4, 4)
    assert report.width == {"min": 8, "median": 8, "p95": 8, "max": 8}
    assert report.tokens["max"] == 3
    assert report.advice == []
    assert str(report).endswith("ok")
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] is True


def test_every_image_is_decoded() -> None:
    cut = encoded(1, "JPEG", (64, 64))[:-100]
    images = [encoded(0), cut, encoded(2, size=(8, 1)), b"<html>", encoded(3, size=(120, 2))]
    report = check_data(pairs_of(images, [[str(n)] for n in range(5)]))
    assert [(r.row, r.code) for r in report.rejects] == [
        (1, "TRUNCATED"),
        (2, "TOO_SMALL"),
        (3, "NOT_IMAGE"),
        (4, "ASPECT"),
    ]
    assert (report.images, report.rows, report.exit_code) == (1, 5, 3)
    assert "row 1: TRUNCATED" in str(report)
    assert 'on_bad="skip"' in report.advice[0]
    assert str(report).endswith("not ok")


def test_equal_pixels_are_found_whatever_the_file() -> None:
    images = [encoded(1), encoded(2), encoded(1, compress_level=0), encoded(1, "BMP"), encoded(2)]
    report = check_data(pairs_of(images, [[str(n)] for n in range(5)]))
    assert report.duplicates == [[0, 2, 3], [1, 4]]
    assert report.ok
    assert report.advice[0].startswith("3 rows repeat an image")


def test_one_image_two_labels() -> None:
    images = [encoded(1), encoded(1), encoded(2), encoded(2), encoded(3), encoded(3)]
    report = check_data(pairs_of(images, [[str(n)] for n in range(6)], [0, 1, 0, 0, 1, None]))
    assert report.conflicts == [[0, 1]]
    assert (report.ok, report.labels) == (False, {"cat": 3, "dog": 2, "unused": 0})
    assert "1 images carry two different labels, e.g. row 0, row 1" in str(report)


def test_shared_and_empty_and_long_captions() -> None:
    texts = [["a dog", "a dog"], ["a dog"], ["one two three four five"], [" "]]
    report = check_data(pairs_of([encoded(n) for n in range(4)], texts), processor=Words())
    assert report.shared_captions == {"a dog": 2}
    assert [(r.row, r.code) for r in report.rejects] == [(3, "EMPTY_TEXT")]
    assert (report.truncated, report.context_length) == (1, 4)
    assert "1 captions (20.0%) are longer than the 4 tokens" in str(report)
    assert report.captions_per_image["max"] == 2


def test_labels_without_captions() -> None:
    pairs = pairs_of([encoded(n) for n in range(3)], [["x"]] * 3, [0, 1, 1]).remove_columns("texts")
    report = check_data(pairs, processor=Words())
    assert (report.ok, report.captions, report.labels) == (True, 0, {"cat": 1, "dog": 2, "unused": 0})
    assert str(report).splitlines()[0] == "3 rows, 3 images that decode, no column of captions"


def test_uneven_classes() -> None:
    labels = [0] * 30 + [1]
    report = check_data(pairs_of([encoded(n) for n in range(31)], [[str(n)] for n in range(31)], labels))
    assert "'cat' has 30 images, 'unused' 0" in report.advice[-1]


def test_the_rejects_of_loading_belong_to_the_report(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    (tmp_path / "1.png").write_bytes(encoded(1, "JPEG")[:-20])
    (tmp_path / "t.csv").write_text("image,text\n0.png,x\n1.png,y\n2.png,z\ngone.png,w\n")
    ledger = LoadReport()
    pairs = load_pairs(tmp_path / "t.csv", on_bad="skip", max_bad=1.0, ledger=ledger)
    report = check_data(pairs, ledger=ledger)
    assert [r.code for r in report.rejects] == ["TRUNCATED", "MISSING"]
    assert (report.rows, report.images) == (4, 2)
    assert str(tmp_path / "1.png") in str(report)
    assert report.unreferenced == []


def test_a_row_has_the_same_number_in_every_line(tmp_path: Path) -> None:
    for number, name in enumerate("abcb"):
        (tmp_path / f"{number}.png").write_bytes(encoded(ord(name)))
    (tmp_path / "2.png").write_bytes(encoded(1, "JPEG")[:-20])
    rows = ["gone.png,x,cat", "1.png,x,cat", "2.png,y,cat", "2.png,z,cat", "0.png,x,cat", "3.png,x,dog"]
    (tmp_path / "t.csv").write_text("\n".join(["image,text,label", *rows]))
    ledger = LoadReport()
    report = check_data(load_pairs(tmp_path / "t.csv", on_bad="skip", max_bad=1.0, ledger=ledger), ledger=ledger)
    assert [(reject.row, reject.code) for reject in report.rejects] == [
        (2, "MISSING"),
        (4, "TRUNCATED"),
        (5, "TRUNCATED"),
    ]
    assert report.duplicates == report.conflicts == [[3, 7]]
    path = tmp_path / "t.csv"
    assert f"{path}:4: TRUNCATED" in str(report)
    assert f"1 images carry two different labels, e.g. {path}:3, {path}:7: decide on one" in str(report)
    assert f"1 rows repeat an image, e.g. {path}:3, {path}:7: split" in str(report)


def test_forgotten_files(tmp_path: Path) -> None:
    for name in ("0.png", "1.png", "2.PNG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(encoded(0))
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "t.csv").write_text("image,text\n0.png,x\n3.png,y\n")
    ledger = LoadReport()
    report = check_data(load_pairs(tmp_path / "t.csv", on_bad="skip", max_bad=1, ledger=ledger), ledger=ledger)
    assert report.unreferenced == [str(tmp_path / "1.png"), str(tmp_path / "2.PNG")]
    assert "2 images beside these are in no row, e.g. 1.png, 2.PNG" in str(report)


def test_threads_and_progress_change_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHORT", 0)
    pairs = pairs_of([encoded(n % 5) for n in range(600)], [[str(n)] for n in range(600)])
    want = check_data(pairs, threads=1).as_dict()
    assert check_data(pairs, threads=4, progress=True).as_dict() == want
    captured = capsys.readouterr()
    assert captured.out == ""  # which is for data
    assert "decoding 600/600" in captured.err


def test_other_data_is_refused() -> None:
    with pytest.raises(DataError, match="and texts or label or both; found 'image'"):
        check_data(Dataset.from_dict({"image": ["a"]}))
