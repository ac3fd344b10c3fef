"""One walk serves every verb: what it lists, what it passes over, and what it says of that."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clipkit.data.reading.rejects import unreadable_folders
from clipkit.errors import DataError
from clipkit.files import dump_json, write_text
from clipkit.images.load import find_images
from clipkit.paths import walk


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_are_told_by_their_suffix_and_links_are_followed_once(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.JPG", "a.png", "sub/c.webp", "sub/deep/d.Jfif", "e.heic", "notes.txt", ".hidden.png", ".git/f.png"
    )
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)  # a loop
    (tmp_path / "again").symlink_to(tmp_path / "sub", target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone", target_is_directory=True)
    listed = [str(path.relative_to(tmp_path)) for path in find_images(walk(tmp_path))]
    assert listed == ["a.png", "b.JPG", "e.heic", "sub/c.webp", "sub/deep/d.Jfif"]
    assert find_images(walk(str(tmp_path / "sub" / "deep"))) == [tmp_path / "sub" / "deep" / "d.Jfif"]


def test_what_is_passed_over_is_said_in_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.DNG", "c.dng", "d.jp2", "README", "photo.of my dog", "a.txt")
    touch(tmp_path, ".DS_Store", "x/.DS_Store", "x/._b.jpg", ".thumbnails/1.png", "@eaDir/a.jpg", "x/@eaDir/b.jpg")
    touch(tmp_path, "__MACOSX/a.jpg", "x/Thumbs.db")
    tree = walk(tmp_path)
    assert find_images(tree) == [tmp_path / "a.jpg"]
    assert tree.folders == [tmp_path, tmp_path / "x"]
    line = tree.passed_over([tmp_path / "a.jpg", tmp_path / "a.txt"])
    assert line is not None
    head, unread, skipped = line.replace("; skipped: ", "|").replace(": not read: ", "|").split("|")
    assert head == str(tmp_path)
    assert set(unread.split(", ")) == {"2 .dng", "1 .jp2", "2 without a suffix"}
    names = {"2 .DS_Store", "1 other hidden", "1 .thumbnails", "2 @eaDir", "1 __MACOSX", "1 Thumbs.db"}
    assert set(skipped.split(", ")) == names
    touch(tmp_path / "clean", "a.jpg")
    assert walk(tmp_path / "clean").passed_over([tmp_path / "clean" / "a.jpg"]) is None


def test_a_hundred_suffixes_still_make_one_line(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a.x{number:03}" for number in range(100)))
    line = walk(tmp_path).passed_over([])
    assert line is not None
    assert line.endswith("1 .x011, 88 of other names")


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.png", "file.png")
    with pytest.raises(DataError, match=r"does not exist[\s\S]*did you mean .*photos\?"):
        walk(tmp_path / "photo")
    with pytest.raises(DataError, match="is not a folder"):
        walk(tmp_path / "file.png")


def deny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As chmod does, which root does not feel."""
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)


def test_an_unreadable_folder_is_a_reject_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "lost+found/b.jpg", "z/c.jpg")
    deny(monkeypatch, "lost+found")
    tree = walk(tmp_path)
    assert find_images(tree) == [tmp_path / "a.jpg", tmp_path / "z" / "c.jpg"]
    (reject,) = unreadable_folders(tree, 2)
    assert (reject.row, reject.code, reject.path) == (2, "UNREADABLE", str(tmp_path / "lost+found"))
    assert "Permission denied" in reject.message
    deny(monkeypatch, tmp_path.name)
    with pytest.raises(DataError, match="UNREADABLE: the folder cannot be listed: Permission denied"):
        walk(tmp_path)


def test_odd_names_come_back_from_json_and_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    touch(tmp_path, name)
    (path,) = walk(tmp_path).files
    assert os.fsencode(json.loads(dump_json({"path": path}).encode("utf-8"))["path"]) == os.fsencode(tmp_path / name)
    write_text(tmp_path / "list", f"{path.name}\n")
    assert (tmp_path / "list").read_bytes() == b"caf\xe9 \xc3\xa9.png\n"
