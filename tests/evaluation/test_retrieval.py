from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from clipkit.data.pairs import load_pairs
from clipkit.embedding.items import EmbedResult
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, DataError, ModelError, UsageError
from clipkit.evaluation import retrieval
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
    assert evaluator.counts() == {
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
    monkeypatch.setattr(model.backend, "project_text", lambda features: unit.repeat(len(features), 1))


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


def test_class_folders_have_as_many_captions_as_classes(model, tiny, tmp_path: Path) -> None:
    for number, name in enumerate(["cat", "dog", "sea_lion"]):
        tiny.write_pictures(tmp_path / name, range(5 * number, 5 * number + 5))
    evaluator = RetrievalEvaluator(load_pairs(tmp_path))
    found, chance, n = evaluator(model), evaluator.chance(), evaluator.counts()
    assert found["retrieval/image_to_text_recall@5"] == chance["retrieval/image_to_text_recall@5"] == 1.0
    assert chance["retrieval/image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert chance["retrieval/text_to_image_recall@5"] == pytest.approx(1 - hypergeom.pmf(0, 15, 5, 5))
    assert n == {f"retrieval/{k}": v for k, v in COUNTS.items()}


COUNTS = {"images": 15, "texts": 3, "duplicate_images": 0, "duplicate_texts": 12}


def test_equal_captions_take_one_rank(model, images, monkeypatch: pytest.MonkeyPatch) -> None:
    # worked by hand: columns are the scores of "cat" and "dog"
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])

    def embedded(model, items, *, kind, **options) -> EmbedResult:
        vectors = torch.eye(2) if kind == "text" else scores
        assert len(items) == len(vectors)
        return EmbedResult(vectors, list(range(len(vectors))), [], [])

    monkeypatch.setattr(retrieval, "embed", embedded)
    evaluator = RetrievalEvaluator(pairs_of(images[:6], [["cat"]] * 3 + [["dog"]] * 3), name="r", ks=(1, 2))
    assert evaluator(model) == {
        "r/text_to_image_recall@1": 0.5,  # cat finds a cat, dog the third cat and then a dog
        "r/text_to_image_recall@2": 1.0,
        "r/image_to_text_recall@1": 0.5,  # the third cat and two dogs are taken for the other
        "r/image_to_text_recall@2": 1.0,
        "r/text_to_image_median_rank": 1.5,
        "r/image_to_text_median_rank": 1.5,
    }
    assert evaluator.chance() == pytest.approx(
        {
            "r/text_to_image_recall@1": 1 / 2,
            "r/text_to_image_recall@2": 1 - 3 / 15,  # both of the wrong three
            "r/image_to_text_recall@1": 1 / 2,
            "r/image_to_text_recall@2": 1.0,
        }
    )
    assert evaluator.last is not None
    assert [(c.query, c.found) for c in evaluator.last.most_confused("image_to_text")] == [(2, 1), (5, 0), (4, 0)]
    assert (evaluator.last.texts, evaluator.last.image_of_text) == (["cat", "dog"], [0, 3])


@pytest.mark.parametrize("group", [None, "kind"])
def test_copies_equal_brute_force(model, tiny, tmp_path: Path, group: str | None) -> None:
    random = np.random.default_rng(0)
    paths = tiny.write_pictures(tmp_path, range(24))
    for copy, original in ((5, 2), (9, 2), (17, 11)):
        paths[copy].write_bytes(paths[original].read_bytes())
    texts = [[f"number {i}" for i in random.integers(0, 14, size=1 + row % 3)] for row in range(24)]
    kinds = random.integers(0, 9, size=24).tolist()
    evaluator = RetrievalEvaluator(pairs_of(paths, texts, kind=kinds), group=group, ks=(1, 3, 10))
    found, chance = evaluator(model), evaluator.chance()

    content = [path.read_bytes() for path in paths]
    every, shown = sorted({t for own in texts for t in own}), sorted(set(content))
    good = np.zeros((len(every), len(shown)), bool)
    for one in range(24):
        for other in range(24):
            if one == other if group is None else kinds[one] == kinds[other]:
                for text in texts[one]:
                    good[every.index(text), shown.index(content[other])] = True
    scores = (model.encode_texts(every) @ model.encode_images([paths[content.index(c)] for c in shown]).T).numpy()
    assert good.shape == (len({t for own in texts for t in own}), 21)
    for way, s, g in (("text_to_image", scores, good), ("image_to_text", scores.T, good.T)):
        for k in (1, 3, 10):
            assert found[f"retrieval/{way}_recall@{k}"] == pytest.approx(brute_recall(s, g, k))
            lucky = [1 - hypergeom.pmf(0, g.shape[1], int(row.sum()), min(k, g.shape[1])) for row in g]
            assert chance[f"retrieval/{way}_recall@{k}"] == pytest.approx(np.mean(lucky))
    total = sum(map(len, texts))
    assert list(evaluator.counts().values()) == [21, len(every), 3, total - len(every)]
    assert evaluator.last is not None
    for row, text in zip(evaluator.last.image_of_text, evaluator.last.texts, strict=True):
        assert text in [
            t for i, own in enumerate(texts) if content[i] == content[evaluator.last.images[row]] for t in own
        ]


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
        assert evaluator.counts()["retrieval/images"] == 11
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
