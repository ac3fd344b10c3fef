"""The features of a frozen text tower: each caption once, and the same training as without them."""

import numpy as np
import pytest
import runs
import tiny
import torch

from clipkit import EmbeddingStore, RetrievalEvaluator, TrainConfig, Trainer
from clipkit.embedding.text_features import with_features, with_text_features
from clipkit.errors import UsageError
from clipkit.evaluation.validation_loss import ValidationLoss


def frozen(*parts, seed=0):
    model = tiny.make_model(seed=seed, dropout=0.1)
    for part in parts:
        model.freeze(part)
    return model


class Counting:
    """How many texts and images went through the towers of a model, without the few that checks look at."""

    def __init__(self, model):
        self.texts = self.images = 0
        model.backend.text.register_forward_pre_hook(self._count_texts, with_kwargs=True)
        model.backend.vision.register_forward_pre_hook(self._count_images, with_kwargs=True)

    def _count_texts(self, module, args, kwargs):
        count = len(kwargs["input_ids"])
        self.texts += count if count > 4 else 0

    def _count_images(self, module, args, kwargs):
        count = len(kwargs["pixel_values"])
        self.images += count if count > 4 else 0


def losses(folder, model, pairs, evaluators=(), **changes):
    settings = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "augmentation": "none", "log_every": 1}
    config = TrainConfig(str(folder), progress=False, **{**settings, **changes})
    result = Trainer(model, pairs, config, evaluators=evaluators).train()
    return [line["loss"] for line in result.history if "loss" in line], result


@pytest.mark.parametrize("parts", [("text",), ("image", "text")])
def test_training_on_features_is_training_on_the_texts(tmp_path, pairs, parts):
    plain, _ = losses(tmp_path / "texts", frozen(*parts), pairs)
    model = frozen(*parts)
    kept = with_features(model, pairs)
    counting = Counting(model)
    kept_losses, _ = losses(tmp_path / "features", model, kept)
    assert counting.texts == 0
    assert (counting.images == 0) == ("image" in parts)
    assert kept_losses == pytest.approx(plain, abs=1e-6)


def test_each_caption_is_computed_once(pairs, tmp_path):
    texts = [text for own in pairs["texts"] for text in own]
    doubled = type(pairs).from_list([*pairs.to_list(), *pairs.to_list()], features=pairs.features)
    model = frozen("text")
    counting = Counting(model)
    with EmbeddingStore(tmp_path / "features.sqlite") as store:
        kept = with_text_features(model, doubled, store=store)
        assert counting.texts == len(set(texts)) == 64
        with_text_features(model, pairs, store=store)
        assert counting.texts == 64
        other = frozen("text", seed=1)
        counted = Counting(other)
        with_text_features(other, pairs, store=store)
        assert counted.texts == 64
    with torch.inference_mode():
        expected = model.text_features(**model.processor.texts(pairs[3]["texts"])).numpy()
    assert np.allclose(np.array(kept[3]["text_features"]), expected, atol=1e-6)
    assert np.allclose(np.array(kept[35]["text_features"]), expected, atol=1e-6)


def test_evaluations_embed_no_text_twice(tmp_path, pairs):
    model = frozen("image", "text")
    counting = Counting(model)
    with EmbeddingStore(tmp_path / "features.sqlite") as store:
        kept = with_features(model, pairs, store=store)
        measures = [RetrievalEvaluator(pairs, features=store), ValidationLoss(pairs, features=store)]
        _, result = losses(tmp_path / "run", model, kept, measures, evaluate_every=2)
    assert (counting.texts, counting.images) == (64, 32)
    plain = frozen("image", "text")
    measures = [RetrievalEvaluator(pairs), ValidationLoss(pairs)]
    _, expected = losses(tmp_path / "plain", plain, pairs, measures, evaluate_every=2)
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-5)


def test_one_of_several_captions_is_drawn_with_its_own_features(tmp_path, pairs):
    model = frozen("text")
    kept = with_features(model, pairs)
    trainer = Trainer(model, kept, TrainConfig(str(tmp_path / "run"), batch_size=16, max_steps=4, progress=False))
    plain = Trainer(model, pairs, TrainConfig(str(tmp_path / "plain"), batch_size=16, max_steps=4, progress=False))
    for batch, tokens in zip(trainer.loader.batches(0, 4), plain.loader.batches(0, 4), strict=True):
        assert batch.keys["row"].equal(tokens.keys["row"])
        inputs = {name: tokens.inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            assert torch.allclose(model.text_features(**inputs), batch.inputs["text_features"], atol=1e-6)


def test_what_needs_tokens_is_refused(pairs, tmp_path):
    with pytest.raises(UsageError, match="a frozen tower"):
        with_features(frozen(), pairs)
    with pytest.raises(UsageError, match="a frozen tower"):
        with_text_features(frozen("image"), pairs)
    model = frozen("text")
    kept = with_features(model, pairs).add_column("hard_texts", ["a red square"] * len(pairs))
    with pytest.raises(UsageError, match="hard texts need tokens"):
        Trainer(model, kept, TrainConfig(str(tmp_path / "run"), batch_size=8, progress=False))


def shared(path):
    from clipkit import distributed

    model = frozen("text")
    counting = Counting(model)
    with EmbeddingStore(path) as store:
        pairs = with_text_features(model, tiny.make_pairs(), store=store, batch_size=10)
    return distributed.all_gather_object(counting.texts), pairs["text_features"]


def test_two_processes_share_the_work(tmp_path):
    counts, features = runs.on_ranks(shared, 2, tmp_path / "features.sqlite")
    assert sum(counts) in (60, 64)  # the last four count as a check's
    assert min(counts) > 0
    alone = with_text_features(frozen("text"), tiny.make_pairs(), batch_size=10)["text_features"]
    assert np.allclose(np.array(features), np.array(alone), atol=1e-6)
