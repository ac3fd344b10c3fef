"""Configs: what is read is what was meant, or an error that says what to type."""

import pytest

from clipkit import Graded, Paired, SameGroup, Views
from clipkit.errors import ConfigError
from clipkit.training.config import RunConfig, TrainConfig

BASIC = ["model.name=some/model", "data.train=birds.csv", "train.output_dir=runs/birds"]


def test_notions_of_similarity_are_config_lines():
    lines = "[{}, {views: 2}, {group: species, between: [image, image], views: 2, temperature: 0.07, head: mlp}, "
    lines += (
        "{graded: [order, family], similarity: hierarchy}, {known: {texts: positive, label: ignore}, score: stars}]"
    )
    slip, views, supcon, tree, known = (e.build() for e in RunConfig.load(None, [*BASIC, f"similar={lines}"]).similar)
    assert (slip, views) == (Paired(), Views())
    assert supcon == SameGroup("species", between=("image", "image"), views=2, temperature=0.07, head="mlp")
    assert tree == Graded(("order", "family"), "hierarchy")
    assert known == Paired(known={"texts": "positive", "label": "ignore"}, score="stars")


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.load(path, overrides)


def test_overrides_alone_and_a_round_trip_through_yaml(tmp_path):
    config = RunConfig.load(None, [*BASIC, "train.betas=[0.9, 0.95]", "similar=[{group: species, weight: 0.5}, {}]"])
    assert config.train.batch_size == TrainConfig("x").batch_size
    assert config.train.betas == (0.9, 0.95)
    assert [type(each.build()).__name__ for each in config.similar] == ["SameGroup", "Paired"]
    assert load(tmp_path, config.dump()) == config


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("3.", 3.0), ("2", 2.0), (".5", 0.5)])
def test_numbers_are_numbers(tmp_path, text, value):
    assert RunConfig.load(None, [*BASIC, f"train.learning_rate={text}"]).train.learning_rate == value


def test_words_are_words():
    assert RunConfig.load(None, [*BASIC, "data.label=no"]).data.label == "no"
    assert RunConfig.load(None, [*BASIC, "data.label="]).data.label is None


def test_several_text_columns():
    assert RunConfig.load(None, [*BASIC, "data.text=[title, description]"]).data.text == ("title", "description")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1", r"unknown key `train.lerning_rate`(?s:.)*did you mean `learning_rate`"),
        ("trian.epochs=1", r"unknown key `trian`(?s:.)*did you mean `train`"),
        ("train.epochs=no", r"`train.epochs`.*found 'no'"),
        ("train.epochs=0", "epochs must be greater than 0, found 0"),
        ("train.learning_rate=-1e-5", "learning_rate must be greater than 0, found -1e-05"),
        ("train.warmup=3", "warmup is a part of the steps"),
        ("train.precision=fp8", r"`train.precision`.*'fp16', found 'fp8'"),
        ("train.augmentation=crop_flip", "`train.augmentation`.*found 'crop_flip'"),
        ("model.vision=tower", "a model is either `name`, or `vision` and `text`"),
        ("model.name=", "a model is either `name`, or `vision` and `text`"),
        ("similar=[{group: a, graded: b}]", "one of `group`, `graded` and `views`"),
        ("similar=[{views: 1}]", "views are compared with each other, two or more; found views=1"),
        ("similar=[{known: {texts: drop}}]", r"'positive', 'ignore' or 'negative', found 'drop'"),
        ("train.micro_batch=0", "micro_batch must be greater than 0, found 0"),
        ("train.label_smoothing=1", "label_smoothing lies between 0 and 1, found 1"),
        ("train.matryoshka=[0]", "matryoshka lists numbers of dimensions"),
        ("train.epochs", "expected key=value"),
        ("train={epochs: 1, epochs: 2}", "the key `epochs` stands twice"),
        ("data.train=[", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        RunConfig.load(None, [*BASIC, override])
    assert caught.value.exit_code == 2


def test_errors_of_a_file_name_it(tmp_path):
    with pytest.raises(ConfigError, match=r"`model` is missing; `data` is missing(?s:.)*run\.yaml"):
        load(tmp_path, "train: {output_dir: x}")
    with pytest.raises(ConfigError, match=r"expected sections(?s:.)*run\.yaml"):
        load(tmp_path, "- a list")
    with pytest.raises(ConfigError, match=r"no such config file(?s:.)*nowhere\.yaml"):
        RunConfig.load(tmp_path / "nowhere.yaml")
