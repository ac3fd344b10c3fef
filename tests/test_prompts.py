from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import tiny
from datasets import ClassLabel

import clipkit.prompts
from clipkit import ZeroShotClassifier, ZeroShotEvaluator, load_pairs
from clipkit.errors import UsageError
from clipkit.prompts import captions, prompts
from clipkit.training.config.sections import EvaluateConfig


def test_examples() -> None:
    assert doctest.testmod(clipkit.prompts).failed == 0


def test_each_name_in_each_template() -> None:
    assert prompts(["cat", "dog"], ["a {}.", "the {c}!"]) == {
        "cat": ["a cat.", "the cat!"],
        "dog": ["a dog.", "the dog!"],
    }
    assert prompts({"happy": ["happy", "smiling"], "sad": "sad"}, "a {} face") == {
        "happy": ["a happy face", "a smiling face"],
        "sad": ["a sad face"],
    }


def test_a_label_becomes_words_and_a_name_stands_as_typed() -> None:
    assert prompts(["sea_lion", " T-shirt ", "__init__"], "{}") == {
        "sea_lion": ["sea lion"],
        " T-shirt ": ["T-shirt"],
        "__init__": ["init"],
    }
    assert prompts({"python": "__init__"}, "{}") == {"python": ["__init__"]}
    assert captions(["_", "a_b", "a b"], "{}") == {"_": ["_"], "a_b": ["a b"], "a b": ["a b"]}  # data may repeat


def test_classes_may_have_templates_or_whole_prompts_of_their_own() -> None:
    own = {"n01": ["a photo of a tench.", "a {} in {c} water"], "n02": "a grey shark", "n03": "not asked for"}
    assert prompts({"n01": ["tench", "carp"], "n02": "shark"}, own) == {
        "n01": ["a photo of a tench.", "a tench in tench water", "a carp in carp water"],
        "n02": ["a grey shark"],
    }


def test_braces_are_plain_text() -> None:
    # str.format would look up attributes, or raise KeyError
    template = "{c.__class__.__mro__} {0} {name} { } {c} {}"
    assert prompts(["{c}"], template) == {"{c}": ["{c.__class__.__mro__} {0} {name} { } {c} {c}"]}
    assert prompts(["a{}b"], "x {} {c}") == {"a{}b": ["x a{}b a{}b"]}


@pytest.mark.parametrize(
    ("names", "templates", "message", "fix"),
    [
        ([], "{}", "found none", None),
        ("robin", "{}", "list of class names", "['robin', ...]"),
        (["a", "b", "a"], "{}", "a class name is given twice", "drop one"),
        (["cat", "cat "], "{}", "two classes share the name 'cat'", "one class"),
        (["sea_lion", "sea lion"], "{}", "two classes share the name 'sea lion'", "one class"),
        ({"x": ["a", "b"], "y": ["b"]}, "{}", "share the name 'b'", "name of its own"),
        ({"x": ["a", "a"]}, "{}", "the name 'a' is given twice", "drop one"),
        (["a", " "], "{}", "empty", "leave it out"),
        ({"a": []}, "{}", "empty", "leave it out"),
        (["a"], "a photo", "slot", 'for example "a photo of a {}."'),
        (["a"], "a painting of a {label}.", "slot", 'for example "a painting of a {}."'),
        (["a"], ["{}", "a photo of a %s"], "slot", 'for example "a photo of a {}"'),
        (["a"], [], "at least one template", "a photo of a {}."),
        (["a"], ["{}", ""], "not empty", "leave it out"),
        (["a"], ["{}", "{}"], "template is given twice", "drop one"),
        (
            ["a", "b_c"],
            {"a": "an a"},
            "no prompt for the class 'b_c', only for 'a'",
            "{'b_c': ['a photo of a b c.'], ...}",
        ),
        (["a"], {"a": []}, "at least one template", None),
        (["a"], {}, "prompts for each class", None),
    ],
)
def test_refused(names: object, templates: object, message: str, fix: str | None) -> None:
    with pytest.raises(UsageError, match="^[^\\n]*" + message.replace("(", r"\(")) as error:
        prompts(names, templates)
    assert fix is None or fix in error.value.fix


def test_training_evaluation_and_labelling_say_the_same(tmp_path: Path) -> None:
    for name in ("sea_lion", "T-shirt"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.png").write_bytes(tiny.square("red", "left"))
    said = {"T-shirt": ["a photo of a T-shirt."], "sea_lion": ["a photo of a sea lion."]}
    pairs, model = load_pairs(tmp_path / "photos"), tiny.make_model()
    assert pairs.features["label"] == ClassLabel(names=list(said))
    assert list(pairs["texts"]) == list(said.values())
    assert ZeroShotClassifier(model, list(said)).prompts == said
    assert prompts(list(said), EvaluateConfig().templates) == said
    evaluator = ZeroShotEvaluator(pairs)
    assert prompts(evaluator.class_names, evaluator.templates) == said
    own = {"T-shirt": ["a {} on a hanger", "worn"], "sea_lion": "an animal"}
    written = [["a T-shirt on a hanger", "worn"], ["an animal"]]
    assert list(load_pairs(tmp_path / "photos", templates=own)["texts"]) == written
    assert list(ZeroShotClassifier(model, list(said), templates=own).prompts.values()) == written
    evaluator = ZeroShotEvaluator(pairs, templates=own)
    assert list(prompts(evaluator.class_names, evaluator.templates).values()) == written
    assert evaluator(model).keys() == {"zero_shot/top1", "zero_shot/mean_per_class"}
