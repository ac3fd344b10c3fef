"""One judgement of what is an empty or broken text, wherever a text comes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from clipkit import ZeroShotClassifier, embed, load_pairs
from clipkit.data.dataset import caption_counts, key_values
from clipkit.data.reading.rejects import LoadReport
from clipkit.errors import DataError, UsageError
from clipkit.search.query import query_type
from clipkit.texts import BadText, checked_text, is_blank

BLANK = [
    "",
    " \t\n",
    "\ufeff",
    "\u200b\u200d\u2060",
    "\x00\x1b\x7f",
    "\u00a0\u3000",
    "\u3164\u2800",
    "\ufe0f",
    "\u202e",
]
BROKEN = "caf\udce9"


@pytest.mark.parametrize("text", BLANK)
def test_nothing_to_be_seen(text: str) -> None:
    assert is_blank(text)
    with pytest.raises(BadText, match="EMPTY_TEXT"):
        checked_text(text)


@pytest.mark.parametrize("text", ["a", "0", ".", "\u200bx", "👍🏽", "e\u0301", "\ue000", "漢", " x ", "\udce9"])
def test_something_to_be_seen(text: str) -> None:
    assert not is_blank(text)


def test_captions_and_labels_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny.square("red", "left"))
    rows = [{"image": "a.png", "text": text, "label": text} for text in ["fine", *BLANK, BROKEN]]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ledger = LoadReport()
    pairs = load_pairs(tmp_path / "t.jsonl", on_bad="skip", max_bad=1.0, ledger=ledger)
    assert list(pairs["texts"]) == [["fine"]]
    assert [reject.code for reject in ledger.rejects] == ["EMPTY_TEXT"] * len(BLANK) + ["BAD_JSON"]
    assert key_values({"label": ["x", *BLANK]}, "label") == ["x"] + [None] * len(BLANK)


def test_queries_classes_and_lists_in_memory() -> None:
    model = tiny.make_model()
    with pytest.raises(UsageError, match="the query is empty"):
        query_type("\u200b")
    with pytest.raises(UsageError, match="no name may be empty"):
        ZeroShotClassifier(model, ["red", "\ufeff"])
    for use in (
        lambda: query_type(BROKEN),
        lambda: ZeroShotClassifier(model, ["red", BROKEN]),
        lambda: model.encode_texts([BROKEN]),
        lambda: embed(model, [BROKEN], kind="text"),
        lambda: caption_counts({"texts": [["fine"], [BROKEN]]}),
    ):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            use()
    with pytest.raises(DataError, match="nothing of the text can be seen") as caught:
        caption_counts({"texts": [["fine"], ["fine", "\u200b"]]})
    assert caught.value.where == "row 1"
    assert [reject.code for reject in embed(model, ["red", "\u200b", BROKEN], kind="text", on_bad="skip").rejected] == [
        "EMPTY_TEXT",
        "BAD_TEXT",
    ]
