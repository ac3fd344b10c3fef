"""Searching an index: hits, queries, and the model that the index opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clipkit.errors import BadImage, ModelMismatch, UsageError
from clipkit.search import matrix
from clipkit.search.hits import highest
from clipkit.search.index import EmbeddingIndex


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
