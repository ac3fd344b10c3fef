"""Configs: what is read is what was meant, or an error that says what to type."""

import dataclasses
from pathlib import Path

import pytest

from clipkit import Graded, Paired, SameGroup, Views
from clipkit.errors import ConfigError
from clipkit.training.config.errors import SECTIONS
from clipkit.training.config.run import RunConfig
from clipkit.training.config.train import TrainConfig

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
    assert [type(section.build()).__name__ for section in config.similar] == ["SameGroup", "Paired"]
    assert load(tmp_path, config.dump()) == config


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("3.", 3.0), ("2", 2.0), (".5", 0.5)])
def test_numbers_are_numbers(tmp_path, text, value):
    assert RunConfig.load(None, [*BASIC, f"train.learning_rate={text}"]).train.learning_rate == value


def test_words_are_words():
    assert RunConfig.load(None, [*BASIC, "data.label=no"]).data.label == "no"
    assert RunConfig.load(None, [*BASIC, "data.label="]).data.label is None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.name=007", "007"),
        ("data.train=2024-05-01", "2024-05-01"),
        ("data.train=null", "null"),
        ("data.train=#1: [a, b}", "#1: [a, b}"),
        ("data.label=1e3", "1e3"),
        ("data.label=true", "true"),
        ("data.label=null", None),
        ("data.label='null'", "null"),
        ("data.label=a=b", "a=b"),
        ("data.test=500", 500),
        ("data.test=0.25", 0.25),
        ("data.test=test.csv", "test.csv"),
        ("data.text=title,description", ("title", "description")),
        ("data.text=[title, description]", ("title", "description")),
        ("data.text=007", "007"),
        ("data.templates={}, a bird: in the wild", "{}, a bird: in the wild"),
        ("data.templates=['a {}.', 'the {}, drawn']", ("a {}.", "the {}, drawn")),
        ("data.test=~/x", str(Path.home() / "x")),
        ("model.freeze=image", ("image",)),
        ("model.freeze=image,text", ("image", "text")),
        ("model.freeze=[image]", ("image",)),
        ("model.freeze_blocks={image: 6}", {"image": 6}),
        ("train.trackers=tensorboard", ("tensorboard",)),
        ("train.trackers=", ()),
        ("train.matryoshka=64", (64,)),
        ("train.matryoshka=64,128", (64, 128)),
        ("train.betas=0.9,0.95", (0.9, 0.95)),
        ("train.max_steps=1e3", 1000),
        ("train.seed=010", 10),
        ("train.progress=no", False),
        ("train.output_dir=~/a=b", str(Path.home() / "a=b")),
    ],
)
def test_what_is_typed_is_read_by_its_fields_type(override, value):
    section, name = override.partition("=")[0].split(".")
    assert getattr(getattr(RunConfig.load(None, [*BASIC, override]), section), name) == value


def test_a_file_is_read_by_its_fields_types_too(tmp_path):
    text = "model: {name: 007}\ndata: {train: ~/birds.csv, label: 2024-05-01, test: 010}\nsimilar: {group: 12}\n"
    config = load(
        tmp_path,
        text + "evaluate:\ntrain: {output_dir: 1e3, trackers: tensorboard, resume: null}",
        "train.resume=never",
    )
    assert (config.model.name, config.data.train) == ("007", str(Path.home() / "birds.csv"))
    assert (config.data.label, config.data.test, config.similar[0].group) == ("2024-05-01", 10, "12")
    assert (config.train.output_dir, config.train.trackers) == ("1e3", ("tensorboard",))
    assert load(tmp_path, config.dump()) == config


