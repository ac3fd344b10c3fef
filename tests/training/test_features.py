"""The features of a locked tower: kept by content, augmentation and tower, and the same training as without them."""

import json
from unittest import mock

import numpy as np
import pytest
import runs
import tiny

from clipkit import DualEncoder, EmbeddingStore, RetrievalEvaluator, RunConfig, TrainConfig, Trainer, run
from clipkit.data.batches.augment import augment
from clipkit.data.batches.plan import hash64
from clipkit.embedding.image_features import with_image_features
from clipkit.errors import BadImage, ConfigError, UsageError
from clipkit.files import content_hash
from clipkit.images.load import load_image
from clipkit.training.config.model import LoraConfig, ModelConfig
from clipkit.training.run import open_model


def locked(seed=0):
    return tiny.make_model(seed=seed, dropout=0.1).freeze("image")


def losses(folder, model, pairs, **changes):
    settings = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "augmentation": "none", "log_every": 1}
    result = Trainer(model, pairs, TrainConfig(str(folder), progress=False, **{**settings, **changes})).train()
    return [line["loss"] for line in result.history], result


class Counting:
    """How many images went through the tower of a model, without the few that fingerprints and checks look at."""

    def __init__(self, model):
        self.images = 0
        model.backend.vision.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        count = len(kwargs["pixel_values"])
        self.images += count if count > 4 else 0


def test_training_on_features_is_training_on_the_images(tmp_path, pairs):
    plain, _ = losses(tmp_path / "images", locked(), pairs)
    model = locked()
    kept = with_image_features(model, pairs)
    counting = Counting(model)
    locked_losses, _ = losses(tmp_path / "features", model, kept)
    assert counting.images == 0
    assert len(locked_losses) == 12
    assert locked_losses == pytest.approx(plain, abs=1e-6)


def test_a_second_run_computes_nothing_and_another_tower_everything(tmp_path, pairs):
    def computed(model, **options):
        counting = Counting(model)
        with EmbeddingStore(tmp_path / "features.sqlite") as store:
            column = with_image_features(model, pairs, store=store, **options)["image_features"]
        return counting.images, np.asarray(column, dtype=np.float32)

    first, again = computed(locked()), computed(locked())
    assert (first[0], again[0]) == (32, 0)
    assert np.array_equal(first[1], again[1])
    other_head = locked()
    other_head.backend.image_head.weight.data.mul_(2)  # trains on, and is no part of what is kept
    assert computed(other_head)[0] == 0
    assert computed(locked(seed=1))[0] == 32
    assert computed(locked(), augmentation="crop", draws=2)[0] == 64
    assert computed(locked(), augmentation="crop", draws=3)[0] == 32  # two are there
    assert computed(locked(), augmentation="affine", draws=1)[0] == 32


def test_versions_are_of_the_content_and_steps_draw_among_them(tmp_path, pairs):
    model = locked()
    kept = with_image_features(model, pairs, augmentation="affine", draws=3)
    data = pairs[5]["image"]["bytes"]
    seed = int.from_bytes(content_hash(data)[:8], "little")
    for draw, features in enumerate(kept[5]["image_features"]):
        pixels = model.processor.images([augment(load_image(data), "affine", hash64(seed, draw))])
        assert np.allclose(model.vision_features(pixels).detach().numpy()[0], features, atol=1e-6)
    trainer = Trainer(model, kept, TrainConfig(str(tmp_path / "run"), batch_size=32, max_steps=8, progress=False))
    cells = {row: np.asarray(kept[row]["image_features"], dtype=np.float32) for row in range(len(kept))}
    drawn = set()
    for batch in trainer.loader.batches(0, 8):
        for row, vector in zip(batch.keys["row"].tolist(), batch.inputs["image_features"].numpy(), strict=True):
            (place,) = np.flatnonzero((cells[row] == vector).all(axis=1))
            drawn.add((row, int(place)))
    assert len(drawn) > 80  # of 96
    again = [batch.inputs["image_features"] for batch in trainer.loader.batches(3, 4)]
    assert again[0].equal(next(iter(trainer.loader.batches(3, 4))).inputs["image_features"])


def test_an_image_that_cannot_be_used_stops_the_run_or_is_listed_as_without_features(tmp_path, pairs):
    rows = pairs.to_list()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:30]
    rows[7]["image"]["bytes"] = b""
    broken = type(pairs).from_list(rows, features=pairs.features)
    with pytest.raises(BadImage):
        with_image_features(locked(), broken)
    plain, listed = losses(tmp_path / "images", locked(), broken, on_bad="skip")
    model = locked()
    locked_losses, same = losses(
        tmp_path / "features", model, with_image_features(model, broken, on_bad="skip"), on_bad="skip"
    )
    assert locked_losses == pytest.approx(plain, abs=1e-6)
    assert same.rejected == listed.rejected
    assert [row["row"] for row in same.rejected] == [3, 7]
    with pytest.raises(BadImage, match=r"TRUNCATED|EMPTY"):
        losses(tmp_path / "stop", locked(), with_image_features(model, broken, on_bad="skip"))


