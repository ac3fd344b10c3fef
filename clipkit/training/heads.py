"""A model with the heads that it has only while it trains: those of the notions of similarity."""

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
    """The module that the training step calls; it returns all embeddings by name.

    Args:
        model: the dual encoder, trained in place.
        similar: notions of similarity. Each one with a `head` gets a projection of the image tower's features, with
            random weights from torch's random state; its output is called ``head{place in similar}``: unit vectors of
            128 dimensions.
    """

    def __init__(self, model: DualEncoder, similar: Sequence[Similarity]) -> None:
        super().__init__()
        self.model = model
        head_types = {f"head{i}": similarity.head for i, similarity in enumerate(similar) if similarity.head}
        width = _feature_width(model) if head_types else 0
        self.heads = nn.ModuleDict({name: _head(head, width).to(model.device) for name, head in head_types.items()})

    def forward(
        self, *, pixel_values: Tensor | None = None, image_features: Tensor | None = None, **text: Tensor
    ) -> dict[str, Tensor]:
        """Return the outputs of `DualEncoder.forward` that are not None, and those of the heads."""
        if self.heads and pixel_values is not None:
            image_features, pixel_values = self.model.vision_features(pixel_values), None
        out = self.model(pixel_values=pixel_values, image_features=image_features, **text)
        outputs = {name: output for name, output in out._asdict().items() if output is not None}
        if image_features is not None:
            for name, head in self.heads.items():
                projected = head(image_features.to(next(head.parameters()).dtype))
                if projected.dtype is not torch.float64:
                    projected = projected.float()
                outputs[name] = F.normalize(projected, dim=-1)
        return outputs


def _head(head_type: Head, width: int) -> nn.Module:
    if head_type == "linear":
        return nn.Linear(width, HEAD_DIM, bias=False)
    # LayerNorm where SimCLR has BatchNorm, which would mix the samples of a chunk or a rank
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, HEAD_DIM))


def _feature_width(model: DualEncoder) -> int:
    """Return the width of the image tower's features, measured on one grey image."""
    pixels = model.processor.images([Image.fromarray(np.full((32, 32, 3), 128, np.uint8))])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        width = model.vision_features(pixels.to(model.device)).shape[1]
    model.train(was_training)
    return width
