from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clipkit.errors import UsageError
from clipkit.labelling.prompts import class_embeddings, prompts


def test_each_name_in_each_template() -> None:
    assert prompts(["cat", "dog"], ["a {}.", "the {c}!"]) == {
        "cat": ["a cat.", "the cat!"],
        "dog": ["a dog.", "the dog!"],
    }
    assert prompts({"happy": ["happy", "smiling"], "sad": "sad"}, "a {} face") == {
        "happy": ["a happy face", "a smiling face"],
        "sad": ["a sad face"],
    }


def test_braces_are_plain_text() -> None:
    # str.format would look up attributes, or raise KeyError
    template = "{c.__class__.__mro__} {0} {name} { } {c} {}"
    assert prompts(["{c}"], template) == {"{c}": ["{c.__class__.__mro__} {0} {name} { } {c} {c}"]}
    assert prompts(["a{}b"], "x {} {c}") == {"a{}b": ["x a{}b a{}b"]}


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], "{}", "found none"),
        ("robin", "{}", "list of class names"),
        (["a", "b", "a"], "{}", "twice"),
        ({"x": ["a", "b"], "y": ["b"]}, "{}", "share a name"),
        (["a", " "], "{}", "empty"),
        ({"a": []}, "{}", "empty"),
        (["a"], "a photo", "slot"),
        (["a"], ["{}", "a photo of a {0}"], "slot"),
        (["a"], [], "at least one template"),
        (["a"], ["{}", "{}"], "template is given twice"),
    ],
)
def test_refused(names: object, templates: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prompts(names, templates)


def test_normalised_averaged_normalised(model) -> None:
    own = prompts({"red": ["red", "orange"], "blue": "blue"}, ["a photo of {}", "{} .", "the dark {}"])
    found = class_embeddings(model, own, batch_size=2)
    for row, texts in zip(found, own.values(), strict=True):
        each = torch.cat([model.encode_texts([text]) for text in texts])
        assert torch.allclose(row, normalize(normalize(each, dim=1).mean(0), dim=0), atol=1e-6)
