from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.errors import ClipkitError, CorruptArtefact, ResourceError, UsageError
from clipkit.files import content_hash


def keys(n: int, tower: str = "t", kind: str = "image", start: int = 0) -> list[Key]:
    return [Key(content_hash(f"item {i}"), kind, tower) for i in range(start, start + n)]


def vectors(n: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def test_round_trip_and_reopen(tmp_path: Path) -> None:
    k, v = keys(1203), vectors(1203)
    with EmbeddingStore(tmp_path / "deep" / "s.db") as store:
        store.put(k, v)
    with EmbeddingStore(tmp_path / "deep" / "s.db") as store:
        found = store.get([*k, *keys(3, start=5000)])
        assert len(store) == len(found) == 1203
        assert np.array_equal(np.stack([found[x] for x in k]), v)
        assert store.has([*k[:2], *keys(1, start=5000)]) == set(k[:2])


def test_kind_and_tower_are_part_of_the_key() -> None:
    with EmbeddingStore() as store:
        store.put(keys(2), vectors(2, seed=0))
        store.put(keys(2, tower="u"), vectors(2, dim=3, seed=1))
        store.put(keys(2, kind="text"), vectors(2, seed=2))
        assert np.array_equal(store.get(keys(1, tower="u"))[keys(1, tower="u")[0]], vectors(2, 3, 1)[0])
        assert np.array_equal(store.get(keys(1))[keys(1)[0]], vectors(2)[0])
        assert not store.get(keys(1, tower="v"))
        assert (store.dim("image", "t"), store.dim("image", "u"), store.dim("text", "u")) == (8, 3, None)


def test_first_vector_stays() -> None:
    with EmbeddingStore() as store:
        store.put(keys(2), vectors(2))
        store.put(keys(3), vectors(3, seed=9))
        assert np.array_equal(store.get(keys(1))[keys(1)[0]], vectors(2)[0])
        assert len(store) == 3


def test_wrong_vectors_are_refused_whole() -> None:
    with EmbeddingStore() as store:
        store.put(keys(1), vectors(1))
        with pytest.raises(ClipkitError, match="have 8 dimensions here, found 5"):
            store.put(keys(4), vectors(4, dim=5))
        with pytest.raises(ClipkitError, match="not finite"):
            store.put(keys(2, start=1), [[1.0] * 8, [np.nan] * 8])
        with pytest.raises(ClipkitError, match="one vector for each"):
            store.put(keys(3), vectors(2))
        with pytest.raises(ClipkitError, match="SHA-256"):
            store.put([Key(b"x", "image", "t")], vectors(1))
        assert len(store) == 1


def test_threads_and_two_connections(tmp_path: Path) -> None:
    with EmbeddingStore(tmp_path / "s.db") as one, EmbeddingStore(tmp_path / "s.db") as two:
        jobs = [
            threading.Thread(target=s.put, args=(keys(20, start=20 * i), vectors(20)))
            for i, s in enumerate((one, two) * 5)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert len(one) == len(two) == 200


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    failed: list[Exception] = []

    def work(path: Path, i: int, start: threading.Barrier) -> None:
        start.wait()
        try:
            with EmbeddingStore(path) as store:
                store.put(keys(2, start=2 * i), vectors(2))
        except Exception as error:
            failed.append(error)

    for round_ in range(30):
        path, start = tmp_path / str(round_), threading.Barrier(8)
        jobs = [threading.Thread(target=work, args=(path, i, start)) for i in range(8)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert failed == []
        with EmbeddingStore(path) as store:
            assert len(store) == 16


WRITER = """
import sys, numpy as np
from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.files import content_hash
store = EmbeddingStore(sys.argv[1])
rows = np.ones((50, 64), dtype=np.float32)
for b in range(100000):
    store.put([Key(content_hash(f"{b} {i}"), "image", "t") for i in range(50)], rows * b)
    sys.stdout.write(f"{b}\\n"); sys.stdout.flush()  # acknowledged only after put returned
"""


def test_kill_in_the_middle_keeps_every_acknowledged_row(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        acked = [int(child.stdout.readline()) for _ in range(25)]
        os.kill(child.pid, signal.SIGKILL)
        acked += [int(x) for x in child.stdout.read().split("\n")[:-1]]
        child.stdout.close()
        child.wait()
        with EmbeddingStore(path) as store:
            for b in acked:
                wanted = [Key(content_hash(f"{b} {i}"), "image", "t") for i in range(50)]
                found = store.get(wanted)
                assert len(found) == 50
                assert all((row == b).all() for row in found.values())
            assert len(store) % 50 == 0  # no torn batch either
            assert store.query("PRAGMA integrity_check") == [("ok",)]


def test_durability_settings_are_on(tmp_path: Path) -> None:
    with EmbeddingStore(tmp_path / "s.db") as store:
        assert store.query("PRAGMA synchronous") == [(2,)]  # FULL: without it a power cut loses acknowledged rows
        assert store.query("PRAGMA journal_mode") == [("wal",)]


def test_a_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with EmbeddingStore(path) as store:
        store.put(keys(1), vectors(1))
        store.seal()
    data = bytearray(path.read_bytes())
    where = bytes(data).index(vectors(1)[0].tobytes())
    data[where + 3] ^= 4
    path.write_bytes(data)
    with EmbeddingStore(path) as store, pytest.raises(CorruptArtefact, match="checksum"):
        store.get(keys(1))


def test_files_that_are_no_store(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello " * 1000)
    with pytest.raises(CorruptArtefact):
        EmbeddingStore(text)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(CorruptArtefact, match="another kind"):
        EmbeddingStore(other)
    assert text.read_text() == "hello " * 1000
    with pytest.raises(ResourceError):
        EmbeddingStore(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    with EmbeddingStore(tmp_path / "s.db") as store:
        store.query("PRAGMA user_version=99")
    with pytest.raises(UsageError, match="schema 99"):
        EmbeddingStore(tmp_path / "s.db")


def test_sealed_store_reads_without_write_access(tmp_path: Path) -> None:
    path = tmp_path / "s ?#%.db"  # characters that mean something in a URI
    with EmbeddingStore(path) as store:
        store.put(keys(3), vectors(3))
        store.seal()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with EmbeddingStore(path, readonly=True) as store:
        assert len(store.get(keys(3))) == 3
        with pytest.raises(ResourceError, match="readonly"):
            store.put(keys(1, start=9), vectors(1))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_forked_child_is_told() -> None:
    with EmbeddingStore() as store:
        store._owner = -1
        with pytest.raises(ClipkitError, match="forked"):
            store.get(keys(1))
        store._owner = os.getpid()
