from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.errors import BadImage, CorruptArtefact, DataError, ModelMismatch, UsageError
from clipkit.search import index as module
from clipkit.search import index_file, matrix
from clipkit.search.changes import Changes
from clipkit.search.existing import open_existing
from clipkit.search.hits import highest
from clipkit.search.index import EmbeddingIndex
from clipkit.search.index_file import Entry, Header, open_index, write_index
from clipkit.search.matrix import ROWS_PER_TILE, matrix_path


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.tiny_model(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def named(saved: Path):
    from clipkit.models.dual_encoder import DualEncoder

    return DualEncoder.from_pretrained(saved)


@pytest.fixture
def photos(tiny, tmp_path: Path) -> Path:
    tiny.write_pictures(tmp_path / "photos", range(12))
    tiny.write_pictures(tmp_path / "photos" / "more", range(12, 20))
    return tmp_path / "photos"


def brute_force(vectors: torch.Tensor, query: torch.Tensor, k: int) -> list[int]:
    scores = (vectors.double() @ query.double()).tolist()
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("tile", [2**16, 7, 1])
def test_search_equals_brute_force(named, tiny, photos: Path, tmp_path: Path, monkeypatch, tile: int) -> None:
    monkeypatch.setattr(matrix, "ROWS_PER_TILE", tile)
    index = EmbeddingIndex.build(named, photos, tmp_path / "photos.index", batch_size=7)
    files = sorted(photos.rglob("*.png"))
    assert index.paths == files
    vectors = named.encode_images(files)
    texts = ["a red photo", "the blue picture", "5"]
    queries = [*texts, files[3], tiny.picture(5), torch.ones(16)]
    embedded = torch.cat(
        [named.encode_texts(texts), vectors[[3]], named.encode_images([tiny.picture(5)]), torch.ones(1, 16) / 4]
    )
    for hits, q in zip(index.search_many(queries, k=6), embedded, strict=True):
        order = brute_force(vectors, q, 6)
        assert [hit.path for hit in hits] == [files[i] for i in order]
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
        assert [hit.score for hit in hits] == pytest.approx([float(vectors[i] @ q) for i in order], abs=1e-5)
    assert index.search(files[3])[0].path == files[3]
    assert index.search(str(files[3]))[0].score == pytest.approx(1.0, abs=1e-5)  # a str that is an image file
    assert len(index.search("a photo", k=1000)) == 20
    with pytest.raises(UsageError, match="k must be"):
        index.search("a photo", k=0)


def test_the_next_day_it_knows_its_model(named, photos: Path, tmp_path: Path, monkeypatch) -> None:
    built = EmbeddingIndex.build(named, photos, tmp_path / "photos.index")
    monkeypatch.chdir(tmp_path)
    index = EmbeddingIndex.open("photos.index")
    assert (len(index), index.paths) == (20, built.paths)
    assert torch.equal(index.vectors, built.vectors)
    assert index._model is None  # nothing is loaded for an embedding
    assert index.search(torch.ones(16), k=2) == built.search(torch.ones(16), k=2)
    assert index._model is None
    assert index.search("a red photo", k=3) == built.search("a red photo", k=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "photos.index", "photos.index.matrix"]  # no draft


def test_equal_scores_come_in_the_order_of_the_index(named, tiny, tmp_path: Path) -> None:
    for i in range(9):
        tiny.picture(i // 3).save(tmp_path / f"{i}.png")
    index = EmbeddingIndex.build(named, [tmp_path / f"{i}.png" for i in range(9)], tmp_path / "i.index")
    for k in (1, 2, 3):
        assert [hit.path.stem for hit in index.search(tiny.picture(1), k)] == ["3", "4", "5"][:k]


def test_wrong_model_is_told_with_what_differs(named, model, photos: Path, tmp_path: Path) -> None:
    EmbeddingIndex.build(named, photos, tmp_path / "i")
    with pytest.raises(ModelMismatch, match=r"image weights: \w+ != \w+"):
        EmbeddingIndex.open(tmp_path / "i", model)
    assert EmbeddingIndex.open(tmp_path / "i", named).search("a photo", k=1)


def test_model_folder_moved_or_replaced(tiny, saved: Path, photos: Path, tmp_path: Path) -> None:
    from clipkit.models.dual_encoder import DualEncoder

    here = tmp_path / "here"
    tiny.tiny_model(seed=1).save_pretrained(here)
    EmbeddingIndex.build(DualEncoder.from_pretrained(here), photos, tmp_path / "i")
    here.rename(tmp_path / "there")
    with pytest.raises(UsageError, match="cannot be opened") as error:
        EmbeddingIndex.open(tmp_path / "i").search("a photo")
    assert "EmbeddingIndex.open(path, model=...)" in str(error.value)
    assert EmbeddingIndex.open(tmp_path / "i", tmp_path / "there").search("a photo", k=1)
    tiny.tiny_model(seed=2).save_pretrained(here)
    with pytest.raises(ModelMismatch):
        EmbeddingIndex.open(tmp_path / "i").search("a photo")


def test_model_that_was_never_saved(model, photos: Path, tmp_path: Path) -> None:
    built = EmbeddingIndex.build(model, photos, tmp_path / "i")
    assert built.search("a photo", k=1)
    with pytest.raises(UsageError, match="cannot be opened"):
        EmbeddingIndex.open(tmp_path / "i").search("a photo")


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


def test_queries_that_are_none(named, photos: Path, tmp_path: Path) -> None:
    index = EmbeddingIndex.build(named, photos, tmp_path / "i")
    for query, message in (
        ("  ", "empty"),
        (7, "found int"),
        (torch.ones(3), "shape"),
        (torch.full((16,), np.nan), "finite"),
    ):
        with pytest.raises(UsageError, match=message):
            index.search(query)
    with pytest.raises(UsageError, match="list of queries"):
        index.search_many("a photo")


def test_every_flip_that_matters_and_every_cut_is_detected(named, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "i"
    built = EmbeddingIndex.build(named, photos, path)
    whole = path.read_bytes()
    g = np.random.default_rng(0)
    unnoticed = 0
    places = [*range(100), *g.integers(100, len(whole), 150)]  # all of SQLite's header, and some
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << g.integers(8)
        path.write_bytes(data)
        matrix_path(path).unlink(missing_ok=True)  # so that the embeddings are read from the index, too
        try:
            reopened = EmbeddingIndex.open(path)
            paths = reopened.paths
        except (CorruptArtefact, UsageError):  # UsageError: a version number was hit
            continue
        unnoticed += 1  # free space of a page: harmless, if everything is still what it was
        assert paths == built.paths
        assert torch.equal(reopened.vectors, built.vectors)
        assert reopened.fingerprint == built.fingerprint
        assert reopened.model_name == built.model_name
    assert unnoticed < len(places)
    for cut in g.integers(1, len(whole), 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptArtefact):
            EmbeddingIndex.open(path)


def test_a_flip_in_the_list_of_files_is_detected(named, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "i"
    EmbeddingIndex.build(named, photos, path)
    whole = path.read_bytes()
    for needle in (b"more/015.png", b'"root"', b'"size": "16x16'):  # a name, and what the index says of itself
        data = whole.replace(needle, needle[:-1] + bytes([needle[-1] ^ 1]))
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(CorruptArtefact):
            EmbeddingIndex.open(path).search_many(torch.eye(16).unbind(), k=20)


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


def test_the_index_that_stands_there(named, photos: Path, tmp_path: Path, monkeypatch) -> None:
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


@pytest.mark.parametrize("query", ["photos/gone.png", "gone.jpg", "a folder/of a dog.webp", Path("gone")])
def test_a_query_that_looks_like_a_path_is_one(named, photos: Path, tmp_path: Path, monkeypatch, query) -> None:
    EmbeddingIndex.build(named, photos, tmp_path / "i")
    monkeypatch.chdir(tmp_path)
    index = EmbeddingIndex.open("i")
    with pytest.raises(BadImage, match="MISSING"):
        index.search(query)
    assert index._model is None  # it was not opened for that
    Path("notes").write_text("no image")
    with pytest.raises(BadImage, match="NOT_IMAGE"):
        index.search("notes")
    for text in ("cat/dog", "a photo of a file.png", "x" * 5000, "photos"):  # the last one is a folder's name
        assert index.search(text, k=1)
    with pytest.raises(BadImage, match="NOT_REGULAR"):
        index.search("photos/more")


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


@pytest.fixture
def large(named, tmp_path: Path) -> Path:
    """An index of two tiles, whose files do not exist."""
    rows, path = ROWS_PER_TILE + 100, tmp_path / "large"
    contents = [number.to_bytes(32, "big") for number in range(rows)]
    vectors = torch.nn.functional.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)))
    fingerprint = named.fingerprint()
    with EmbeddingStore(path) as store:
        store.put([Key(content, "image", fingerprint.image) for content in contents], vectors.numpy())
    entries = [Entry(b"/nowhere/%d" % row, 0, 0, content) for row, content in enumerate(contents)]
    write_index(path, Header("none", fingerprint, None), entries)
    EmbeddingIndex.open(path)
    return path


def test_opening_reads_a_header_and_searching_checks_each_tile_once(large: Path, monkeypatch) -> None:
    hashed, looked_up = [], []
    hash_rows, look_up = matrix._hash, module.look_up
    monkeypatch.setattr(matrix, "_hash", lambda rows: (hashed.append(len(rows)), hash_rows(rows))[1])

    def counting(path: Path, generation: str, rows: set[int]) -> dict[int, Entry]:
        looked_up.append(set(rows))
        return look_up(path, generation, rows)

    monkeypatch.setattr(module, "look_up", counting)
    monkeypatch.setattr(index_file, "read_vectors", lambda *_: pytest.fail("the embeddings are read from the index"))
    index = EmbeddingIndex.open(large)
    assert (len(index), hashed, looked_up) == (ROWS_PER_TILE + 100, [], [])
    hits = index.search_many(list(torch.randn(3, 16)), k=10, missing=True)
    assert hashed == [ROWS_PER_TILE, 100]
    assert [len(rows) for rows in looked_up] == [len({hit.path for query in hits for hit in query})]
    index.search(torch.randn(16), k=10, missing=True)
    assert len(hashed) == 2
    assert index.search(torch.randn(16), k=10) == []  # every file is gone, and every one was looked for


def test_the_nearest_are_those_of_the_whole_product(large: Path) -> None:
    index = EmbeddingIndex.open(large)
    queries = torch.nn.functional.normalize(torch.randn(5, 16))
    scores = (queries.double() @ index.vectors.double().T).numpy()
    for query, hits in zip(scores, index.search_many(list(queries), k=7, missing=True), strict=True):
        best = np.argsort(-query, kind="stable")[:7]
        assert [hit.path for hit in hits] == [Path(f"/nowhere/{row}") for row in best]
        assert [hit.score for hit in hits] == pytest.approx(query[best].tolist(), abs=1e-6)


def test_of_equal_scores_the_first_rows_win() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.1, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5] * 6])
    for k in range(1, 8):
        values, columns = highest(scores, k)
        best = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
        assert columns.tolist() == best.tolist()
        assert torch.equal(values, scores.gather(1, columns))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "header", "stale"])
