from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.embedding import embed as module
from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import BadImage, DataError, ModelError, UsageError
from clipkit.models.fingerprint import fingerprint


@pytest.fixture
def calls(model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass was given."""
    seen: list[int] = []
    original = model.vision_features

    def counted(pixel_values: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixel_values))
        return original(pixel_values)

    monkeypatch.setattr(model, "vision_features", counted)
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_equals_encode_images(model, tiny, tmp_path: Path, workers: int) -> None:
    paths = tiny.write_pictures(tmp_path, range(11))
    found = embed(model, paths, batch_size=4, workers=workers)
    assert torch.equal(found.vectors, model.encode_images(paths, batch_size=4))
    assert (found.rows, found.rejected, found.content) == (list(range(11)), [], [])
    assert found.vectors.dtype == torch.float32
    assert not found.vectors.is_inference()
    assert found.vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 11)


def test_equals_encode_texts_with_repeats_once(model) -> None:
    texts = ["a red photo", "the blue picture", "a red photo", "7"]
    found = embed(model, texts, kind="text")
    assert torch.allclose(found.vectors, model.encode_texts(texts), atol=1e-6)
    assert torch.equal(found.vectors[0], found.vectors[2])


def test_every_kind_of_image(model, tiny, tmp_path: Path) -> None:
    (path,) = tiny.write_pictures(tmp_path, range(1))
    same = [
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        np.asarray(Image.open(path)),
        {"bytes": None, "path": str(path)},
    ]
    found = embed(model, same).vectors
    assert torch.allclose(found, found[:1].expand_as(found), atol=1e-6)


def test_store_computes_each_content_once(model, tiny, tmp_path: Path, calls: list[int]) -> None:
    paths = tiny.write_pictures(tmp_path / "a", range(6)) + tiny.write_pictures(tmp_path / "b", range(4))
    with EmbeddingStore(tmp_path / "s.db") as store:
        first = embed(model, paths, store=store, batch_size=4)
        assert calls == [4, 2]
        again = embed(model, paths[::-1], store=store, batch_size=4)
        assert calls == [4, 2]
        embed(model, [*paths, tiny.picture(77)], store=store)
        assert calls == [4, 2, 1]
    assert torch.equal(first.vectors, again.vectors.flip(0))
    assert torch.equal(first.vectors[:4], first.vectors[6:])
    assert first.content[0] == first.content[6]


def test_the_weights_are_hashed_once_however_many_items(model, tiny, monkeypatch) -> None:
    passes: list[int] = []
    original = fingerprint.xxh3
    monkeypatch.setattr(fingerprint, "xxh3", lambda weights: passes.append(len(weights)) or original(weights))
    with EmbeddingStore() as store:
        embed(model, [tiny.picture(i) for i in range(7)], store=store, batch_size=2)
        assert len(passes) == 2  # the image side and the text side
        embed(model, ["a photo", "a dark square", "red"], kind="text", store=store)
        assert len(passes) == 4
    embed(model, [tiny.picture(0)])
    assert len(passes) == 4


def test_another_model_never_meets_stored_vectors(model, tiny, tmp_path: Path) -> None:
    paths = tiny.write_pictures(tmp_path, range(3))
    other = tiny.tiny_model(seed=5)
    with EmbeddingStore() as store:
        mine, theirs = embed(model, paths, store=store), embed(other, paths, store=store)
        assert len(store) == 6
    assert torch.equal(mine.vectors, embed(model, paths).vectors)
    assert torch.equal(theirs.vectors, embed(other, paths).vectors)
    assert not torch.allclose(mine.vectors, theirs.vectors)


def test_training_the_text_tower_keeps_image_embeddings(tiny, tmp_path: Path) -> None:
    own = tiny.tiny_model(seed=3)
    with EmbeddingStore() as store:
        embed(own, [tiny.picture(0)], store=store)
        embed(own, ["a photo"], kind="text", store=store)
        with torch.no_grad():
            for name, weight in own.named_parameters():
                if own.backend.belongs_to("text", name.removeprefix("backend.")):
                    weight.add_(0.1)
        embed(own, [tiny.picture(0)], store=store)
        assert len(store) == 2
        embed(own, ["a photo"], kind="text", store=store)
        assert len(store) == 3


def bad_files(folder: Path) -> dict[str, Path]:
    files = {"EMPTY": folder / "empty.png", "NOT_IMAGE": folder / "page.jpg", "MISSING": folder / "none.png"}
    files["EMPTY"].write_bytes(b"")
    files["NOT_IMAGE"].write_text("<html>not found</html>")
    return files


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_skip_lists_every_bad_item_and_loses_none(model, tiny, tmp_path: Path, stored: bool, workers: int) -> None:
    good, bad = tiny.write_pictures(tmp_path, range(3)), bad_files(tmp_path)
    items = [good[0], bad["EMPTY"], bad["MISSING"], good[1], bad["EMPTY"], bad["NOT_IMAGE"], good[2]]
    with EmbeddingStore() as store:
        found = embed(model, items, store=store if stored else None, on_bad="skip", batch_size=2, workers=workers)
    assert found.rows == [0, 3, 6]
    assert [(r.row, r.code) for r in found.rejected] == [(1, "EMPTY"), (2, "MISSING"), (4, "EMPTY"), (5, "NOT_IMAGE")]
    assert "none.png" in str(found.rejected[1].where)
    assert torch.allclose(found.vectors, model.encode_images(good), atol=1e-6)
    with pytest.raises(BadImage):
        embed(model, items, workers=workers)


def test_all_bad_and_nothing(model, tmp_path: Path) -> None:
    assert embed(model, list(bad_files(tmp_path).values()), on_bad="skip").vectors.shape == (0, 16)
    for kind in ("image", "text"):
        with EmbeddingStore() as store:
            assert embed(model, [], kind=kind, store=store).vectors.shape == (0, 16)


def test_bad_texts(model) -> None:
    with pytest.raises(DataError, match="NOT_TEXT"):
        embed(model, ["a photo", None], kind="text")
    found = embed(model, ["a photo", "  ", 3.5], kind="text", on_bad="skip")
    assert [(r.row, r.code) for r in found.rejected] == [(1, "EMPTY_TEXT"), (2, "NOT_TEXT")]


def test_wrong_options(model) -> None:
    with pytest.raises(UsageError, match="list of items"):
        embed(model, "a photo", kind="text")
    with pytest.raises(UsageError, match="kind"):
        embed(model, [], kind="audio")
    with pytest.raises(UsageError, match="batch_size"):
        embed(model, [], batch_size=0)


@pytest.mark.parametrize("stored", [False, True])
def test_an_embedding_that_is_not_finite_is_named_and_not_stored(tiny, tmp_path: Path, stored: bool) -> None:
    own, paths = tiny.tiny_model(), tiny.write_pictures(tmp_path, range(5))
    original = own.backend.project_image
    own.backend.project_image = lambda features: original(features).index_fill(0, torch.tensor([1]), torch.nan)
    with EmbeddingStore() as store:
        with pytest.raises(ModelError, match="NaN or infinity for 1 of 4") as error:
            embed(own, paths, batch_size=4, store=store if stored else None)
        assert len(store) == 0
    assert "001.png" in str(error.value.where)


def test_what_was_done_before_an_error_is_kept(model, tiny, tmp_path: Path, calls: list[int]) -> None:
    paths = tiny.write_pictures(tmp_path, range(5))
    broken = paths[4].read_bytes()[:60]
    with EmbeddingStore(tmp_path / "s.db") as store:
        with pytest.raises(BadImage):
            embed(model, [*paths[:4], broken], store=store, batch_size=2)
        assert len(store) == 4
        embed(model, paths, store=store, batch_size=2)
    assert sum(calls) == 5


def test_a_file_that_changes_meanwhile_is_not_stored_under_the_old_content(model, tiny, tmp_path, monkeypatch) -> None:
    paths = tiny.write_pictures(tmp_path, range(2))
    original = module.identify

    def then_change(*args, **kwargs):
        work = original(*args, **kwargs)
        tiny.picture(99).save(paths[1])
        return work

    monkeypatch.setattr(module, "identify", then_change)
    with EmbeddingStore() as store:
        found = embed(model, paths, store=store, on_bad="skip")
        assert [r.code for r in found.rejected] == ["CHANGED"]
        assert len(store) == 1


def test_training_mode_comes_back(tiny) -> None:
    own = tiny.tiny_model()
    own.train()
    next(module for module in own.modules() if isinstance(module, torch.nn.LayerNorm)).eval()  # as a user may freeze
    before = [m.training for m in own.modules()]
    embed(own, [tiny.picture(0)])
    assert [m.training for m in own.modules()] == before
    assert len(set(before)) == 2


def test_progress_changes_nothing(model, tiny) -> None:
    found = embed(model, [tiny.picture(i) for i in range(4)], batch_size=2, progress=True)
    assert torch.equal(found.vectors, embed(model, [tiny.picture(i) for i in range(4)], batch_size=2).vectors)


def test_long_texts_are_told_once_with_totals(tiny, caplog: pytest.LogCaptureFixture) -> None:
    own = tiny.tiny_model()
    length = own.processor.context_length
    texts = [*(f"{number} " + "a " * length for number in range(30)), *(f"number {number}" for number in range(70))]
    said = f"30 of 100 texts were cut at {length} tokens"
    embed(own, texts, kind="text", batch_size=8)
    assert caplog.messages == [said]
    embed(own, texts, kind="text", batch_size=8)  # the next evaluation
    embed(own, texts[:20], kind="text")
    own.encode_texts(texts)
    assert caplog.messages == [said]
    embed(own, ["b " + texts[0], *texts], kind="text")
    assert caplog.messages[1:] == [f"31 of 101 texts were cut at {length} tokens"]
