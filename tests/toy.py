"""A dual encoder without transformers, for child processes: importing transformers takes them eight seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clipkit.models.backend import Backend, ParameterPrefixes
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.image_transform import ImageTransform
from clipkit.models.processor import Processor


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

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Tensor) -> Tensor:
        return self.words(input_ids)

    def project_text(self, features):
        return features

    def describe(self, part: str) -> dict[str, Any]:
        return {}

    def save(self, folder: Path, processor: Processor) -> None:
        raise NotImplementedError


def toy_model(seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    return DualEncoder(Toy(), Processor(ImageTransform(16), ToyTexts()), "toy").eval()