def test_a_section_of_a_section_can_be_begun_by_an_override(tmp_path):
    text = "model: {name: x, lora: null}\ndata: {train: y}\ntrain: {output_dir: z}"
    assert load(tmp_path, text, "model.lora.rank=4").model.lora.rank == 4
    assert RunConfig.load(None, [*BASIC, "similar.group=species"]).similar[0].group == "species"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.lr=3e-4", "train.learning_rate=3e-4"),
        ("train.bs=64", "train.batch_size=64"),
        ("lr=3e-4", "train.learning_rate=3e-4"),
        ("epochs=3", "train.epochs=3"),
        ("train.report_to=wandb", "train.trackers=wandb"),
        ("train.text=the caption", "data.text='the caption'"),
        ("train.num_train_epochs=3", "train.epochs=3"),
        ("model.lora.r=4", "model.lora.rank=4"),
    ],
)
def test_a_wrong_key_is_told_the_right_one_as_it_is_typed(typed, meant):
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(None, [*BASIC, typed])
    assert (caught.value.where, caught.value.fix) == (typed, f"did you mean {meant}?")


def test_a_mend_of_a_file_is_yaml(tmp_path):
    text = "model: {name: x}\ndata: {train: y}\ntrain: {output_dir: z"
    with pytest.raises(ConfigError, match=r"did you mean `learning_rate: 0.1` under `train:`\?"):
        load(tmp_path, text + ", lr: 0.1}")
    with pytest.raises(ConfigError, match=r"fix:   `freeze: \[image\]` under `model:`"):
        load(tmp_path, "model: {name: x}\ndata: {train: y, features: f}\ntrain: {output_dir: z}")
    with pytest.raises(ConfigError, match=r"fix:   `train: FILE` under `data:`"):
        load(tmp_path, "model: {name: x}\ntrain: {output_dir: z}")
    with pytest.raises(ConfigError, match=r"fix:   model.freeze=image"):
        RunConfig.load(None, [*BASIC, "data.features=f"])
    with pytest.raises(ConfigError, match=r"fix:   data.train=FILE"):  # of a recipe that is there to be added to
        load(tmp_path, "train: {output_dir: z}", "model.name=x")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1", r"unknown key `train.lerning_rate`(?s:.)*did you mean train.learning_rate=1\?"),
        ("trian.epochs=1", r"unknown key `trian`(?s:.)*did you mean train.epochs=1\?"),
        ("train.epochs=no", r"`train.epochs`.*found 'no'"),
        ("train.epochs=0", "`train.epochs`: input should be greater than 0, found 0"),
        ("train.learning_rate=-1e-5", "`train.learning_rate`: input should be greater than 0, found -1e-05"),
        ("train.warmup=3", "`train.warmup`: input should be less than or equal to 1, found 3"),
        ("train.precision=fp8", r"`train.precision`.*'fp16', found 'fp8'"),
        ("train.augmentation=crop_flip", "`train.augmentation`.*found 'crop_flip'"),
        ("model.vision=tower", "a model is either `name`, or `vision` and `text`"),
        ("model.name=", "a model is either `name`, or `vision` and `text`"),
        ("similar=[{group: a, graded: b}]", "one of `group`, `graded` and `views`"),
        ("similar=[{views: 1}]", "views are compared with each other, two or more; found views=1"),
        ("similar=[{known: {texts: drop}}]", r"'positive', 'ignore' or 'negative', found 'drop'"),
        ("train.micro_batch=0", "`train.micro_batch`: input should be greater than 0, found 0"),
        ("train.label_smoothing=1", "`train.label_smoothing`: input should be less than 1, found 1"),
        ("train.matryoshka=[0]", "`train.matryoshka.0`: input should be greater than 0, found 0"),
        ("train.epochs", "expected key=value(?s:.)*train.epochs=VALUE"),
        ("train={epochs: 1, epochs: 2}", "the key `epochs` occurs twice"),
        ("similar=[", "not valid YAML"),
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


def test_messages_know_every_section():
    assert list(SECTIONS) == [section.name for section in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"epochs": 0},
            r"epochs must be greater than 0, found 0(?s:.)*the default is epochs=5",
        ),
        ({"epochs": float("inf")}, "epochs must be a finite number, found inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be less than 1, found \(0.9, 1.0\)"),
        ({"patience": 0}, r"patience must be greater than 0, found 0(?s:.)*leave out patience"),
        ({"loss": "triplet"}, "loss must be 'auto', 'info_nce' or 'sigmoid', found 'triplet'"),
    ],
)
def test_a_section_made_in_python_is_checked(changes, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig("x", **changes)
