"""Updating an index: files that changed, moved or are gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import DataError, UsageError
from clipkit.search.changes import Changes
from clipkit.search.existing import open_existing
from clipkit.search.index import EmbeddingIndex


def test_update(named, tiny, photos: Path, tmp_path: Path) -> None:
    index = EmbeddingIndex.build(named, photos, tmp_path / "i")
    assert index.update() == Changes([], [], [], [], [], kept=20)
    (photos / "000.png").unlink()
    tiny.picture(50).save(photos / "new.png")
    tiny.picture(51).save(photos / "001.png")
    (photos / "bad.png").write_bytes(b"x")
    os.utime(photos / "001.png", ns=(1, 1))
    changes = index.update()
    names = [[p.name for p in part] for part in (changes.added, changes.changed, changes.removed)]
    assert names == [["new.png"], ["001.png"], ["000.png"]]
    assert [r.code for r in changes.rejected] == ["NOT_IMAGE"]
    assert (changes.kept, changes.moved) == (18, [])
    again = EmbeddingIndex.open(tmp_path / "i", named)
    for updated in (index, again):
        assert updated.search(tiny.picture(51), k=1)[0].path == photos / "001.png"
        assert updated.search(tiny.picture(0), k=1)[0].score < 0.9999
    fresh = EmbeddingIndex.build(named, photos, tmp_path / "j")
    assert (again.paths, len(again)) == (fresh.paths, 20)
    assert torch.allclose(again.vectors, fresh.vectors, atol=1e-6)
    with EmbeddingStore(tmp_path / "i") as store:
        assert len(store) == 20  # nothing is kept of what is gone
    for path in photos.rglob("*.png"):
        path.unlink()
    assert len(index.update().removed) == 20
    assert index.search(torch.ones(16)) == []


def counted(model, monkeypatch) -> list[int]:
    """How many images each batch that the model embeds from now on has."""
    embedded: list[int] = []
    original = model.vision_features
    monkeypatch.setattr(model, "vision_features", lambda x: (embedded.append(len(x)), original(x))[1])
    return embedded


def test_moved_files_are_known_by_their_content(named, tiny, photos: Path, tmp_path: Path, monkeypatch) -> None:
    index = EmbeddingIndex.build(named, photos, tmp_path / "i")
    (photos / "000.png").rename(photos / "more" / "zero.png")
    (photos / "copy.png").write_bytes((photos / "001.png").read_bytes())
    tiny.picture(77).save(photos / "new.png")
    embedded = counted(named, monkeypatch)
    changes = index.update()
    assert changes.moved == [(photos / "000.png", photos / "more" / "zero.png")]
    assert ([p.name for p in changes.added], changes.removed, changes.kept) == (["copy.png", "new.png"], [], 19)
    assert str(changes) == "2 new, 0 changed, 1 moved, 0 deleted, 19 as before"
    assert sum(embedded) == 1  # the one content that was not there


def test_a_file_of_the_same_size_and_time_is_seen_by_its_content(named, tiny, photos: Path, tmp_path: Path) -> None:
    index = EmbeddingIndex.build(named, photos, tmp_path / "i")
    victim = photos / "000.png"
    whole, status = victim.read_bytes(), victim.stat()
    shade = next(n for n in range(100, 10_000) if len(_png(tiny, n)) <= len(whole) and _png(tiny, n) != whole)
    victim.write_bytes(_png(tiny, shade).ljust(len(whole), b"\0"))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert victim.stat().st_size == status.st_size
    assert index.update().changed == []
    assert index.update(verify=True) == Changes([], [victim], [], [], [], kept=19)
    assert index.search(tiny.picture(shade), k=1)[0].path == victim
    assert index.update(verify=True).kept == 20


def _png(tiny, number: int) -> bytes:
    import io

    buffer = io.BytesIO()
    tiny.picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def test_files_that_are_gone_are_left_out_or_flagged(named, tiny, photos: Path, tmp_path: Path, caplog) -> None:
    index = EmbeddingIndex.build(named, photos, tmp_path / "i")
    before = index.search(tiny.picture(3), k=20)
    gone = {before[0].path, before[1].path, before[4].path}
    for path in gone:
        path.unlink()
    for k in (1, 3, 17, 20):
        hits = index.search(tiny.picture(3), k=k)
        assert [hit.path for hit in hits] == [hit.path for hit in before if hit.path not in gone][:k]
        assert [hit.rank for hit in hits] == list(range(1, min(k, 17) + 1))
    assert "left out: 3 files that are no longer there" in caplog.text
    flagged = index.search(tiny.picture(3), k=20, missing=True)
    assert [(hit.path, hit.missing) for hit in flagged] == [(hit.path, hit.path in gone) for hit in before]


def test_a_folder_that_moved(named, tiny, photos: Path, tmp_path: Path, monkeypatch) -> None:
    EmbeddingIndex.build(named, photos, tmp_path / "i")
    there = tmp_path / "elsewhere" / "pictures"
    there.parent.mkdir()
    photos.rename(there)
    with pytest.raises(DataError, match=r"is not there: .*photos[\s\S]*root=") as error:
        EmbeddingIndex.open(tmp_path / "i").search(torch.ones(16))
    assert error.value.exit_code == 3
    assert EmbeddingIndex.open(tmp_path / "i").search(torch.ones(16), k=1, missing=True)[0].missing
    with pytest.raises(DataError, match="is not there"):
        EmbeddingIndex.open(tmp_path / "i", named).update()  # would drop every one
    index = EmbeddingIndex.open(tmp_path / "i", named, root=there)
    assert index.search(tiny.picture(3), k=1)[0].path == there / "003.png"
    assert len(EmbeddingIndex.open(tmp_path / "i")) == 20  # nothing is written yet
    embedded = counted(named, monkeypatch)
    assert (index.update().kept, embedded) == (20, [])
    assert EmbeddingIndex.open(tmp_path / "i").root == there
    with pytest.raises(DataError, match="none of the 20 files"):
        EmbeddingIndex.open(tmp_path / "i", root=tmp_path)
    EmbeddingIndex.build(named, [there / "000.png"], tmp_path / "list")
    with pytest.raises(UsageError, match="a list of files"):
        EmbeddingIndex.open(tmp_path / "list", root=there)


def test_the_index_that_exists_already(named, photos: Path, tmp_path: Path, monkeypatch) -> None:
    assert open_existing(tmp_path / "i", photos) is None
    EmbeddingIndex.build(named, photos, tmp_path / "i")
    monkeypatch.chdir(tmp_path)
    for same in (photos, Path("photos"), photos / "more" / ".."):
        existing = open_existing(tmp_path / "i", same)
        assert existing is not None
        assert existing.root == photos
    with pytest.raises(UsageError, match=r"another folder: .*photos[\s\S]*overwrite=True"):
        open_existing(tmp_path / "i", photos / "more")
    (tmp_path / "other").mkdir()
    photos.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="another folder"):
        open_existing(tmp_path / "i", tmp_path / "other")
    existing = open_existing(tmp_path / "i", tmp_path / "moved")
    assert existing is not None
    assert existing.root == tmp_path / "moved"
    EmbeddingIndex.build(named, [tmp_path / "moved" / "000.png"], tmp_path / "list")
    with pytest.raises(UsageError, match="a list of files"):
        open_existing(tmp_path / "list", tmp_path / "moved")


def test_what_lies_in_a_folder_that_cannot_be_listed(named, tiny, photos: Path, tmp_path: Path, monkeypatch) -> None:
    built = EmbeddingIndex.build(named, photos, tmp_path / "i")
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    index = EmbeddingIndex.open(tmp_path / "i", named)
    changes = index.update()
    assert (changes.kept, changes.removed) == (20, [])  # not known to be gone
    assert [(r.code, r.row, r.path) for r in changes.rejected] == [("UNREADABLE", 12, str(photos / "more"))]
    assert index.paths == built.paths
    fresh = EmbeddingIndex.build(named, photos, tmp_path / "j")
    assert (len(fresh), [r.code for r in fresh.rejected]) == (12, ["UNREADABLE"])
    with pytest.raises(DataError, match="UNREADABLE"):
        EmbeddingIndex.build(named, photos, tmp_path / "k", on_bad="error")


def test_an_open_index_follows_an_update(named, photos: Path, tmp_path: Path) -> None:
    EmbeddingIndex.build(named, photos, tmp_path / "i")
    reader, writer = EmbeddingIndex.open(tmp_path / "i", named), EmbeddingIndex.open(tmp_path / "i", named)
    first, *_ = reader.paths
    first.unlink()
    writer.update()
    query = torch.randn(16)
    assert reader.search(query, k=30) == EmbeddingIndex.open(tmp_path / "i").search(query, k=30)
    assert reader.paths == writer.paths
    assert len(reader) == 19
