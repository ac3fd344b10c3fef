"""Nothing is on both sides, and the draw depends on the rows and the seed alone."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from clipkit.data import split as split_module
from clipkit.data.split import image_keys, split_pairs
from clipkit.errors import DataError, UsageError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(np.array([[number, 0], [0, 0]], np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs_of(images: list[dict[str, Any]], **columns: Any) -> Dataset:
    features = Features(image=Image(decode=False), texts=List(Value("string")), id=Value("int64"))
    features.update({name: Value("string") for name in columns})
    rows = {"image": images, "texts": [["x"]] * len(images), "id": list(range(len(images))), **columns}
    return Dataset.from_dict(rows, features=features)


def embedded(numbers: list[int], **columns: Any) -> Dataset:
    return pairs_of([{"bytes": png(n), "path": None} for n in numbers], **columns)


def files(folder: Path, numbers: list[int]) -> Dataset:
    folder.mkdir(exist_ok=True)
    for row, number in enumerate(numbers):
        (folder / f"{row}.png").write_bytes(png(number))
    return pairs_of([{"bytes": None, "path": str(folder / f"{row}.png")} for row in range(len(numbers))])


def test_sides_are_disjoint_ordered_and_complete() -> None:
    train, test = split_pairs(embedded(list(range(100))), test=0.1, seed=0)
    assert (len(train), len(test)) == (90, 10)
    assert sorted([*train["id"], *test["id"]]) == list(range(100))
    assert list(train["id"]) == sorted(train["id"])
    assert list(test["id"]) == sorted(test["id"])
    assert train.column_names == ["image", "texts", "id"]


def test_the_seed_decides(tmp_path: Path) -> None:
    def drawn(pairs: Dataset, seed: int) -> list[int]:
        return list(split_pairs(pairs, seed=seed)[1]["id"])

    numbers = list(range(60))
    pairs = embedded(numbers)
    assert drawn(pairs, 0) == drawn(embedded(numbers), 0) != drawn(pairs, 1)
    assert (
        drawn(files(tmp_path / "here", numbers), 0) == drawn(files(tmp_path / "there", numbers), 0) == drawn(pairs, 0)
    )


@pytest.mark.parametrize("seed", range(5))
def test_equal_images_stay_together(tmp_path: Path, seed: int) -> None:
    numbers = [n // 3 for n in range(60)]  # each image three times, under three names
    for pairs in (embedded(numbers), files(tmp_path / "a", numbers)):
        train, test = split_pairs(pairs, test=5, seed=seed)
        assert len(test) == 15
        assert not {numbers[row] for row in train["id"]} & {numbers[row] for row in test["id"]}


def test_the_same_path_is_the_same_image(tmp_path: Path) -> None:
    gone = [{"bytes": None, "path": str(tmp_path / f"gone{n // 2}.png")} for n in range(20)]  # cannot be read
    train, test = split_pairs(pairs_of(gone), test=0.3)
    assert not {row // 2 for row in train["id"]} & {row // 2 for row in test["id"]}
    assert len(test) == 6


def test_only_images_of_one_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = files(tmp_path / "a", [1, 2, 3])
    (tmp_path / "a" / "1.png").write_bytes(png(1) + b"longer")
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / "2.png")
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    keys = image_keys(pairs)
    assert sorted(read) == ["0.png", "2.png"]
    assert keys[0] == keys[2] != keys[1]


def test_only_images_of_equal_ends_are_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = b"s" * 5000, b"e" * 5000
    contents = {
        "one": b"1".join(ends),
        "copy": b"1".join(ends),
        "two": b"2".join(ends),
        "start": b"S" * 5000 + b"1" + ends[1],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read = []
    digest = split_module.digest
    monkeypatch.setattr(split_module, "digest", lambda path: read.append(Path(path).name) or digest(path))
    os.link(tmp_path / "two", tmp_path / "link")
    keys = image_keys([{"image": str(tmp_path / name)} for name in [*contents, "link"]])
    assert sorted(read) == ["copy", "one", "two"]  # each file once, whatever its names
    assert keys[0] == keys[1]
    assert keys[2] == keys[4]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_whole(seed: int) -> None:
    groups = [f"g{n % 7}" for n in range(50)]
    train, test = split_pairs(embedded(list(range(50)), group=groups), test=2, by="group", seed=seed)
    assert len(set(test["group"])) == 2
    assert not set(train["group"]) & set(test["group"])
    assert len(train) + len(test) == 50


def test_labels_are_columns_too() -> None:
    pairs = embedded(list(range(9))).add_column("label", [n % 3 for n in range(9)])
    pairs = pairs.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    train, test = split_pairs(pairs, test=1, by="label")
    assert len(set(test["label"])) == 1
    assert not set(train["label"]) & set(test["label"])
    assert test.features["label"].names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": 0.0}, "found 0.0"),
        ({"test": 1.0}, "found 1.0"),
        ({"test": 0}, "found 0"),
        ({"test": True}, "found True"),
        ({"test": -3}, "found -3"),
        ({"test": 4}, "there are 4 images"),
        ({"test": 0.99}, "leaves nothing to train on"),
        ({"by": "grup"}, "no column 'grup' to split by; there are 'image', 'texts', 'id', 'group'"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        split_pairs(embedded([0, 1, 2, 3], group=list("abcd")), **options)
    assert words in str(caught.value)


def test_a_row_that_belongs_nowhere() -> None:
    with pytest.raises(DataError, match=r"'group' is empty[\s\S]*row 1"):
        split_pairs(embedded([0, 1, 2], group=["a", None, "b"]), by="group")


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="more data is needed"):
        split_pairs(embedded([0, 0]), test=0.5)