def test_a_damaged_matrix_is_made_again(large: Path, caplog, damage: str) -> None:
    intact = matrix_path(large).read_bytes()
    vectors = EmbeddingIndex.open(large).vectors.clone()
    data = bytearray(intact)
    data[{"flip": -5, "header": 60}.get(damage, 0)] ^= 1 if damage in ("flip", "header") else 0
    matrix_path(large).write_bytes(data[:-4] if damage == "cut" else data)
    if damage == "gone":
        matrix_path(large).unlink()
    if damage == "stale":
        header = open_index(large)
        write_index(large, header, index_file.read_entries(large, header.generation))
    index = EmbeddingIndex.open(large)
    with caplog.at_level("WARNING"):
        assert index.search(vectors[-1], k=1, missing=True)[0].path == Path(f"/nowhere/{len(vectors) - 1}")
    assert torch.equal(index.vectors, vectors)
    assert ("not what was written" in caplog.text) == (damage == "flip")
    if damage != "stale":
        assert matrix_path(large).read_bytes() == intact


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


def test_an_index_of_format_1_is_brought_up_to_date(named, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "i"
    built = EmbeddingIndex.build(named, photos, path)
    paths, vectors = built.paths, built.vectors.clone()
    as_format_1(path)
    matrix_path(path).unlink()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(path.read_bytes().replace(b"more/015.png", b"more/115.png"))
    index = EmbeddingIndex.open(path)
    assert index.paths == paths
    assert torch.equal(index.vectors, vectors)
    with pytest.raises(CorruptArtefact, match="list of files"):
        EmbeddingIndex.open(damaged)


def as_format_1(path: Path) -> None:
    """Write an index as clipkit 0.1 did: without hashes of rows, its digest over all."""
    header = open_index(path)
    entries = index_file.read_entries(path, header.generation)
    fields = {key: value for key, value in json.loads(header.as_json()).items() if key not in ("rows", "generation")}
    text = json.dumps(fields | {"format": 1}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, size, mtime, content in entries:
        digest.update(b"%d %d %d " % (len(name), size, mtime) + name + content)
    with EmbeddingStore(path) as store, store.transaction():
        store.query("DROP TABLE entries")
        store.query(
            "CREATE TABLE entries (row INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, "
            "size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content BLOB NOT NULL)"
        )
        store.change("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", [(row, *entry) for row, entry in enumerate(entries)])
        store.change("INSERT OR REPLACE INTO about VALUES (?, ?)", [("about", text), ("digest", digest.hexdigest())])
    with EmbeddingStore(path) as store:
        store.seal()
