"""Building an index: what may be written where, what is left out, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, CorruptArtefact, DataError, UsageError
from clipkit.search.index import EmbeddingIndex


def test_bad_images_are_listed_or_stop(named, photos: Path, tmp_path: Path) -> None:
    (photos / "zero.jpg").write_bytes(b"")
    index = EmbeddingIndex.build(named, photos, tmp_path / "i")
    assert len(index) == 20
    assert [(r.code, Path(str(r.where)).name) for r in index.rejected] == [("EMPTY", "zero.jpg")]
    with pytest.raises(BadImage):
        EmbeddingIndex.build(named, photos, tmp_path / "j", on_bad="error")
    assert not (tmp_path / "j").exists()


def test_paths_that_cannot_be_used(named, tiny, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UsageError, match="already"):
        EmbeddingIndex.build(named, photos, tmp_path / "taken")
    with pytest.raises(UsageError, match="only an index"):
        EmbeddingIndex.build(named, photos, tmp_path / "taken", overwrite=True)
    assert (tmp_path / "taken").read_text() == "mine"
    with pytest.raises(UsageError, match="does not exist"):
        EmbeddingIndex.open(tmp_path / "none.index")
    with pytest.raises(UsageError, match="is a folder"):
        EmbeddingIndex.open(photos)
    with pytest.raises(CorruptArtefact):
        EmbeddingIndex.open(tmp_path / "taken")
    with EmbeddingStore(tmp_path / "store.db") as store:
        store.seal()
    with pytest.raises(CorruptArtefact, match="store of embeddings"):
        EmbeddingIndex.open(tmp_path / "store.db")
    (tmp_path / "no").mkdir()
    with pytest.raises(DataError, match="no image here"):
        EmbeddingIndex.build(named, tmp_path / "no", tmp_path / "i")
    (tmp_path / "no" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 1 rows are rejected: none is left"):
        EmbeddingIndex.build(named, tmp_path / "no", tmp_path / "i")
    with pytest.raises(DataError):
        EmbeddingIndex.build(named, tmp_path / "nowhere", tmp_path / "i")
    with pytest.raises(UsageError, match="made of files"):
        EmbeddingIndex.build(named, [tiny.picture(0)], tmp_path / "i")


def test_overwrite(named, photos: Path, tmp_path: Path) -> None:
    EmbeddingIndex.build(named, photos, tmp_path / "i")
    EmbeddingIndex.build(named, photos / "more", tmp_path / "i", overwrite=True)
    assert len(EmbeddingIndex.open(tmp_path / "i")) == 8


def test_read_only_place(named, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ro"
    EmbeddingIndex.build(named, photos, folder / "i")
    (folder / "i").chmod(0o444)
    folder.chmod(0o555)
    try:
        assert EmbeddingIndex.open(folder / "i").search(torch.ones(16), k=1)
        assert {p.name for p in folder.iterdir()} == {"i", "i.matrix"}
    finally:
        folder.chmod(0o755)


def test_a_name_that_is_no_utf8(named, tiny, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    tiny.write_pictures(folder, range(2))
    (folder / "000.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    EmbeddingIndex.build(named, folder, tmp_path / "i")
    (hit,) = EmbeddingIndex.open(tmp_path / "i").search(tiny.picture(0), k=1)
    assert hit.path.is_file()
    assert os.fsencode(hit.path).endswith(b"caf\xe9.png")
    odd = os.fsdecode(os.fsencode(folder) + b"/\xe4.png")
    Path(odd).write_bytes(b"")
    (reject,) = EmbeddingIndex.open(tmp_path / "i", named).update().rejected
    assert reject.path == odd  # as it comes out of rejects.jsonl
    str(reject).encode()  # as it is shown


BUILD = """
import runpy, sys, time
from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.search.hits import highest
from clipkit.search.index import EmbeddingIndex
put = EmbeddingStore.put
def slow(self, keys, vectors):
    put(self, keys, vectors); sys.stdout.write(f"{len(keys)}\\n"); sys.stdout.flush(); time.sleep(0.05)
EmbeddingStore.put = slow
EmbeddingIndex.build(runpy.run_path(sys.argv[1])["toy_model"](), sys.argv[2], sys.argv[3], batch_size=2)
"""


def test_a_killed_build_goes_on_where_it_was(tiny, photos: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "i"
    child = subprocess.Popen(
        [sys.executable, "-c", BUILD, toy.__file__, photos, target], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    done = sum(int(child.stdout.readline()) for _ in range(4))
    os.kill(child.pid, signal.SIGKILL)
    child.stdout.close()
    child.wait()
    assert done == 8
    assert not target.exists()
    named, embedded = toy.toy_model(), []
    original = named.vision_features
    monkeypatch.setattr(named, "vision_features", lambda x: (embedded.append(len(x)), original(x))[1])
    index = EmbeddingIndex.build(named, photos, target)
    assert sum(embedded) <= 20 - done
    assert torch.allclose(index.vectors, named.encode_images(index.paths), atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "i.matrix", "photos"]