def test_a_tower_that_trains_has_no_features_to_keep(pairs, tmp_path):
    with pytest.raises(UsageError, match="a frozen tower"):
        with_image_features(tiny.make_model().freeze("image", blocks=1), pairs)
    basic = ["model.name=a/b", "data.train=b.csv", f"train.output_dir={tmp_path}", "data.features=f.sqlite"]
    with pytest.raises(ConfigError, match=r"of a frozen tower(?s:.)*model.freeze=image"):
        RunConfig.load(None, basic)
    RunConfig.load(None, [*basic, "model.freeze=[image]"])
    with pytest.raises(ConfigError, match="num_augmentations`: input should be greater than 0, found 0"):
        RunConfig.load(None, [*basic, "model.freeze=[image]", "data.num_augmentations=0"])


def shared(path):
    from clipkit import distributed

    model = locked()
    counting = Counting(model)
    with EmbeddingStore(path) as store:
        pairs = with_image_features(model, tiny.make_pairs(), store=store, batch_size=5)
    return distributed.all_gather_object(counting.images), pairs["image_features"]


def test_two_processes_share_the_work(tmp_path):
    counts, shared_features = runs.on_ranks(shared, 2, tmp_path / "features.sqlite")
    assert counts == [15, 15]  # 7 batches; the last, of two images, is not counted
    alone = with_image_features(locked(), tiny.make_pairs(), batch_size=5)["image_features"]
    assert np.array_equal(np.asarray(shared_features), np.asarray(alone))
    assert runs.on_ranks(shared, 2, tmp_path / "features.sqlite")[0] == [0, 0]


@pytest.fixture
def yaml_run(tmp_path):
    """Trains from a config with a locked tower; gives the loss of each step and the images its tower saw."""
    tiny.make_model().save_pretrained(tmp_path / "model")
    tiny.write_pairs(tmp_path)

    def train(name, *settings):
        basic = [f"model.name={tmp_path / 'model'}", "model.freeze=[image]", f"data.train={tmp_path / 'pairs.jsonl'}"]
        loop = ["train.batch_size=8", "train.epochs=2", "train.log_every=1", "train.progress=false"]
        loop += [f"train.output_dir={tmp_path / name}", "data.test=0.25"]
        counts = []

        def opened(config):
            counts.append(Counting(model := open_model(config)))
            return model

        with mock.patch.dict(run.__globals__, open_model=opened):
            done = run(RunConfig.load(None, [*basic, *loop, *settings]))
        return [line["loss"] for line in done.result.history if "loss" in line], counts[0].images

    return train


def test_a_config_names_the_file(yaml_run, tmp_path):
    plain, images = yaml_run("plain", "train.augmentation=none")
    assert len(plain) == 6
    assert images == 2 * 24 + 2 * 8  # two epochs, two evaluations of what is held out
    kept = f"data.features={tmp_path / 'kept' / 'features.sqlite'}"
    first, images = yaml_run("first", "train.augmentation=none", kept)
    assert images == 24 + 8  # each once
    assert first == pytest.approx(plain, abs=1e-6)
    second, images = yaml_run("second", "train.augmentation=none", kept)
    assert images == 0
    assert second == first
    cropped, images = yaml_run("cropped", kept, "data.num_augmentations=2")
    assert images == 2 * 24
    assert cropped != pytest.approx(first, abs=1e-3)
    plain, first = (json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("plain", "first"))
    assert first == plain


def test_evaluations_of_a_locked_tower_go_by_its_features(tmp_path, pairs):
    rows = pairs.to_list()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:30]
    broken = type(pairs).from_list(rows, features=pairs.features)
    options = {"on_bad": "skip", "batch_size": 8}
    plain = RetrievalEvaluator(broken, **options)
    with EmbeddingStore(tmp_path / "features.sqlite") as store:
        quick = RetrievalEvaluator(broken, features=store, **options)
        model = locked()
        counting = Counting(model)
        assert quick(model) == plain(model)
        assert quick.rejected == plain.rejected
        before = counting.images
        model.backend.image_head.weight.data.copy_(tiny.make_model(seed=3).backend.image_head.weight)
        quick_losses = quick(model)
        assert counting.images == before  # another head, the same tower
        assert quick_losses == plain(model)
        kept = len(store)
        assert quick(tiny.make_model(seed=1)) == plain(tiny.make_model(seed=1))  # not locked: through the tower
        assert len(store) == kept == 31
        with pytest.raises(BadImage):
            RetrievalEvaluator(broken, features=store)(locked())


def test_features_that_are_not_used_are_told(tmp_path, pairs, caplog):
    model = tiny.make_model().freeze("image")
    model.card = model.card.updated({"config": {"model": {"freeze": ("image",)}}})
    model.save_pretrained(tmp_path / "locked")
    opened = DualEncoder.from_pretrained(tmp_path / "locked")
    with EmbeddingStore(tmp_path / "features.sqlite") as store:
        evaluator = RetrievalEvaluator(pairs, features=store)
        caplog.clear()
        evaluator(opened)
        evaluator(opened)
        assert [
            message
            for message in caplog.messages
            if "kept features are not used" in message and "model.freeze" in message
        ]
        assert len(caplog.messages) == 1
        evaluator(opened.freeze("image"))
    caplog.clear()
    open_model(ModelConfig(str(tmp_path / "locked")))
    said = "was trained with a frozen image tower, which is trained now: model.freeze=image freezes it again"
    assert [message for message in caplog.messages if said in message]
    caplog.clear()
    for kept in ({"freeze": ("image",)}, {"freeze_blocks": {"image": 1}}, {"lora": LoraConfig("both")}):
        open_model(ModelConfig(str(tmp_path / "locked"), **kept))
    assert not [message for message in caplog.messages if said in message]
