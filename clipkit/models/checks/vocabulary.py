"""Whether a tokenizer is the one that a text tower was trained with: its size, its ids, how it marks words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from clipkit.errors import ClipkitError
from clipkit.files import read_json
from clipkit.models.checks.finding import Finding, why
from clipkit.models.loading.transformers import open_tokenizer
from clipkit.models.loading.weights import weight_files, weight_shapes

if TYPE_CHECKING:
    from clipkit.models.dual_encoder import DualEncoder

# Of the published tokenizers, or of the tables that go with them.
_KNOWN_SIZES = {
    49408: "CLIP",
    32000: "SigLIP",
    250000: "multilingual SigLIP",
    256000: "Gemma and SigLIP 2",
    250002: "XLM-RoBERTa and AltCLIP",
    901629: "XLM-V and MetaCLIP 2",
    30522: "BERT and ALIGN",
    21128: "Chinese BERT and Chinese-CLIP",
    50265: "RoBERTa",
    119547: "multilingual BERT",
}


# How a vocabulary marks where words begin or end.
_MARKS = {
    "</w>": "CLIP's byte pairs",
    "##": "BERT's word pieces",
    "▁": "SentencePiece's pieces",
    "Ġ": "GPT-2's byte pairs",
}

_MARK_OF_FAMILY = {
    "clip": "</w>",
    "siglip": "▁",
    "metaclip_2": "▁",
    "altclip": "▁",
    "chinese_clip": "##",
    "align": "##",
}

_TABLES = ("token_embedding", "word_embeddings", "embed_tokens", "tok_embeddings", "shared", "wte")
_PADDED = 0.9  # tables are rounded up to a multiple of 64 or more: CLIPA's has 32,000 rows for 30,522 tokens


def vocabulary_findings(family: str, vocabulary: Mapping[str, int], table: int) -> Iterator[Finding]:
    """A tokenizer that is foreign to its text tower, if it is.

    Args:
        family: of transformers (`clip`, `siglip` ...), or another word where its tokenizer is not known.
        vocabulary: tokens and their ids.
        table: rows of the tower's table of token embeddings.
    """
    count = len(vocabulary)
    highest = max(vocabulary.values(), default=-1)
    expected = _MARK_OF_FAMILY.get(family)
    mark = _mark(vocabulary)
    foreign = expected is not None and mark is not None and mark != expected
    too_few = expected is not None and count < _PADDED * table
    if highest < table and not too_few and not foreign:
        return
    what = (
        f"the tokenizer has {count:,} tokens{_known_owner(count)}, the text tower embeds {table:,}{_known_owner(table)}"
    )
    if highest >= table:
        what += f"; ids {table:,} to {highest:,} have no embedding"
    if foreign and expected and mark:
        what += f"; it splits words into {_MARKS[mark]}, and {family} was trained on {_MARKS[expected]}"
    fix = "take the tokenizer's files (tokenizer.json, tokenizer_config.json) from the original model"
    if highest >= table and not foreign:
        fix += "; for tokens that were added, resize_token_embeddings(len(tokenizer)) and train them"
    level = "error" if highest >= table or too_few else "warning"
    yield Finding(level, "vocabulary", what, why("vocabulary"), fix)  # type: ignore[arg-type]


def _known_owner(size: int) -> str:
    return f" (as {_KNOWN_SIZES[size]})" if size in _KNOWN_SIZES else ""


def _mark(vocabulary: Mapping[str, int]) -> str | None:
    counts = {
        mark: sum(token.endswith(mark) if mark == "</w>" else token.startswith(mark) for token in vocabulary)
        for mark in _MARKS
    }
    mark = max(counts, key=lambda name: counts[name])
    return mark if counts[mark] else None


def of_model(model: DualEncoder) -> Iterator[Finding]:
    """The same for a model that is open."""
    tokenizer: Any = getattr(model.processor.text_side, "tokenizer", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip's wrapper of a transformers one
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "encoder", None)
    tables = [
        module.num_embeddings
        for name, module in model.backend.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith(_TABLES) and model.backend.belongs_to("text", name)
    ]
    if vocabulary and tables:
        yield from vocabulary_findings(model.backend.family, vocabulary, max(tables))


def of_folder(folder: Path) -> Iterator[Finding]:
    """The same for a folder of transformers that does not open, as far as its files can be read."""
    try:
        family = str(read_json(folder / "config.json").get("model_type"))
        vocabulary = open_tokenizer(folder, False).get_vocab()
        shapes: list[tuple[str, Any]] = []
        for path in weight_files(folder):
            shapes += weight_shapes(path).items()
    except (ClipkitError, OSError):
        return  # reported already
    tables = [shape[0] for name, shape in shapes if name.removesuffix(".weight").endswith(_TABLES)]
    if tables:
        yield from vocabulary_findings(family, vocabulary, max(tables))
