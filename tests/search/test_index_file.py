"""The index file and its matrix: damage, older formats, and what opening reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import CorruptArtefact, UsageError
from clipkit.search import index as module
from clipkit.search import index_file, matrix
from clipkit.search.index import EmbeddingIndex
from clipkit.search.index_file import Entry, open_index, write_index
from clipkit.search.matrix import ROWS_PER_TILE, matrix_path


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
