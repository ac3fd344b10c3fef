from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, DataError, ModelError, UsageError
from clipkit.evaluation.retrieval import RetrievalEvaluator


def pairs_of(images: list[Path], texts: list[list[str]], **columns: list) -> datasets.Dataset:
    table = {"image": [str(path) for path in images], "texts": texts, **columns}
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))


@pytest.fixture
def images(tiny, tmp_path: Path) -> list[Path]:
    return tiny.write_pictures(tmp_path, range(13))


def captions(n: int) -> list[list[str]]:
    return [[f"number {i} .", f"a photo of {i}"][: 1 + i % 2] for i in range(n)]


def brute_recall(scores: np.ndarray, good: np.ndarray, k: int) -> float:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(np.mean([good[i, row].any() for i, row in enumerate(best)]))


def test_equals_brute_force(model, images) -> None:
    texts = captions(13)
    evaluator = RetrievalEvaluator(pairs_of(images, texts), name="unseen/retrieval", ks=(1, 3, 100))
    found = evaluator(model)
    flat, owner = [t for own in texts for t in own], np.array([i for i, own in enumerate(texts) for _ in own])
    scores = (model.encode_texts(flat) @ model.encode_images(images).T).numpy()
    good = owner[:, None] == np.arange(13)[None]
    for way, s, g in (("text_to_image", scores, good), ("image_to_text", scores.T, good.T)):
        for k in (1, 3, 100):
            assert found[f"unseen/retrieval/{way}_recall@{k}"] == pytest.approx(brute_recall(s, g, k))
        ranks = [1 + (row > row[ok].max()).sum() for row, ok in zip(s, g, strict=True)]
        assert found[f"unseen/retrieval/{way}_median_rank"] == np.median(ranks)
    assert len(found) == 8
    assert evaluator.n() == {
        "unseen/retrieval/images": 13,
        "unseen/retrieval/texts": 19,
        "unseen/retrieval/duplicate_images": 0,
        "unseen/retrieval/duplicate_texts": 0,
    }
    assert evaluator.last is not None
    assert evaluator.last.metrics == found
    for confusion in evaluator.last.most_confused("text_to_image"):
        assert confusion.margin < 0
        assert not good[confusion.query, confusion.found]
        assert scores[confusion.query].argmax() == confusion.found
    margins = [c.margin for c in evaluator.last.most_confused("text_to_image")]
    assert margins == sorted(margins)


def test_chance_is_what_random_embeddings_score(images) -> None:
    evaluator = RetrievalEvaluator(pairs_of(images, captions(13)))
    chance = evaluator.chance()
    assert chance["retrieval/text_to_image_recall@1"] == pytest.approx(1 / 13)
    assert chance["retrieval/text_to_image_recall@10"] == pytest.approx(10 / 13)
    assert chance["retrieval/image_to_text_recall@1"] == pytest.approx((7 * 1 + 6 * 2) / 13 / 19)
    ways = "text_to_image", "image_to_text"
    assert list(chance) == [f"retrieval/{way}_recall@{k}" for way in ways for k in (1, 5, 10)]


