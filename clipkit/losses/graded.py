"""Similarity as a spectrum: from a hierarchy, a teacher's embeddings, any features of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.losses.similar import ROW, Keys, Similar, same

Measure = Callable[[Tensor, Tensor], Tensor]  # (r, d), (c, d) -> (r, c) in [0, 1]


@dataclass(frozen=True)
class Graded(Similar):
    """Samples are more or less alike. Options as in `Similar`.

    ``Graded("teacher_image", "softmax", against="teacher_text")`` distils a teacher's similarity matrix, where both
    columns hold embeddings (`embed` makes them); ``Graded("text_embedding", "softmax")`` takes the similarity of texts;
    ``Graded(("order", "family", "species"), "hierarchy")`` a taxonomy.

    Args:
        features: one or several columns of the data set: numbers, or lists of numbers; for ``hierarchy`` names.
        similarity: ``cosine``: the cosine of the features, not below 0, and 1 for a sample with itself.
            ``softmax``: exp(cosine / softness), which the loss divides by its sums: the softmax over a frozen
            teacher's similarities. ``hierarchy``: the part of the levels, counted from the top, on which two samples
            agree. Or a function of features (r, d) and (c, d) that gives (r, c) in [0, 1].
        against: the column of the second side, where it is another one.
        softness: temperature of ``softmax``; 0.01 is that of CLIP's logits.

    Raises:
        UsageError: an unknown similarity, or an option that does not fit it.
    """

    features: str | tuple[str, ...]
    similarity: Literal["cosine", "softmax", "hierarchy"] | Measure = "cosine"
    against: str | None = None
    softness: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        names = get_args(Literal["cosine", "softmax", "hierarchy"])
        if not callable(self.similarity) and self.similarity not in names:
            raise UsageError(f"similarity is one of {', '.join(names)}, or a function; found {self.similarity!r}")
        if self.similarity == "hierarchy" and self.against is not None:
            raise UsageError("a hierarchy has the same levels on both sides", where="against", fix="leave it out")
        if not self.softness > 0.003:  # exp(-2 / 0.003) is the smallest that float64 holds
            raise UsageError(f"softness is greater than 0.003; found {self.softness}")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.features,) if isinstance(self.features, str) else tuple(self.features)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.names if self.similarity == "hierarchy" else ()

    @property
    def numbers(self) -> tuple[str, ...]:
        other = () if self.against is None else (self.against,)
        return () if self.similarity == "hierarchy" else (*self.names, *other)

    def affinity(self, rows: Keys, cols: Keys) -> Tensor:
        itself = same(rows[ROW], cols[ROW])
        if self.similarity == "hierarchy":
            return _shared_levels(rows, cols, self.names).masked_fill(itself, 1)
        a, b = _joined(rows, self.names), _joined(cols, self.names if self.against is None else (self.against,))
        if callable(self.similarity):
            return self.similarity(a, b)
        cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        if self.similarity == "cosine":
            return cosine.clamp(0, 1).masked_fill(itself, 1)
        return ((cosine.double().clamp(-1, 1) - 1) / self.softness).exp()  # exp(-200) is nothing in float32


def _joined(keys: Keys, names: tuple[str, ...]) -> Tensor:
    """(n, d): the columns side by side; an empty cell is 0, alike to nothing."""
    return torch.cat([keys[name].float().reshape(len(keys[name]), -1) for name in names], dim=1).nan_to_num()


def _shared_levels(rows: Keys, cols: Keys, levels: tuple[str, ...]) -> Tensor:
    """(r, c): the part of the levels on which two samples agree, from the first until they part."""
    agree = same(rows[levels[0]], cols[levels[0]])
    shared = agree.float()
    for level in levels[1:]:
        agree = agree & same(rows[level], cols[level])
        shared += agree
    return shared / len(levels)
