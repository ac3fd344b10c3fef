"""A saved model, a folder of photos, and an index of many rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipkit.embedding.store import EmbeddingStore, Key
from clipkit.search.index import EmbeddingIndex
from clipkit.search.index_file import Entry, Header, write_index
from clipkit.search.matrix import ROWS_PER_TILE


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
