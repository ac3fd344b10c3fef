from __future__ import annotations

import torch
from torch.nn.functional import normalize

from clipkit.labelling.prompts import class_embeddings
from clipkit.prompts import prompts


def test_normalised_averaged_normalised(model) -> None:
    own = prompts({"red": ["red", "orange"], "blue": "blue"}, ["a photo of {}", "{} .", "the dark {}"])
    found = class_embeddings(model, own, batch_size=2)
    for row, texts in zip(found, own.values(), strict=True):
        each = torch.cat([model.encode_texts([text]) for text in texts])
        assert torch.allclose(row, normalize(normalize(each, dim=1).mean(0), dim=0), atol=1e-6)
