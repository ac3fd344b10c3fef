"""What is said of the images of a folder is found wherever they are; names of parts are never taken for classes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from clipkit.data.check import check_data
from clipkit.data.pairs import load_pairs
from clipkit.data.reading.rejects import LoadReport
from clipkit.errors import DataError


def images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.new("L", (4, 4), number).save(path, "PNG")
    return root


def loaded(root: Path, **options: Any) -> tuple[dict[str, list[str]], LoadReport]:
    """Captions by the name of the image."""
    ledger = LoadReport()
    pairs = load_pairs(root, ledger=ledger, **options)
    return {Path(row["image"]["path"]).relative_to(root).as_posix(): row["texts"] for row in pairs}, ledger


def test_captions_in_every_kind_of_file_at_any_depth(tmp_path: Path) -> None:
    root = images(tmp_path, "a.png", "deep/er/B.PNG", "deep/c.png", "link.png", "@eaDir/a.png", "deep/d.png")
    (root / "a.TXT").write_text("a dog\n\u200b\n")
    (root / "deep/er/B.caption").write_text("a cat")
    (root / "deep/c.json").write_text(json.dumps({"caption": "a bird", "url": "https://x"}))
    (root / "deep/d.json").write_text(json.dumps({"caption": "not this one"}))  # img2dataset writes both
    (root / "deep/d.txt").write_text("a fish")
    (root / "link.caption").write_text("a link")
    (root / "@eaDir/a.txt").write_text("a thumbnail")
    (root / "00000_stats.json").write_text("{}")
    (root / "raw.dng").write_bytes(b"")
    found, ledger = loaded(root)
    assert found == {
        "a.png": ["a dog"],
        "deep/c.png": ["a bird"],
        "deep/d.png": ["a fish"],
        "deep/er/B.PNG": ["a cat"],
        "link.png": ["a link"],
    }
    assert ledger.notes == [
        f"{root}: captions from 2 .txt files and 2 .caption files and 1 .json file",
        f"{root}: not read: 2 .json, 1 .dng; skipped: 1 @eaDir",
    ]


def test_a_caption_file_that_cannot_be_read_costs_its_row_alone(tmp_path: Path) -> None:
    root = images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (root / "a.txt").write_text("a dog")
    (root / "b.txt").write_bytes(b"caf\xe9")
    (root / "c.json").write_text('{"caption": ')
    (root / "d.json").write_text('{"caption": null}')
    with pytest.raises(DataError) as caught:
        load_pairs(root)
    assert 'encoding="cp1252"' in str(caught.value)
    found, ledger = loaded(root, on_bad="skip", max_bad=3)
    assert found == {"a.png": ["a dog"]}
    assert [reject.code for reject in ledger.rejects] == ["ENCODING", "BAD_JSON", "EMPTY_TEXT"]
    assert loaded(root, encoding="latin-1", on_bad="skip", max_bad=2)[0]["b.png"] == ["café"]


def test_json_that_holds_no_captions_leaves_class_folders_alone(tmp_path: Path) -> None:
    root = images(tmp_path, "cat/a.png", "dog/b.png")
    (root / "cat/a.json").write_text('{"shapes": []}')
    ledger = LoadReport()
    assert load_pairs(root, ledger=ledger).features["label"].names == ["cat", "dog"]
    assert ledger.notes == [f"{root}: 2 classes: cat, dog", f"{root}: not read: 1 .json"]


def test_metadata_files_at_any_level(tmp_path: Path) -> None:
    root = images(tmp_path, "train/x/a.png", "train/b.png", "val/c.png", "val/d.png")
    rows = ["file_name,text,label", "x/a.png,a dog,dog", "b.png,a cat,cat", "b.png,two,cat"]
    (root / "train/metadata.csv").write_text("\n".join(rows))
    more = [{"file_name": "c.png", "text": "a bird", "label": "bird"}, {"file_name": "e.png", "text": "none"}]
    (root / "val/metadata.jsonl").write_text("\n".join(map(json.dumps, more)))
    ledger = LoadReport()
    pairs = load_pairs(root, ledger=ledger, on_bad="skip", max_bad=2)
    assert list(pairs["texts"]) == [["a dog"], ["a cat", "two"], ["a bird"]]
    assert [pairs.features["label"].int2str(n) for n in pairs["label"]] == ["dog", "cat", "bird"]
    assert [(reject.code, reject.where) for reject in ledger.rejects] == [
        ("MISSING", f"{root / 'val/metadata.jsonl'}:2"),
        ("EMPTY_TEXT", str(root / "val/d.png")),
    ]
    assert ledger.rejects[1].path == str(root / "val/d.png")
    assert ledger.notes[0] == f"{root}: captions from train/metadata.csv, val/metadata.jsonl"
    assert ledger.source_rows(1) == [(1, f"{root / 'train/metadata.csv'}:3"), (2, f"{root / 'train/metadata.csv'}:4")]


def test_captions_beside_images_complete_the_metadata(tmp_path: Path) -> None:
    root = images(tmp_path, "a.png", "b.png")
    (root / "a.txt").write_text("a dog")
    (root / "b.txt").write_text("a cat")
    (root / "metadata.csv").write_text("file_name,label\na.png,dog\n")
    found, _ = loaded(root)
    assert found == {"a.png": ["a dog"], "b.png": ["a cat"]}
    (root / "b.txt").unlink()
    (root / "a.txt").unlink()
    ledger = LoadReport()
    assert load_pairs(root, on_bad="skip", max_bad=1, ledger=ledger).column_names == ["image", "label"]
    assert ledger.notes[0] == f"{root}: labels from metadata.csv"
    (root / "b.txt").write_text("a cat")
    (root / "metadata.csv").write_text("file_name,text\na.png,from the table\n")
    assert loaded(root)[0] == {"a.png": ["from the table"], "b.png": ["a cat"]}
    (root / "metadata.csv").write_text("image,text\na.png,x\n")
    with pytest.raises(DataError, match="names its images in the column file_name; there are image, text"):
        load_pairs(root)


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (["train/cat/a.png", "val/cat/b.png"], "train, val"),
        (["train2014/a.png", "test2017/b.png", "other/c.png"], "test2017, train2014"),
        (["images/a.png", "birds/b.png"], "images"),
        (["00000/a.png", "00001/b.png"], "00000, 00001"),
        (["2023-05-01/a.png", "2023-05-02/b.png"], "2023-05-01, 2023-05-02"),
        (["100APPLE/a.png"], "100APPLE"),
    ],
)
def test_names_of_parts_are_no_classes(tmp_path: Path, names: list[str], odd: str) -> None:
    images(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path)
    assert str(caught.value).startswith("NO_CLASSES: ")
    assert f"not like classes: {odd}\n" in str(caught.value)
    deep = names[0].count("/") == 2
    assert str(caught.value.fix).startswith(f"read one of them: {tmp_path / 'train'}" if deep else "say what is on")


@pytest.mark.parametrize("names", [["bus", "car", "train"], ["0", "1", "10"], ["photo", "sketch"]])
def test_names_that_can_be_classes(tmp_path: Path, names: list[str]) -> None:
    images(tmp_path, *(f"{name}/{name}.png" for name in names))
    assert load_pairs(tmp_path).features["label"].names == sorted(names, key=lambda name: (len(name), name))


def test_a_table_deep_in_the_tree_is_no_class_folder(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "dog/captions.tsv").write_text("image\ttext\nb.png\tx\n")
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path)
    assert str(caught.value.fix).startswith(f"pass the table itself: {tmp_path / 'dog/captions.tsv'}")


def test_an_unreadable_folder_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png", "lost+found/c.png")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="1 of 3 rows cannot be used"):
        load_pairs(tmp_path)
    ledger = LoadReport()
    pairs = load_pairs(tmp_path, on_bad="skip", max_bad=1, ledger=ledger)
    assert pairs.features["label"].names == ["cat", "dog"]
    assert ledger.summary() == "3 rows = 2 used + 1 rejected (1 UNREADABLE); 2 images"
    assert ledger.rejects[0].where == str(tmp_path / "lost+found")
    assert [reject.code for reject in check_data(pairs, ledger=ledger).rejects] == ["UNREADABLE"]
