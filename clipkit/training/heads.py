"""A model with what stands beside it only while it learns: the heads of notions that have their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipkit.losses.similarity import Head, Similarity
from clipkit.models.dual_encoder import DualEncoder

HEAD_DIM = 128  # Chen et al. 2020, section 2.1


class ModelWithHeads(nn.Module):
    """What the training step calls; embeddings of every kind come out by name.

    Args:
        model: the dual encoder, trained in place.
        similar: notions; for each with a `head`, one projection of the image tower's features is made, with fresh
            weights from torch's random state: unit vectors of 128 dimensions, called ``head{place in similar}``.
    """

    def __init__(self, model: DualEncoder, similar: Sequence[Similarity]) -> None:
        super().__init__()
        self.model = model
        wanted = {f"head{i}": each.head for i, each in enumerate(similar) if each.head}
        width = _width(model) if wanted else 0
        heads = {name: _head(head, width).to(model.device) for name, head in wanted.items()}
        self.heads = nn.ModuleDict(heads)

    def forward(
        self, *, pixel_values: Tensor | None = None, image_features: Tensor | None = None, **text: Tensor
    ) -> dict[str, Tensor]:
        """As `DualEncoder.forward`: "image", "text", "scale", "bias", as far as there are such, and the heads'."""
        if self.heads and pixel_values is not None:
            image_features, pixel_values = self.model.vision_features(pixel_values), None
        out = self.model(pixel_values=pixel_values, image_features=image_features, **text)
        found = {name: each for name, each in out._asdict().items() if each is not None}
        if image_features is not None:
            for name, head in self.heads.items():
                projected = head(image_features.to(next(head.parameters()).dtype))
                found[name] = F.normalize(projected if projected.dtype is torch.float64 else projected.float(), dim=-1)
        return found


def _head(kind: Head, width: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, HEAD_DIM, bias=False)
    # LayerNorm where SimCLR has BatchNorm, which would mix the samples of a chunk or a rank
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, HEAD_DIM))


def _width(model: DualEncoder) -> int:
    """Of the image tower's features: what one grey image gives."""
    pixels = model.processor.images([Image.fromarray(np.full((32, 32, 3), 128, np.uint8))])
    mode = model.training
    model.eval()
    with torch.no_grad():
        width = model.vision_features(pixels.to(model.device)).shape[1]
    model.train(mode)
    return width
