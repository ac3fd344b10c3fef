"""What a tokenizer really does, measured by running it on a few texts: case, padding, mask, ends, truncation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipkit.files import json_hash
from clipkit.models.processor import TextSide

_CASES = ("Cat", "Dog", "A", "The", "Red", "Photo", "Of", "Sentence")
_SHORT, _LONGER = "a cat", "a photo of two dogs on a beach"


# Accents, scripts, numbers, white space, markup: whatever cleaning and splitting rules disagree about.
_PROBES = (
    _SHORT,
    _LONGER,
    "Don't STOP at the café's naïve façade!?",
    "cafe\u0301 ﬁne ① ﬀ",
    "  two  spaces\tand\na line ",
    "12,345.67 $5 3/4 50% a-b_c d/e @f #g",
    "&lt;b&gt; &amp; <i>x</i> http://example.org/a?b=c",
    "Привет Ελληνικά 漢字かな 한국어 مرحبا हिन्दी",
    "🙂👩‍🚀 emoji… “quotes” – dash",
    "antidisestablishmentarianism xqzjv",
    "",
)


def measure_tokenizer(side: TextSide) -> dict[str, Any]:
    """Return case, context length, padding, mask, start and end token, what truncation keeps, and a hash of ids."""
    short = unpadded(side, _SHORT)
    longer = unpadded(side, _LONGER)
    cut = _tokens(side, _SHORT + " and a cat" * side.context_length)
    # Both probes begin with "a": a start token is one that another first word leaves in place.
    same_start = unpadded(side, "two dogs")[:1] == short[:1] == longer[:1]
    end = short[-1] if short[-1:] == longer[-1:] else None
    end_when_cut = "-"
    if end is not None:
        end_when_cut = "kept" if cut[-1] == end else "lost"
    return {
        **side.describe(),
        "ids": json_hash([unpadded(side, text) for text in _PROBES]),
        "case": _case(side),
        "context_length": len(cut),
        **_padding(side, len(short)),
        "start_token": str(short[0]) if same_start else "none",
        "end_token": "none" if end is None else str(end),
        "end_when_cut": end_when_cut,
    }


def end_token(side: TextSide) -> int | None:
    """Return the id that ends every text, if there is one."""
    short = unpadded(side, _SHORT)
    longer = unpadded(side, _LONGER)
    return short[-1] if short[-1:] == longer[-1:] else None


def padded_row(side: TextSide) -> tuple[dict[str, Any], int, bool]:
    """Return a short text batched with a longer one, how many tokens it has, and whether padding is on its left."""
    batch = side([_SHORT, _LONGER])
    row = {name: value[:1] for name, value in batch.items()}
    ids = row["input_ids"][0].tolist()
    own = unpadded(side, _SHORT)
    padded_left = ids[: len(own)] != own and ids[-len(own) :] == own
    return row, len(own), padded_left


def _tokens(side: TextSide, text: str) -> list[int]:
    ids: list[int] = side([text])["input_ids"][0].tolist()
    return ids


def unpadded(side: TextSide, text: str) -> list[int]:
    """Return the ids of a text without padding."""
    inputs = side([text])
    count = side.counts([text])[0]
    ids: list[int] = inputs["input_ids"][0].tolist()
    if count >= len(ids):
        return ids
    if count == 0:
        return []
    mask = inputs.get("attention_mask")
    if mask is not None:
        return [i for i, real in zip(ids, mask[0].tolist(), strict=True) if real]
    # on which side is the padding? The row of another text of equal length begins, or ends, with the same run of it
    run = ids[:-count]
    left = len(set(run)) == 1 and len(set(ids[count:])) > 1
    return ids[-count:] if left else ids[:count]


def _case(side: TextSide) -> str:
    lower = [unpadded(side, text.lower()) for text in _CASES]
    upper = [unpadded(side, text) for text in _CASES]
    if len({tuple(row) for row in lower}) == 1:
        return "unknown"  # every word is the same unknown token
    return "lower-cased" if lower == upper else "kept"


def _padding(side: TextSide, count: int) -> dict[str, str]:
    alone = len(_tokens(side, _SHORT))
    batch, _, left = padded_row(side)
    ids = batch["input_ids"][0].tolist()
    pad = None
    if len(ids) > count:
        pad = ids[0] if left else ids[-1]
    return {
        "padding": "max_length" if alone > count or alone == side.context_length else "longest",
        "padding_side": "left" if left else "right",
        "pad_token": "-" if pad is None else str(pad),
        "attention_mask": "given" if "attention_mask" in batch else "not given",
    }


def readable(facts: Mapping[str, Any]) -> str:
    """One line: `lower-cased, up to 77 tokens, padded to the longest of a batch, mask given, end token 49407 ...`."""
    padded = "the longest of a batch" if facts["padding"] == "longest" else "full length"
    end = "no end token"
    if facts["end_token"] != "none":
        end = f"end token {facts['end_token']}, {facts['end_when_cut']} when cut"
    case = "case kept" if facts["case"] == "kept" else str(facts["case"])
    side = f"padded to {padded} with {facts['pad_token']} on the {facts['padding_side']}"
    return f"{case}, up to {facts['context_length']} tokens, {side}, mask {facts['attention_mask']}, {end}"
