"""From the prompts of each class to one text embedding for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.embedding.embed import embed
from clipkit.embedding.store import EmbeddingStore
from clipkit.errors import UsageError
from clipkit.models.dual_encoder import DualEncoder


def class_embeddings(
    model: DualEncoder,
    class_prompts: Mapping[str, Sequence[str]],
    *,
    store: EmbeddingStore | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """(classes, dim), unit length: the prompts' unit embeddings, averaged per class and normalised again.

    Radford et al. 2021, 3.1.4. The mean of a class's logits or probabilities would be another number.

    Raises:
        UsageError: the prompts of a class cancel out.
    """
    texts = [text for own in class_prompts.values() for text in own]
    embedded = embed(model, texts, kind="text", store=store, batch_size=batch_size, progress=progress)
    vectors = normalize(embedded.vectors, dim=1)
    parts = torch.split(vectors, [len(own) for own in class_prompts.values()])
    means = torch.stack([part.mean(0) for part in parts])
    lost = (means.norm(dim=1) < 1e-6).nonzero().flatten().tolist()
    if lost:
        raise UsageError("the prompts of a class average to nothing", where=list(class_prompts)[lost[0]])
    return normalize(means, dim=1)
