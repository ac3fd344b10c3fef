"""What the config asks of the batches, through the Trainer."""

import dataclasses

import pytest
import tiny
from runs import on_ranks

from clipkit import TrainConfig, Trainer, distributed
from clipkit.data.batches import collate
from clipkit.errors import ConfigError
from clipkit.images.load import load_image
from clipkit.training.config.run import RunConfig


def trainer(folder, pairs, make_model, **changes):
    settings = {"batch_size": 8, "max_steps": 2, "log_every": 1, "augmentation": "none", **changes}
    return Trainer(make_model(), pairs, TrainConfig(str(folder), **settings))


def batches(setup, steps):
    return list(setup.loader.batches(0, steps))


def test_distinct_reaches_the_batches_and_is_told(tmp_path, pairs, make_model, capsys):
    plain = trainer(tmp_path / "plain", pairs, make_model)
    assert any(len({pairs[row]["colour"] for row in b.keys["row"].tolist()}) < 8 for b in batches(plain, 4))
    apart = trainer(tmp_path / "apart", pairs, make_model, distinct=("texts", "colour"))
    for batch in batches(apart, 8):
        assert len({pairs[row]["colour"] for row in batch.keys["row"].tolist()}) == 8
    apart.train()
    assert "distinct: 0 of 32 rows are left out an epoch" in capsys.readouterr().err


def test_balanced_and_grouped_reach_the_batches(tmp_path, pairs, make_model):
    rare = pairs.select([row for row in range(32) if row % 4 or row < 8])  # two of "left", eight of the others
    balanced = trainer(tmp_path / "balanced", rare, make_model, balanced="place")
    for batch in batches(balanced, 3):
        places = [rare[row]["place"] for row in batch.keys["row"].tolist()]
        assert {places.count(place) for place in set(places)} <= {1, 2, 3}
        assert "left" in places
    grouped = trainer(tmp_path / "grouped", pairs, make_model, grouped="colour", group_size=4)
    for batch in batches(grouped, 4):
        assert len({pairs[row]["colour"] for row in batch.keys["row"].tolist()}) == 2


def _seen(folder, pairs):
    """Of every step what each chunk of each rank holds, as the model is given it."""
    trained = trainer(folder, pairs, tiny.make_model, distinct=("texts", "colour"), batch_size=7, micro_batch=2)
    seen = [[chunk["input_ids"].tolist() for chunk in batch.split(2)] for batch in trained.loader.batches(0, 6)]
    return distributed.all_gather_object(seen)


def test_two_ranks_and_their_chunks_hold_nothing_twice(tmp_path, pairs):
    twins = [{**row, "texts": row["texts"] if i % 3 else [f"{row['place']} square"]} for i, row in enumerate(pairs)]
    one, two = _seen(tmp_path / "one", twins), on_ranks(_seen, 2, tmp_path / "two", twins)
    assert (len(one), len(two)) == (1, 2)
    for step in range(6):
        texts = [[text for rank in rank_chunks for chunk in rank[step] for text in chunk] for rank_chunks in (one, two)]
        whole, shared = (
            [tuple(filter(None, text)) for text in rank_texts] for rank_texts in texts
        )  # each rank pads its own
        assert whole == shared
        assert len(set(shared)) == 7


def test_a_changed_column_that_batches_go_by_is_changed_data(tmp_path, pairs, make_model):
    setup = trainer(tmp_path / "run", pairs, make_model, balanced="place").setup
    same = setup.fingerprint()["data"]
    setup.pairs = pairs.map(lambda row, i: {"place": "top" if i == 5 else row["place"]}, with_indices=True)
    assert setup.fingerprint()["data"] != same
    setup.config = dataclasses.replace(setup.config, balanced=None)
    unread = setup.fingerprint()["data"]
    setup.pairs = pairs
    assert setup.fingerprint()["data"] == unread


def test_the_options_are_read_from_yaml_and_checked():
    given = {"output_dir": "x", "distinct": ["texts", "image"], "grouped": "product"}
    sections = {"model": {"name": "m"}, "data": {"train": "t"}}
    assert RunConfig.parse({**sections, "train": given}).train.distinct == ("texts", "image")
    for wrong, words in [
        ({"balanced": "label"}, "either balanced or grouped"),
        ({"group_size": 1}, "multiple of group_size"),
        ({"batch_size": 10}, "multiple of group_size"),
    ]:
        with pytest.raises(ConfigError, match=words):
            RunConfig.parse({**sections, "train": {**given, **wrong}})
    one = RunConfig.parse({**sections, "train": {**given, "distinct": "texts"}}).train
    assert one.distinct == TrainConfig("x", distinct="texts").distinct == ("texts",)


@pytest.mark.parametrize(("decode", "at_least"), [("fast", 3 * 16), ("exact", None)])
def test_the_decoder_of_a_jpeg_may_scale_training_images(tmp_path, make_model, pairs, monkeypatch, decode, at_least):
    asked = []

    def load(source, **options):
        asked.append(options["at_least"])
        return load_image(source, **options)

    monkeypatch.setattr(collate, "load_image", load)
    model = make_model()
    assert model.processor.image_size == 16
    config = TrainConfig(str(tmp_path / "run"), batch_size=8, max_steps=1, decode=decode, progress=False)
    next(iter(Trainer(model, pairs, config).loader.batches(0, 1)))
    assert asked == [at_least] * 8
