"""What a test set shares with the training data: by file, by content, and letter by letter."""

from __future__ import annotations

from pathlib import Path

from clipkit.data import overlap as module
from clipkit.data.overlap import Overlap, overlap


def rows(*pairs: tuple[object, list[str]]) -> list[dict[str, object]]:
    return [{"image": image, "texts": texts} for image, texts in pairs]


def test_images_by_file_and_content_and_captions_letter_by_letter(tmp_path: Path, monkeypatch) -> None:
    contents = {"same": b"one", "copy": b"copied", "again": b"copied", "alike": b"size?!", "own": b"of its own size"}
    paths = {name: tmp_path / f"{name}.jpg" for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    read: list[str] = []
    whole = module.digest
    monkeypatch.setattr(module, "digest", lambda path: read.append(Path(path).stem) or whole(path))
    train = rows((paths["same"], ["a dog", "a cat"]), (paths["copy"], ["a bird"]), (b"bytes", ["a fox"]))
    test = rows(
        (paths["same"], ["a dog", "A dog"]),
        (paths["again"], ["a bird"]),
        (paths["alike"], ["a wolf"]),
        (paths["own"], ["a bear"]),
        (b"bytes", ["a fox", "a hen"]),
        (tmp_path / "missing.jpg", ["a hare"]),
    )
    assert overlap(train, test) == Overlap(images=3, rows=6, texts=3, captions=8)
    assert sorted(read) == ["again", "copy"]  # those of one size and the same ends, once


def test_it_is_said_in_words() -> None:
    assert str(Overlap(0, 5, 0, 9)) == ""
    assert str(Overlap(1, 5, 2, 9)).startswith("1 of 5 test images and 2 of 9 test captions are in the training data")
    assert "no test; take these rows out" in str(Overlap(1, 5, 0, 9))
    assert str(Overlap(0, 5, 9, 9)).endswith("which is expected where captions are names of classes")


def test_a_file_and_an_embedded_image_of_one_content(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"content")
    file, embedded = rows((tmp_path / "a.jpg", ["a dog"])), rows((b"content", ["a cat"]), (b"another", ["a cow"]))
    assert overlap(file, embedded).images == overlap(embedded, file).images == 1
