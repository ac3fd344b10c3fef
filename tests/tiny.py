"""A tiny dual encoder and pairs that it can learn: coloured squares and their names."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]
PLACES = ["left", "right", "top", "bottom"]


def square(colour: str, place: str) -> bytes:
    image = Image.new("RGB", (16, 16), "grey")
    corner = {"left": (0, 4), "right": (8, 4), "top": (4, 0), "bottom": (4, 8)}[place]
    image.paste(Image.new("RGB", (8, 8), colour), corner)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_pairs() -> Any:
    """32 images with two captions each; `colour` is a group of four, `place` one of eight."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    each = [(colour, place) for colour in COLOURS for place in PLACES]
    columns = {
        "image": [{"bytes": square(*one), "path": None} for one in each],
        "texts": [[f"a {colour} square {place}", f"{place} {colour}"] for colour, place in each],
        "colour": [colour for colour, _ in each],
        "place": [place for _, place in each],
    }
    text = Value("string")
    features = {"image": ImageFeature(decode=False), "texts": List(text), "colour": text, "place": text}
    return Dataset.from_dict(columns, features=Features(features))


def write_pairs(folder: Path) -> Path:
    """pairs.jsonl in `folder`: the 32 images as files beside it, each with one text."""
    rows = []
    for colour in COLOURS:
        for place in PLACES:
            (folder / f"{colour}-{place}.png").write_bytes(square(colour, place))
            rows.append({"image": f"{colour}-{place}.png", "text": f"a {colour} square {place}"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


def make_model(
    seed: int = 0,
    dropout: float = 0.0,
    layers: tuple[int, int] = (1, 1),
    width: int = 32,
    image_size: int = 16,
    **options: Any,
) -> Any:
    """A DualEncoder of a ViT and a BERT, of one layer each; the same weights for the same seed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

    from clipkit import DualEncoder

    words = ["[PAD]", "[UNK]", "a", "square", *COLOURS, *PLACES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    size = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 2 * width}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(seed)
    vision = ViTModel(ViTConfig(image_size=image_size, patch_size=4, num_hidden_layers=layers[0], **size, **drop))
    size["num_hidden_layers"] = layers[1]
    text = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **size, **drop))
    return DualEncoder.from_towers(vision, text, fast, dim=16, context_length=8, **options)
