"""A real dual encoder of two tiny random towers, and small pictures, for the tests of what uses a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.models.backend import Backend, ParameterPrefixes
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.image_transform import ImageTransform
from clipkit.models.processor import Processor

COLOURS = ["red", "green", "blue", "yellow", "cyan", "magenta", "black", "white", "orange", "purple"]


def tiny_model(seed: int = 0, dim: int = 16, logit_bias: float | None = None) -> DualEncoder:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

    words = [
        "<pad>",
        "<unk>",
        *["a", "photo", "of", "the", "picture", "dark", "light", "square", ".", "number"],
        *COLOURS,
    ]
    words += [str(i) for i in range(100)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    vision = ViTModel(ViTConfig(**shape, image_size=16, patch_size=8), add_pooling_layer=False)
    text = BertModel(BertConfig(**shape, vocab_size=len(words), max_position_embeddings=16), add_pooling_layer=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return DualEncoder.from_towers(vision, text, fast, dim=dim, logit_bias=logit_bias)


def picture(number: int, size: int = 16) -> Image.Image:
    """Pictures that differ for numbers below 1000."""
    g = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=g, dtype=torch.uint8).numpy())


def write_pictures(folder: Path, numbers: range) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        picture(number).save(path)
    return paths


class ToyTexts:
    """Words by their letters; eight a text."""

    context_length, unknown_id = 8, None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids = [[(sum(word.encode()) % 63) + 1 for word in text.split()][:8] for text in texts]
        return {"input_ids": torch.tensor([row + [0] * (8 - len(row)) for row in ids])}

    def counts(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": "toy"}

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class Toy(Backend):
    """Two linear towers, for child processes: importing transformers takes them eight seconds."""

    family, dim = "toy", 16
    names: ClassVar = {"image": ParameterPrefixes(("vision",), ("head",)), "text": ParameterPrefixes(("words",), ())}

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.head = nn.Linear(3 * 16 * 16, 24), nn.Linear(24, 16, bias=False)
        self.words = nn.EmbeddingBag(64, 16)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def logit_scale_and_bias(self) -> tuple[nn.Parameter, None]:
        return self.scale, None

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self.vision(pixel_values.flatten(1)).tanh()

    def project_image(self, features: Tensor) -> Tensor:
        return self.head(features)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        return self.words(input_ids)

    def describe(self, part: str) -> dict[str, Any]:
        return {}

    def save(self, folder: Path, processor: Processor) -> None:
        raise NotImplementedError


def toy_model(seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    return DualEncoder(Toy(), Processor(ImageTransform(16), ToyTexts()), "toy").eval()
