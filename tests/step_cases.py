"""The cases of the matrix: a global batch for each target, and its loss by the textbook in float64.

Nothing of the engine is used for the reference: targets are dense matrices written out here, losses are torch's own.
"""

from __future__ import annotations

import copy

import tiny
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from clipkit import Graded, Paired, SameGroup, Views
from clipkit.data.batch import Batch, Rows
from clipkit.training.learner import Learner

N = 13
CUTS = {1: [13], 2: [4, 9], 4: [1, 6, 4, 2]}  # rows of each rank: uneven, and one with a single row
MICRO = 3  # so that ranks have one, two and three chunks
SIMILAR = {
    "paired": [Paired()],
    "group": [SameGroup("group")],
    "graded": [Graded("feature")],
    "views": [Paired(), Views(weight=0.5)],
    "hard": [Paired()],
}
KEYS = {
    "row": torch.arange(N) + 100,
    "group": torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, -1, -1, 2, 5, 0]),
    "feature": torch.randn(N, 5, generator=torch.Generator().manual_seed(3)),
}
HARD = [i % 3 for i in range(N)]  # hard negatives of each sample


def learner(target: str, loss: str, dropout: float = 0.0) -> Learner:
    """A tiny model whose embeddings differ; without the weights that no loss reaches, for DDP waits for them."""
    model = tiny.make_model(dropout=dropout, logit_scale=2.3, logit_bias=-3.0 if loss == "sigmoid" else None)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in model.parameters():
            if each.ndim > 1:
                each.normal_(0, 0.1, generator=generator)  # more would saturate attention: bf16 is coarse there
    found = Learner(model, SIMILAR[target]).train()
    model.backend.text.pooler = model.backend.vision.pooler = None
    return found


def batch(target: str, first: int = 0, count: int = N) -> Batch:
    """The rows of one rank. Every sample's pixels and words depend on its number alone."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(3, N, 3, 16, 16, generator=generator)  # of the image and its two views
    words = torch.randint(2, 16, (N, 8), generator=generator)
    hard_pixels = torch.randn(sum(HARD), 3, 16, 16, generator=generator)
    hard_words = torch.randint(2, 16, (sum(HARD), 8), generator=generator)
    part = slice(first, first + count)
    hard = slice(sum(HARD[:first]), sum(HARD[: first + count]))
    keys = {name: values[part] for name, values in KEYS.items()}
    image, text = [pixels[0, part]], [words[part]]
    rows = {"image": Rows(keys), "text": Rows(keys)}
    if target == "views":
        image += [pixels[1, part], pixels[2, part]]
        view = torch.arange(3).repeat_interleave(count)
        rows["image"] = Rows({name: torch.cat([values] * 3) for name, values in keys.items()} | {"view": view})
    if target == "hard":
        image.append(hard_pixels[hard])
        text.append(hard_words[hard])
        more = hard.stop - hard.start
        empty = {name: torch.full((more, *v.shape[1:]), -1).to(v.dtype) for name, v in keys.items()}
        full = Rows({name: torch.cat([v, empty[name]]) for name, v in keys.items()}, torch.arange(count + more) < count)
        rows = {"image": full, "text": full}
    ids = torch.cat(text)
    inputs = {"pixel_values": torch.cat(image), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, rows, count)


def reference(target: str, loss: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of the global batch in float64, on one process."""
    model = copy.deepcopy(learner(target, loss)).double()
    whole = batch(target)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in whole.inputs.items()}
    out = model(**inputs)
    logits = out["scale"] * out["image"] @ out["text"].T + out.get("bias", 0)
    affinity = torch.zeros(logits.shape, dtype=torch.float64)
    affinity[:N, :N] = _affinity(target)
    if target == "views":  # the views are no rows of the pairs
        logits, affinity = logits[:N], affinity[:N]
    value = _sigmoid(logits, affinity) if loss == "sigmoid" else _softmax(logits, affinity)
    if target == "views":
        value = value + 0.5 * _simclr(out["head1"][N:])
    value.backward()
    return {"loss": value.detach(), **gradients(model)}


def gradients(model: Learner) -> dict[str, torch.Tensor]:
    """Of the encoders as one vector, of the scale, of the bias."""
    scalars = {"scale": model.model.logit_scale, "bias": model.model.logit_bias}
    own = {id(each) for each in scalars.values()}
    rest = [each for each in model.parameters() if id(each) not in own and each.grad is not None]
    found = {"encoders": torch.cat([each.grad.double().flatten() for each in rest])}
    return found | {name: each.grad.double() for name, each in scalars.items() if each is not None}


def _affinity(target: str) -> torch.Tensor:
    own = torch.eye(N, dtype=torch.float64)
    if target == "group":
        group = KEYS["group"]
        return torch.maximum(own, ((group[:, None] == group[None]) & (group >= 0)[:, None]).double())
    if target == "graded":
        unit = normalize(KEYS["feature"].double(), dim=1)
        return torch.maximum(own, (unit @ unit.T).clamp(0, 1))
    return own


def _softmax(logits: torch.Tensor, affinity: torch.Tensor) -> torch.Tensor:
    """Anchors are the first N rows and columns; the others are only ever a negative."""
    rows, cols = affinity[:N], affinity.T[:N]
    a = cross_entropy(logits[:N], rows / rows.sum(1, keepdim=True))
    return (a + cross_entropy(logits.T[:N], cols / cols.sum(1, keepdim=True))) / 2


def _sigmoid(logits: torch.Tensor, affinity: torch.Tensor) -> torch.Tensor:
    each = binary_cross_entropy_with_logits(logits, affinity, reduction="none")
    return (each.sum() - each[N:, N:].sum()) / N  # two hard negatives are not compared


def _simclr(views: torch.Tensor) -> torch.Tensor:
    """Chen et al. 2020, eq. 1: NT-Xent over 2N views; the first N rows are one view, the others the second."""
    logits = (views @ views.T / 0.1).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))
