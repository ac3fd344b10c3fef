"""The cases of the matrix: a global batch for each target, and its loss by the textbook in float64.

Nothing of the engine is used for the reference: targets are dense matrices written out here, losses are torch's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import tiny
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from clipkit import Graded, Paired, SameGroup, Views
from clipkit.data.batches.batch import Batch, RowKeys
from clipkit.losses.similarity import Similarity
from clipkit.training.heads import ModelWithHeads

N = 13
CUTS = {1: [13], 2: [4, 9], 4: [1, 6, 4, 2]}  # rows of each rank: uneven, and one with a single row
MICRO = 3  # so that ranks have one, two and three chunks
HARD = [i % 3 for i in range(N)]  # hard negatives of each sample
_numbers = torch.Generator().manual_seed(3)
KEYS = {
    "row": torch.arange(N) + 100,
    "group": torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, -1, -1, 2, 5, 0]),
    "caption": torch.tensor([7, 8, 9, 9, 1, 2, 3, 7, 4, 5, 6, 9, 0]),
    "picture": torch.tensor([0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 1, 10]),
    "trust": torch.rand(N, generator=_numbers) + 0.2,
    **{name: torch.randn(N, 5, generator=_numbers) for name in ("feature", "teacher_image", "teacher_text")},
}


def own() -> Tensor:
    return torch.eye(N, dtype=torch.float64)


def shared(column: str) -> Tensor:
    """(N, N) bool: whether two samples have the same value, and know it."""
    return (KEYS[column][:, None] == KEYS[column]) & (KEYS[column] >= 0)[:, None]


def cosine(a: str, b: str) -> Tensor:
    return normalize(KEYS[a].double(), dim=1) @ normalize(KEYS[b].double(), dim=1).T


def softened(a: str, b: str, softness: float) -> Tensor:
    """What a softmax over cosines / softness is made of."""
    return ((cosine(a, b) - 1) / softness).exp()


def simclr(out: dict[str, Tensor]) -> Tensor:
    """Chen et al. 2020, eq. 1: NT-Xent over 2N views; the first N rows are one view, the others the second."""
    views = out["head1"][N:]
    logits = (views @ views.T / 0.1).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))


def sup_con(out: dict[str, Tensor]) -> Tensor:
    """Khosla et al. 2020, eq. 2, over images; those that are alone in their group have no positive."""
    logits = (out["image"] @ out["image"].T / 0.2).masked_fill(own() > 0, -1e9)
    target = shared("group").double() - own()
    kept = target.clamp(min=0).sum(1) > 0
    target = target[kept].clamp(min=0)
    return cross_entropy(logits[kept], target / target.sum(1, keepdim=True))


@dataclass(frozen=True)
class Case:
    """A notion of similarity, and its target by hand: (N, N) in [0, 1], -1 for what is not compared."""

    similar: tuple[Similarity, ...] = (Paired(),)
    target: Callable[[], Tensor] = own
    more: Callable[[dict[str, Tensor]], Tensor] | None = None  # what the second notion adds to the loss
    smoothing: float = 0.0
    dims: tuple[int, ...] = ()
    weight: Tensor | None = None
    dropout: float = 0.0


def known() -> Tensor:
    ignored = (own() - shared("picture").double()).clamp(max=0)
    return torch.where(shared("caption"), 1.0, ignored + own())


IMAGES = ("image", "image")
KNOWN = {"caption": "positive", "picture": "ignore", "group": "negative"}
TEACHER = Graded("teacher_image", "softmax", against="teacher_text", softness=0.2)
SUP_CON = SameGroup("group", between=IMAGES, temperature=0.2, weight=0.3)
CASES = {
    "paired": Case(),
    "group": Case((SameGroup("group"),), lambda: shared("group") | (own() > 0)),
    "graded": Case((Graded("feature"),), lambda: torch.maximum(own(), cosine("feature", "feature"))),
    "teacher": Case((TEACHER,), lambda: softened("teacher_image", "teacher_text", 0.2)),
    "texts": Case((Graded("feature", "softmax", softness=0.3),), lambda: softened("feature", "feature", 0.3)),
    "known": Case((Paired(known=KNOWN),), known),
    "views": Case((Paired(), Views(weight=0.5)), more=lambda out: 0.5 * simclr(out)),
    "sup-con": Case((Paired(), SUP_CON), more=lambda out: 0.3 * sup_con(out)),
    "hard": Case(),
    "scores": Case((Paired(score="trust"),), weight=KEYS["trust"].double()),
    "smoothing": Case((TEACHER,), lambda: softened("teacher_image", "teacher_text", 0.2), smoothing=0.1),
    "matryoshka": Case((SameGroup("group"),), lambda: shared("group") | (own() > 0), dims=(4, 16)),
    "dropout": Case(dropout=0.2),
}


def learner(name: str, loss: str, dropout: float | None = None) -> ModelWithHeads:
    """A tiny model whose embeddings differ; without the weights that no loss reaches, for DDP waits for them.

    They differ a lot: in a narrow cone, gradients are small differences, and errors that of one unlucky rounding.
    """
    dropout = CASES[name].dropout if dropout is None else dropout
    bias = -1.0 if loss == "sigmoid" else None  # at the prior its gradient would be a small difference, too
    model = tiny.make_model(dropout=dropout, logit_scale=2.3, logit_bias=bias, image_pooling="mean")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # more would saturate attention: bf16 is coarse there
                is_embedding = "word_emb" in parameter_name or "patch_emb" in parameter_name
                parameter.normal_(0, 0.5 if is_embedding else 0.1, generator=generator)
    with_heads = ModelWithHeads(model, CASES[name].similar).train()
    model.backend.text.pooler = model.backend.vision.pooler = None
    return with_heads


def batch(name: str, first: int = 0, count: int = N) -> Batch:
    """The rows of one rank. Every sample's pixels and words depend on its number alone."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(3, N, 3, 16, 16, generator=generator)  # of the image and its two views
    words = torch.randint(2, 16, (N, 8), generator=generator)
    hard_pixels = torch.randn(sum(HARD), 3, 16, 16, generator=generator)
    hard_words = torch.randint(2, 16, (sum(HARD), 8), generator=generator)
    part = slice(first, first + count)
    hard = slice(sum(HARD[:first]), sum(HARD[: first + count]))
    keys = {column: values[part] for column, values in KEYS.items()}
    image, text = [pixels[0, part]], [words[part]]
    rows = {"image": RowKeys(keys), "text": RowKeys(keys)}
    if name == "views":
        image += [pixels[1, part], pixels[2, part]]
        view = torch.arange(3).repeat_interleave(count)
        rows["image"] = RowKeys({column: torch.cat([values] * 3) for column, values in keys.items()} | {"view": view})
    if name == "hard":
        image.append(hard_pixels[hard])
        text.append(hard_words[hard])
        more = hard.stop - hard.start
        empty = {column: torch.full((more, *v.shape[1:]), -1).to(v.dtype) for column, v in keys.items()}
        full = {column: torch.cat([v, empty[column]]) for column, v in keys.items()}
        rows = dict.fromkeys(rows, RowKeys(full, torch.arange(count + more) < count))
    ids = torch.cat(text)
    inputs = {"pixel_values": torch.cat(image), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, rows, count)