def constant(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed model: the same embedding for everything."""
    unit = torch.nn.functional.normalize(torch.ones(1, 16), dim=1)
    monkeypatch.setattr(model.backend, "project_image", lambda features: unit.repeat(len(features), 1))
    monkeypatch.setattr(model.backend, "embed_text", lambda ids, mask, **more: unit.repeat(len(ids), 1))


def test_a_collapsed_model_scores_chance_exactly(model, images, monkeypatch) -> None:
    constant(model, monkeypatch)
    for group in (None, "kind"):
        evaluator = RetrievalEvaluator(pairs_of(images, captions(13), kind=[i % 3 for i in range(13)]), group=group)
        found = evaluator(model)
        for key, value in evaluator.chance().items():
            assert found[key] == pytest.approx(value, abs=1e-12)


def test_a_model_that_gives_nan_has_no_score(model, images, monkeypatch) -> None:
    monkeypatch.setattr(model.backend, "project_image", lambda features: torch.full((len(features), 16), torch.nan))
    with pytest.raises(ModelError, match="NaN or infinity"):
        RetrievalEvaluator(pairs_of(images, captions(13)))(model)


def test_everything_of_a_group_is_correct(model, images) -> None:
    kinds = ["x", "y", "x", "z", "y", "x", "z", "z", "z", "w", "x", "y", "w"]
    texts = [[f"number {i}"] for i in range(13)]
    evaluator = RetrievalEvaluator(pairs_of(images, texts, kind=kinds), group="kind")
    scores = (model.encode_texts([t for own in texts for t in own]) @ model.encode_images(images).T).numpy()
    good = np.array(kinds)[:, None] == np.array(kinds)[None]
    found = evaluator(model)
    for k in (1, 5, 10):
        assert found[f"retrieval/text_to_image_recall@{k}"] == pytest.approx(brute_recall(scores, good, k))
        assert found[f"retrieval/image_to_text_recall@{k}"] == pytest.approx(brute_recall(scores.T, good.T, k))


def test_equal_captions_and_equal_images_are_one(model, tiny, tmp_path: Path) -> None:
    # images 0 and 1 are the same bytes; "shared" is a caption of 1 and of 2
    a, b, c = tiny.write_pictures(tmp_path, range(3))
    b.write_bytes(a.read_bytes())
    evaluator = RetrievalEvaluator(pairs_of([a, b, c], [["first"], ["shared"], ["shared", "third"]]))
    towards_images, towards_texts = evaluator._relevance()
    assert towards_images.counts().tolist() == [2, 3, 3, 1]
    assert towards_texts.counts().tolist() == [3, 3, 3]  # "first" and "shared" twice; "shared" twice and "third"
    assert evaluator.n()["retrieval/duplicate_images"] == evaluator.n()["retrieval/duplicate_texts"] == 1
    evaluator(model)
    assert evaluator.last is not None
    assert evaluator.last.image_to_text.above[0] == evaluator.last.image_to_text.above[1]


def test_bad_images(model, images) -> None:
    images[4].write_bytes(images[4].read_bytes()[:70])  # fails to decode
    images[7].unlink()  # fails to open
    pairs = pairs_of(images, captions(13), kind=[i % 3 for i in range(13)])
    with pytest.raises(BadImage):
        RetrievalEvaluator(pairs)(model)
    left = [i for i in range(13) if i not in (4, 7)]
    for group in (None, "kind"):
        evaluator = RetrievalEvaluator(pairs, on_bad="skip", group=group)
        found = evaluator(model)
        assert found == RetrievalEvaluator(pairs.select(left), group=group)(model)
        assert sorted((r.row, r.code) for r in evaluator.rejected) == [(4, "TRUNCATED"), (7, "MISSING")]
        assert evaluator.n()["retrieval/images"] == 11
        assert evaluator(model) == found
        assert len(evaluator.rejected) == 2


def test_a_store_saves_the_work_and_changes_nothing(model, images, tmp_path: Path, monkeypatch) -> None:
    pairs = pairs_of(images, captions(13))
    plain = RetrievalEvaluator(pairs)(model)
    with EmbeddingStore(tmp_path / "s.db") as store:
        assert RetrievalEvaluator(pairs, store=store)(model) == plain
        monkeypatch.setattr(model, "vision_features", None)
        assert RetrievalEvaluator(pairs, store=store)(model) == plain


def test_wrong_data(images) -> None:
    with pytest.raises(UsageError, match="column 'kind'"):
        RetrievalEvaluator(pairs_of(images, captions(13)), group="kind")
    with pytest.raises(DataError, match="row 1"):
        RetrievalEvaluator(pairs_of(images[:2], [["a"], []]))
    with pytest.raises(DataError, match="no row"):
        RetrievalEvaluator(pairs_of(images, captions(13)).select([]))
    with pytest.raises(DataError, match="1 have none"):
        RetrievalEvaluator(pairs_of(images[:2], captions(2), kind=["a", None]), group="kind")
    with pytest.raises(UsageError, match="ks"):
        RetrievalEvaluator(pairs_of(images, captions(13)), ks=(0, 1))
