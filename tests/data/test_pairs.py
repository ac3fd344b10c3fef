"""From every kind of source to the same kind of data set; every row accounted for."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from clipkit.data.check import check_data
from clipkit.data.pairs import load_pairs
from clipkit.data.reading import image_column
from clipkit.data.reading.rejects import LoadReport, Reject
from clipkit.errors import ClipkitError, DataError, TooManyRejected, UsageError
from clipkit.images.load import load_image, probe_image


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(np.full((4, 4), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """img/0.png to img/3.png."""
    (tmp_path / "img").mkdir()
    for number in range(4):
        (tmp_path / "img" / f"{number}.png").write_bytes(png(number))
    return tmp_path


def table(folder: Path, content: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8", newline="")
    return path


def paths_of(pairs: Dataset) -> list[str]:
    return [cell["path"] for cell in pairs["image"]]


def refused(source: Any, kind: type[ClipkitError] = DataError, **options: Any) -> ClipkitError:
    with pytest.raises(kind) as caught:
        load_pairs(source, **options)
    return caught.value


# ------------------------------------------------------------------------------------------------- the kinds of source

CAPTIONS = [["a dog"], ["None"], ["007", "x, y"]]


def make_csv(folder: Path) -> Any:
    rows = 'img/0.png,a dog,u\nimg/1.png,None,v\nimg/2.png,007,w\nimg/2.png,"x, y",w\n'
    return table(folder, "image,text,extra\n" + rows)


def make_tsv(folder: Path) -> Any:
    rows = "img/0.png\ta dog\tu\nimg/1.png\tNone\tv\nimg/2.png\t007\tw\nimg/2.png\tx, y\tw\n"
    return table(folder, "image\ttext\textra\n" + rows, "t.tsv")


def make_jsonl(folder: Path) -> Any:
    rows = [{"image": f"img/{n}.png", "text": texts, "extra": "uvw"[n]} for n, texts in enumerate(CAPTIONS)]
    return table(folder, "".join(json.dumps(row) + "\n" for row in rows), "t.jsonl")


def make_parquet(folder: Path) -> Any:
    Dataset.from_dict({"image": [f"img/{n}.png" for n in range(3)], "text": CAPTIONS, "extra": list("uvw")}).to_parquet(
        folder / "t.parquet"
    )
    return folder / "t.parquet"


def make_embedded_parquet(folder: Path) -> Any:
    cells = [{"bytes": png(n), "path": None} for n in range(3)]
    data = Dataset.from_dict({"image": cells, "text": CAPTIONS, "extra": list("uvw")}).cast_column("image", Image())
    data.to_parquet(folder / "e.parquet")
    return folder / "e.parquet"


def make_dataset(folder: Path) -> Any:
    cells = [str(folder / "img" / f"{n}.png") for n in range(3)]
    return Dataset.from_dict({"image": cells, "text": CAPTIONS, "extra": list("uvw")}).cast_column("image", Image())


def make_binary_dataset(folder: Path) -> Any:
    return Dataset.from_dict({"image": [png(n) for n in range(3)], "text": CAPTIONS, "extra": list("uvw")})


def make_dict(folder: Path) -> Any:
    return DatasetDict(train=make_binary_dataset(folder), test=make_binary_dataset(folder).select([0]))


def make_saved(folder: Path) -> Any:
    make_dict(folder).save_to_disk(folder / "saved")
    return folder / "saved"


MAKERS = [make_csv, make_tsv, make_jsonl, make_parquet, make_embedded_parquet, make_dataset, make_binary_dataset]


@pytest.mark.parametrize("make", [*MAKERS, make_dict, make_saved])
def test_every_source_gives_the_same(folder: Path, make: Any) -> None:
    ledger = LoadReport()
    pairs = load_pairs(make(folder), ledger=ledger)
    assert pairs.features == Features(image=Image(decode=False), texts=List(Value("string")), extra=Value("string"))
    assert list(pairs["texts"]) == CAPTIONS
    assert list(pairs["extra"]) == ["u", "v", "w"]
    assert [load_image(cell).getpixel((0, 0))[0] for cell in pairs["image"]] == [0, 1, 2]
    assert (ledger.images, ledger.used, ledger.rejects) == (3, ledger.rows, [])


def test_another_split(folder: Path) -> None:
    assert len(load_pairs(make_dict(folder), split="test")) == 1
    error = refused(make_dict(folder), split="dev")
    assert "no split 'dev'; there are 'train', 'test'" in str(error)


def test_strings_and_paths_and_other_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_csv(folder)
    here = paths_of(load_pairs(path))
    assert all(Path(name).is_absolute() for name in here)
    monkeypatch.chdir(folder)
    for source in ("t.csv", "./t.csv", Path("t.csv")):
        assert paths_of(load_pairs(source)) == here
    monkeypatch.chdir(folder / "img")
    assert paths_of(load_pairs("../t.csv")) == here


def test_the_result_crosses_to_workers_without_its_pixels(folder: Path) -> None:
    import pickle

    pairs = load_pairs(make_csv(folder))
    assert pickle.loads(pickle.dumps(pairs))[0] == pairs[0]
    assert pairs[0]["image"]["bytes"] is None


def test_captions_beside_images(folder: Path) -> None:
    images = folder / "img"
    for number, text in enumerate(["a dog\nanother dog\n", "007", "\n\nlast\r\n  \r\n"]):
        (images / f"{number}.txt").write_text(text, newline="")
    (images / "3.txt").write_text("form\x0cfeed\u2028kept\n")
    (images / "stray.txt").write_text("nothing to see")
    ledger = LoadReport()
    pairs = load_pairs(images, ledger=ledger)
    assert list(pairs["texts"]) == [["a dog", "another dog"], ["007"], ["last"], ["form\x0cfeed\u2028kept"]]
    assert paths_of(pairs) == [str(images / f"{n}.png") for n in range(4)]
    assert ledger.notes == [f"{images}: captions from 4 .txt files", f"{images}: not read: 1 .txt"]


def test_images_whose_text_is_missing_or_empty(folder: Path) -> None:
    (folder / "img" / "0.txt").write_text("a dog")
    (folder / "img" / "1.txt").write_text("\n")
    error = refused(folder / "img")
    assert "3 of 4 rows cannot be used" in str(error)
    assert str(error).count("EMPTY_TEXT: there is no caption beside the image") == 3
    assert str(folder / "img" / "2.png") in str(error)
    assert len(load_pairs(folder / "img", on_bad="skip", max_bad=3)) == 1


def test_class_folders(folder: Path) -> None:
    for number, name in enumerate(["cat", "big_dog", "cat"]):
        (folder / "pets" / name).mkdir(parents=True, exist_ok=True)
        (folder / "pets" / name / f"{number}.png").write_bytes(png(number))
    pairs = load_pairs(folder / "pets")
    assert pairs.features["label"] == ClassLabel(names=["big_dog", "cat"])
    assert list(pairs["label"]) == [0, 1, 1]
    assert list(pairs["texts"]) == [["a photo of a big dog."], ["a photo of a cat."], ["a photo of a cat."]]
    pairs = load_pairs(folder / "pets", templates=["{}", "{{}} {c.__class__}"[1:]])
    assert pairs["texts"][0] == ["big dog", "big dog} {c.__class__}"]  # braces are not evaluated
    (folder / "pets" / "bird").mkdir()
    assert "EMPTY_CLASS: a class folder holds no image: bird" in str(refused(folder / "pets"))


def test_folders_that_mean_something_else(folder: Path) -> None:
    assert "have no caption and lie in no class folder" in str(refused(folder / "img"))
    (folder / "all" / "train" / "cat").mkdir(parents=True)
    (folder / "all" / "train" / "cat" / "0.png").write_bytes(png())
    error = refused(folder / "all")
    assert "named like parts of a data set, not like classes: train" in str(error)
    assert error.fix == f"read one of them: {folder / 'all' / 'train'}"
    (folder / "empty").mkdir()
    assert "expected images; found none" in str(refused(folder / "empty"))
    make_csv(folder)
    assert str(refused(folder).fix).startswith(f"pass the table itself: {folder / 't.csv'}; ")


# ------------------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("filepath,title", {}),
        ("Image,Caption", {}),
        ("file_name,text", {}),
        ("a,b", {"image": "a", "text": "b"}),
        ("a,b", {"image": "a", "text": ["b"]}),
    ],
)
def test_columns_by_their_names(folder: Path, header: str, options: dict[str, Any]) -> None:
    pairs = load_pairs(table(folder, f"{header}\nimg/0.png,x\n"), **options)
    assert pairs.column_names == ["image", "texts"]
    assert pairs["texts"][0] == ["x"]


def test_several_text_columns(folder: Path) -> None:
    ledger = LoadReport()
    path = table(folder, "image,title,description\nimg/0.png,x,y\nimg/1.png,z,\n")
    pairs = load_pairs(path, text=["title", "description"], ledger=ledger)
    assert list(pairs["texts"]) == [["x", "y"], ["z"]]
    assert "1 empty captions left out" in ledger.notes[0]


COLUMN_FAULTS: list[tuple[str, str, dict[str, Any], type[ClipkitError], str]] = [
    ("no-image", "foo,text", {}, DataError, "no column is obviously the image; there are 'foo', 'text'"),
    ("no-text", "image,foo", {}, DataError, "no column is obviously the text; there are 'image', 'foo'"),
    ("near", "image,caption", {"text": "captoin"}, DataError, 'did you mean text="caption"?'),
    ("case", "image,Caption", {"text": "caption"}, DataError, 'did you mean text="Caption"?'),
    ("far", "image,text", {"image": "zzz"}, DataError, "no column 'zzz' for the image"),
    ("missing-label", "image,text", {"label": "class"}, DataError, "no column 'class' for the label"),
    ("separator", "image;text,foo", {}, DataError, 'separator="semicolon"'),
    ("labels-of-another-name", "image,class", {}, DataError, 'or the column of the class: label="COLUMN"'),
    ("no-label", "image,foo", {"templates": "{}"}, DataError, "obviously the label"),
    ("two-roles", "image,text", {"label": "text"}, UsageError, "one role"),
    ("both", "image,text", {"text": "text", "templates": "{}"}, UsageError, "give one of the two"),
    ("no-braces", "image,label", {"templates": "a photo"}, UsageError, "found 'a photo'"),
    ("no-templates", "image,label", {"templates": []}, UsageError, "at least one template"),
    ("overwritten", "file,text,image", {"image": "file"}, DataError, "rename the column 'image'"),
    ("policy", "image,text", {"on_bad": "ignore"}, UsageError, "found 'ignore'"),
    ("budget", "image,text", {"max_bad": 1.5}, UsageError, "found 1.5"),
]


@pytest.mark.parametrize(
    ("header", "options", "kind", "words"), [f[1:] for f in COLUMN_FAULTS], ids=[f[0] for f in COLUMN_FAULTS]
)
def test_column_fault(folder: Path, header: str, options: dict[str, Any], kind: type[ClipkitError], words: str) -> None:
    rows = "img/0.png" + ",x" * header.count(",")
    error = refused(table(folder, f"{header}\n{rows}\n"), kind, **options)
    assert words in str(error)
    if kind is DataError:
        assert error.where == str(folder / "t.csv")
        assert error.fix


def test_labels(folder: Path) -> None:
    path = table(folder, "image,text,label\nimg/0.png,x,10\nimg/1.png,y,9\nimg/2.png,z,\n")
    ledger = LoadReport()
    pairs = load_pairs(path, ledger=ledger)
    assert pairs.features["label"].names == ["9", "10"]
    assert list(pairs["label"]) == [1, 0, None]
    assert "1 images without a label" in ledger.notes[0]
    assert "t.csv:4: EMPTY_LABEL" in str(refused(path, label="label"))
    pairs = load_pairs(path, templates="class {}", on_bad="skip", max_bad=1)
    assert list(pairs["texts"]) == [["class 10"], ["class 9"]]


def test_labels_without_texts(folder: Path) -> None:
    path = table(folder, "image,label,kind\nimg/0.png,dog,x\nimg/1.png,cat,y\nimg/2.png,,z\n")
    assert "t.csv:4: EMPTY_LABEL" in str(refused(path))
    pairs = load_pairs(path, on_bad="skip", max_bad=1)
    assert pairs.column_names == ["image", "label", "kind"]
    assert [pairs.features["label"].int2str(n) for n in pairs["label"]] == ["dog", "cat"]
    other = table(folder, "image,kind\nimg/0.png,y\nimg/1.png,x\n", "kinds.csv")
    assert load_pairs(other, label="kind").features["label"].names == ["x", "y"]
    embedded = Dataset.from_dict({"image": [png(1), png(2)], "label": [7, 3]})
    assert load_pairs(embedded).column_names == ["image", "label"]
    boxes = "".join(json.dumps({"image": f"img/{n}.png", "label": {"box": n}}) + "\n" for n in range(2))
    assert "NOT_LABEL: expected the name or number of a class; found dict" in str(
        refused(table(folder, boxes, "t.jsonl"))
    )


def test_a_class_label_keeps_its_names(folder: Path) -> None:
    features = Features(image=Value("string"), text=Value("string"), label=ClassLabel(names=["z", "unused", "a"]))
    cells = {"image": [str(folder / "img" / f"{n}.png") for n in range(3)], "text": list("xyz"), "label": [2, 0, -1]}
    pairs = load_pairs(Dataset.from_dict(cells, features=features))
    assert pairs.features["label"].names == ["z", "unused", "a"]
    assert list(pairs["label"]) == [2, 0, None]


def test_a_column_merely_called_label_stays(folder: Path) -> None:
    lines = [json.dumps({"image": "img/0.png", "text": "x", "label": {"box": [0.5]}})]
    assert load_pairs(table(folder, "\n".join(lines), "t.jsonl"))["label"][0] == {"box": [0.5]}


def test_metadata_of_mixed_types_becomes_json(folder: Path) -> None:
    rows = [{"image": f"img/{n}.png", "text": "x", "m": m} for n, m in enumerate([3, "three", None, [3]])]
    pairs = load_pairs(table(folder, "\n".join(map(json.dumps, rows)), "t.jsonl"))
    assert list(pairs["m"]) == ["3", '"three"', None, "[3]"]


# ------------------------------------------------------------------------------------------------------------ merging


def test_rows_of_one_image_become_one(folder: Path) -> None:
    other = "img/../img/0.png"
    rows = f"img/0.png,x,1\nimg/1.png,y,2\nimg/0.png,z,3\n{other},w,4\n{folder / 'img' / '0.png'},v,5\n"
    ledger = LoadReport()
    pairs = load_pairs(table(folder, "image,text,id\n" + rows), ledger=ledger)
    assert list(pairs["texts"]) == [["x", "z", "w", "v"], ["y"]]
    assert list(pairs["id"]) == ["1", "2"]
    assert ledger.summary() == "5 rows = 5 used + 0 rejected; 2 images"


@pytest.mark.parametrize("column", ["label", "group"])
def test_one_image_cannot_have_two_labels_or_groups(folder: Path, column: str) -> None:
    path = table(folder, f"image,text,{column}\nimg/0.png,x,a\nimg/0.png,y,b\nimg/0.png,z,a\n")
    error = refused(path)
    assert f"t.csv:3: CONFLICT: the image has the {column} 'b' here and 'a' at {path}:2" in str(error)
    assert load_pairs(path, on_bad="skip", max_bad=1)["texts"][0] == ["x", "z"]


# ----------------------------------------------------------------------------------------------------------- bad rows

ROW_FAULTS: list[tuple[str, str, str, str]] = [
    ("missing", "img/9.png,x", "MISSING", "no such file"),
    ("other-case", "img/1.PNG,x", "MISSING", "did you mean"),
    ("backslash", "img\\1.png,x", "MISSING", "img/1.png?"),
    ("empty-cell", ",x", "EMPTY", "no image in this row"),
    ("blank-cell", "  ,x", "EMPTY", "no image in this row"),
    ("url", "https://example.org/a.png,x", "URL", "download it first"),
    ("folder", "img,x", "NOT_REGULAR", "a folder"),
    ("no-bytes", "empty.png,x", "EMPTY", "no bytes"),
    ("html", "page.png,x", "NOT_IMAGE", "an HTML page"),
    ("pdf", "doc.png,x", "FORMAT", "a PDF document"),
    ("no-caption", "img/1.png,", "EMPTY_TEXT", "the caption is empty"),
    ("blank-caption", 'img/1.png,"  \n"', "EMPTY_TEXT", "the caption is empty"),
]


@pytest.fixture
def faulty(folder: Path) -> Path:
    (folder / "empty.png").touch()
    (folder / "page.png").write_text("<!doctype html>")
    (folder / "doc.png").write_bytes(b"%PDF-1.4")
    return folder


@pytest.mark.parametrize(("row", "code", "words"), [f[1:] for f in ROW_FAULTS], ids=[f[0] for f in ROW_FAULTS])
def test_row_fault(faulty: Path, row: str, code: str, words: str) -> None:
    path = table(faulty, f"image,text\nimg/0.png,fine\n{row}\nimg/2.png,fine\n")
    error = refused(path)
    assert f"{path}:3: {code}: " in str(error)
    assert words in str(error)
    assert "1 of 3 rows cannot be used" in str(error)
    assert 'on_bad="skip"' in str(error)
    assert (error.where, error.exit_code) == (str(path), 3)

    ledger = LoadReport()
    pairs = load_pairs(path, on_bad="skip", max_bad=1, rejects=faulty / "rejects.jsonl", ledger=ledger)
    assert len(pairs) == ledger.used == 2
    (written,) = [json.loads(line) for line in (faulty / "rejects.jsonl").read_text().splitlines()]
    assert set(written) == {"row", "path", "code", "message", "where"}
    assert (written["row"], written["code"], written["where"]) == (3, code, f"{path}:3")
    assert Reject(**written) == ledger.rejects[0]


JSON_FAULTS = [
    ("null", {"image": "img/1.png", "text": None}, "EMPTY_TEXT"),
    ("no-key", {"image": "img/1.png"}, "EMPTY_TEXT"),
    ("empty-list", {"image": "img/1.png", "text": []}, "EMPTY_TEXT"),
    ("list-of-blanks", {"image": "img/1.png", "text": ["", " ", None]}, "EMPTY_TEXT"),
    ("number", {"image": "img/1.png", "text": 7}, "NOT_TEXT"),
    ("object", {"image": "img/1.png", "text": {"en": "x"}}, "NOT_TEXT"),
    ("list-with-number", {"image": "img/1.png", "text": ["x", 7]}, "NOT_TEXT"),
    ("image-number", {"image": 7, "text": "x"}, "NOT_IMAGE"),
    ("image-null", {"image": None, "text": "x"}, "EMPTY"),
]


@pytest.mark.parametrize(("row", "code"), [f[1:] for f in JSON_FAULTS], ids=[f[0] for f in JSON_FAULTS])
def test_json_row_fault(folder: Path, row: dict[str, Any], code: str) -> None:
    lines = [json.dumps({"image": "img/0.png", "text": "fine"}), json.dumps(row)]
    path = table(folder, "\n".join(lines), "t.jsonl")
    assert f"{path}:2: {code}: " in str(refused(path))
    assert len(load_pairs(path, on_bad="skip", max_bad=0.5)) == 1


def test_a_bad_json_line_counts_as_a_row(folder: Path) -> None:
    path = table(folder, '{"image": "img/0.png", "text": "x"}\n{oops}\n', "t.jsonl")
    assert f"{path}:2: BAD_JSON" in str(refused(path))
    ledger = LoadReport()
    load_pairs(path, on_bad="skip", max_bad=1, ledger=ledger)
    assert ledger.summary() == "2 rows = 1 used + 1 rejected (1 BAD_JSON); 1 images"


def test_nan_and_null_captions_of_a_data_set(folder: Path) -> None:
    texts = Dataset.from_dict({"image": [png(), png()], "text": ["None", None]})
    error = refused(texts)
    assert "data set, row 1: EMPTY_TEXT" in str(error)
    assert load_pairs(texts, on_bad="skip", max_bad=1)["texts"][0] == ["None"]
    floats = Dataset.from_dict({"image": [png(), png()], "text": [float("nan"), 7.0]})
    error = refused(floats)
    assert "row 0: EMPTY_TEXT" in str(error)
    assert "row 1: NOT_TEXT: expected a text; found float 7.0" in str(error)


def test_embedded_images_that_are_none(folder: Path) -> None:
    cells = [{"bytes": png(), "path": None}, {"bytes": b"", "path": "x.png"}, None]
    cells += [{"bytes": None, "path": str(folder / "img" / "1.png")}, {"bytes": None, "path": "gone.png"}]
    data = Dataset.from_dict({"image": cells, "text": list("abcde")}).cast_column("image", Image(decode=False))
    ledger = LoadReport()
    pairs = load_pairs(data, on_bad="skip", max_bad=1.0, ledger=ledger)
    assert [reject.code for reject in ledger.rejects] == ["EMPTY", "EMPTY", "MISSING"]
    assert [reject.row for reject in ledger.rejects] == [1, 2, 4]
    assert list(pairs["texts"]) == [["a"], ["d"]]
    assert [load_image(cell).size for cell in pairs["image"]] == [(4, 4), (4, 4)]


def test_a_shuffled_data_set_keeps_its_order(folder: Path) -> None:
    data = make_binary_dataset(folder).select([2, 0, 1])
    pairs = load_pairs(data, on_bad="skip")
    assert [load_image(cell).getpixel((0, 0))[0] for cell in pairs["image"]] == [2, 0, 1]
    assert list(pairs["extra"]) == ["w", "u", "v"]


def test_a_formatted_data_set(folder: Path) -> None:
    data = make_binary_dataset(folder).with_format("numpy")
    assert list(load_pairs(data)["texts"]) == CAPTIONS


def test_the_list_is_short_and_the_file_complete(folder: Path) -> None:
    good = "img/0.png,fine\n"
    path = table(folder, "image,text\n" + good + "".join(f"gone{n}.png,x\n" for n in range(25)))
    error = refused(path, rejects=folder / "r.jsonl")
    assert "25 of 26 rows cannot be used" in str(error)
    assert str(error).count("MISSING") == 10
    assert "... and 15 more" in str(error)
    assert len((folder / "r.jsonl").read_text().splitlines()) == 25


def test_the_files_of_a_large_table_are_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "page.png").write_text("<html>")
    (folder / "empty.png").touch()
    (folder / "link.png").symlink_to("img/3.png")
    (folder / "large.png").touch()
    os.truncate(folder / "large.png", 64 * 1024**2 + 1)
    names = ["img/0.png", "page.png", "empty.png", "gone.png", "img", "large.png", "link.png", "https://x.org/a.png"]
    path = table(folder, "image,text\n" + "".join(f"{name},x\n" for name in names))
    probed = []
    monkeypatch.setattr(image_column, "probe_image", lambda name, guess: probed.append(name) or probe_image(name))
    counts = []
    for opened in (len(names), len(names) - 1):
        monkeypatch.setattr(image_column, "_OPENED", opened)
        ledger = LoadReport()
        pairs = load_pairs(path, on_bad="skip", max_bad=1.0, ledger=ledger)
        assert ledger.rows == ledger.used + len(ledger.rejects) == len(names)
        counts.append((len(pairs), {reject.row: reject.code for reject in ledger.rejects}, len(probed)))
        probed.clear()
    codes = {4: "EMPTY", 5: "MISSING", 6: "NOT_REGULAR", 7: "TOO_LARGE", 9: "URL"}
    assert counts == [(2, {3: "NOT_IMAGE"} | codes, 8), (3, codes, 5)]
    report = check_data(pairs, ledger=ledger)  # which decodes
    assert report.rows == report.images + len(report.rejects) == len(names)
    assert {reject.row: reject.code for reject in report.rejects} == {3: "NOT_IMAGE"} | codes


def test_the_budget(folder: Path) -> None:
    path = table(folder, "image,text\n" + "img/0.png,x\n" * 8 + "gone.png,x\n" * 2)
    assert len(load_pairs(path, on_bad="skip", max_bad=2)) == 1
    assert len(load_pairs(path, on_bad="skip", max_bad=0.2)) == 1
    for budget in (0.1, 1, 0, 0.0):
        error = refused(path, TooManyRejected, on_bad="skip", max_bad=budget)
        assert "2 of 10 rows are rejected" in str(error)
        assert error.exit_code == 4
    refused(path, TooManyRejected, on_bad="skip")  # the default is a tenth


def test_when_no_file_is_found_the_folder_is_named(folder: Path) -> None:
    path = table(folder / "img", "image,text\nimg/0.png,x\nimg/1.png,y\n")
    assert refused(path).fix == f"no file is found at all: relative paths start at {folder / 'img'}"
    error = refused(path, on_bad="skip", max_bad=1.0)
    assert "2 of 2 rows are rejected: none is left" in str(error)
    assert error.fix == f"no file is found at all: relative paths start at {folder / 'img'}"


def test_the_sum_is_checked() -> None:
    ledger = LoadReport(rows=3, used=1, rejects=[Reject(1, "EMPTY", "x", "t:1")])
    with pytest.raises(ClipkitError, match="do not add up"):
        ledger.settle("t", on_bad="skip", max_bad=1.0)


def test_the_sum_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(folder, "image,text\nimg/0.png,x\ngone.png,y\n")
    with caplog.at_level(logging.INFO, logger="clipkit"):
        load_pairs(path, on_bad="skip", max_bad=1)
    assert "2 rows = 1 used + 1 rejected (1 MISSING); 1 images" in caplog.text
    assert f"skipped {path}:3: MISSING" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text(folder: Path) -> None:
    (folder / "img" / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    (folder / "img" / os.fsdecode(b"caf\xe9.txt")).write_text("coffee")
    (folder / "img" / "0.txt").write_text("x")
    ledger = LoadReport()
    load_pairs(folder / "img", on_bad="skip", max_bad=4, ledger=ledger, rejects=folder / "r.jsonl")
    assert "BAD_NAME" in [reject.code for reject in ledger.rejects]


# ------------------------------------------------------------------------------------------------- what is no source


def test_what_is_not_there(folder: Path) -> None:
    make_csv(folder)
    error = refused(folder / "T.csv")
    assert (str(error).startswith("MISSING"), error.fix) == (True, f"did you mean {folder / 't.csv'}?")
    assert "org/name" in str(refused("birds"))


def test_a_hub_name_while_offline() -> None:
    error = refused("someone/birds-that-nobody-has")
    assert str(error).startswith("MISSING: neither a local file or folder, nor a data set that could be loaded")
    assert error.where == "someone/birds-that-nobody-has"
    assert "HF_HUB_OFFLINE" in str(error.fix)


def test_what_cannot_be_data() -> None:
    stream = Dataset.from_dict({"image": [b""], "text": ["x"]}).to_iterable_dataset()
    assert "pack it first" in str(refused(stream))
    assert "found list" in str(refused([{"image": "a.png", "text": "x"}], UsageError))
    assert "EMPTY_TABLE" in str(refused(Dataset.from_dict({"image": [], "text": []})))
    error = refused(Dataset.from_dict({"image": [1.5], "text": ["x"]}))
    assert "the column 'image' holds neither paths nor images" in str(error)
