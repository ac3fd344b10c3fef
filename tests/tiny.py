"""Tiny dual encoders with random weights, and images for them.

`make_model` can learn the pairs of `make_pairs`, coloured squares and their names. `tiny_model` has a larger vocabulary
and a text tower without a pooler, for tests that only embed; `picture` draws noise, one for each number.
"""

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
    """Return a PNG of a coloured square at one side of a grey one."""
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

    squares = [(colour, place) for colour in COLOURS for place in PLACES]
    columns = {
        "image": [{"bytes": square(colour, place), "path": None} for colour, place in squares],
        "texts": [[f"a {colour} square {place}", f"{place} {colour}"] for colour, place in squares],
        "colour": [colour for colour, _ in squares],
        "place": [place for _, place in squares],
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


def tiny_model(seed: int = 0, dim: int = 16, logit_bias: float | None = None) -> Any:
    """Return a DualEncoder of a ViT and a BERT, of one layer each, that knows numbers and some words of prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

    from clipkit import DualEncoder

    words = ["<pad>", "<unk>", "a", "photo", "of", "the", "picture", "dark", "light", "square", ".", "number"]
    words += ["red", "green", "blue", "yellow", "cyan", "magenta", "black", "white", "orange", "purple"]
    words += [str(i) for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    vision = ViTModel(ViTConfig(**shape, image_size=16, patch_size=8), add_pooling_layer=False)
    text = BertModel(BertConfig(**shape, vocab_size=len(words), max_position_embeddings=16), add_pooling_layer=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return DualEncoder.from_towers(vision, text, fast, dim=dim, logit_bias=logit_bias)


def picture(number: int, size: int = 16) -> Image.Image:
    """Return an image of noise; those of numbers below 1000 differ."""
    g = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=g, dtype=torch.uint8).numpy())


def write_pictures(folder: Path, numbers: range) -> list[Path]:
    """Write a picture for each number, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        picture(number).save(path)
    return paths