def reference(name: str, loss: str, world: int = 1, micro: int | None = None) -> dict[str, Tensor]:
    """Loss and gradients of the global batch in float64, on one process; with the dropout masks of that launch."""
    case, model = CASES[name], copy.deepcopy(learner(name, loss)).double()
    out = _masked(model, name, world, micro) if case.dropout else _embedded(model, batch(name).inputs)
    affinity = torch.zeros(len(out["image"]), len(out["text"]), dtype=torch.float64)
    affinity[:N, :N] = case.target()
    if name == "views":  # the views are no rows of the pairs
        affinity = affinity[:N]
    values = []
    for dim in case.dims or (out["image"].shape[1],):
        a = normalize(out["image"][: len(affinity), :dim], dim=1)
        b = normalize(out["text"][:, :dim], dim=1)
        logits = out["scale"] * a @ b.T + out.get("bias", 0)
        values.append((_sigmoid if loss == "sigmoid" else _softmax)(logits, affinity, case))
    value = torch.stack(values).mean()
    value = value if case.more is None else value + case.more(out)
    value.backward()
    return {"loss": value.detach(), **gradients(model)}


def _embedded(model: ModelWithHeads, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return model(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})


def _masked(model: ModelWithHeads, name: str, world: int, micro: int | None) -> dict[str, Tensor]:
    """The outputs of the whole batch, with the masks that each rank draws, chunk by chunk."""
    outputs = []
    for rank, count in enumerate(CUTS[world]):
        torch.manual_seed(rank)
        part = batch(name, sum(CUTS[world][:rank]), count)
        chunks = -(-count // (micro or count))
        outputs += [_embedded(model, chunk) for chunk in part.split(chunks)]
    joined = dict(outputs[-1])
    for key, value in joined.items():
        if value.ndim:  # not the scale or the bias
            joined[key] = torch.cat([output[key] for output in outputs])
    return joined


def gradients(model: ModelWithHeads) -> dict[str, Tensor]:
    """Of the encoders as one vector, of the scale, of the bias."""
    scalars = {"scale": model.model.logit_scale, "bias": model.model.logit_bias}
    encoders = [parameter for parameter in model.parameters() if parameter.ndim and parameter.grad is not None]
    result = {"encoders": torch.cat([parameter.grad.double().flatten() for parameter in encoders])}
    for name, scalar in scalars.items():
        if scalar is not None:
            result[name] = scalar.grad.double()
    return result


def _softmax(logits: Tensor, affinity: Tensor, case: Case) -> Tensor:
    """Anchors are the first N rows and columns; the others are only ever a negative."""
    return (_rows(logits[:N], affinity[:N], case) + _rows(logits.T[:N], affinity.T[:N], case)) / 2


def _rows(logits: Tensor, affinity: Tensor, case: Case) -> Tensor:
    compared, positive = (affinity >= 0).double(), affinity.clamp(min=0)
    target = (1 - case.smoothing) * positive / positive.sum(1, keepdim=True)
    target = target + case.smoothing * compared / compared.sum(1, keepdim=True)
    losses = cross_entropy(logits.masked_fill(compared == 0, -1e9), target, reduction="none")
    return losses.mean() if case.weight is None else (case.weight * losses).sum() / case.weight.sum()


def _sigmoid(logits: Tensor, affinity: Tensor, case: Case) -> Tensor:
    label = affinity.clamp(min=0) * (1 - case.smoothing) + case.smoothing / 2
    losses = binary_cross_entropy_with_logits(logits, label, reduction="none") * (affinity >= 0)
    if case.weight is not None:
        return (losses * (case.weight[:, None] + case.weight) / 2).sum() / case.weight.sum()
    return (losses.sum() - losses[N:, N:].sum()) / N  # two hard negatives are not compared
